"""What a step computes, moves and sends in closed form, and the least time for it."""

import dataclasses
import math

import pytest

from benchmarks.plan_accuracy import MODELS, POLICIES
from lmjax.mesh import AXES, MeshConfig
from lmjax.models.config import DecoderConfig
from lmjax.models.counts import training_flops
from lmjax.models.remat import RematConfig
from lmjax.nn.moe import MoEConfig
from lmjax.ops.attention_kernels import Choice
from lmjax.plan.cost import HOST_AXIS, HOST_LINK, Bound, Cost, Traffic, bound, cost
from lmjax.plan.share import Setup
from lmjax.plan.topology import parse_topology

pytestmark = pytest.mark.fast

MODEL = DecoderConfig(vocab_size=256, max_length=64, embed_dim=32, num_layers=3, num_heads=4, mlp_dim=96)
MODEL_OF_EXPERTS = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=8, experts_per_token=2))
LENGTH = 64


def setup_of(topology: str, model: DecoderConfig = MODEL, **changes) -> Setup:
    sizes = dict.fromkeys(AXES, 1) | changes.pop("sizes", {"fsdp": 8})
    setup = Setup(
        model=model,
        hardware=parse_topology(topology).hardware,
        sizes=sizes,
        rows=16,
        length=LENGTH,
        accumulation=1,
        compute_bytes=2,
        remat=POLICIES["none"],
        moments_on_host=False,
        kernels=dict.fromkeys(("full", "sliding"), Choice("reference", "")),
        exchange="gather",
        loss_chunk_tokens=1024,
        reduce_in_float32=False,
    )
    return dataclasses.replace(setup, **changes)


def cost_of(topology: str = "v5e:2x4", mesh: MeshConfig | None = None, **changes) -> Cost:
    return cost(setup_of(topology, **changes), mesh or MeshConfig(), parse_topology(topology))


def test_without_recomputation_a_device_computes_its_part_of_the_models_operations():
    found = cost_of()
    assert found.model_flops == training_flops(MODEL, 16, LENGTH)
    assert found.flops == found.model_flops // 8


def test_full_recomputation_is_the_blocks_forward_pass_but_for_its_last_product():
    blocks = training_flops(MODEL, 16, LENGTH) // 3 - 2 * 16 * LENGTH * 256 * 32  # without the logits
    down = 2 * 16 * LENGTH * 3 * 32 * 96
    again = 8 * (cost_of(remat=POLICIES["full"]).flops - cost_of().flops)
    assert again == pytest.approx(blocks - down, abs=8)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_saved_is_not_computed_again(model: str):
    flops = {name: cost_of(model=MODELS[model], remat=policy, length=2048).flops for name, policy in POLICIES.items()}
    assert flops["none"] < flops["dots"] < flops["full"]
    assert flops["none"] < flops["heads"] < flops["attention"] < flops["full"]


def test_what_waits_on_the_hosts_is_not_computed_again_and_comes_over_their_link():
    names = ("query", "key", "value", "attention_out", "mlp_gate", "mlp_up")
    here = cost_of("h200:8", remat=RematConfig(policy="save", save=names), accumulation=2)
    there = cost_of("h200:8", remat=RematConfig(policy="save", offload=names), accumulation=2)
    assert there.flops == here.flops < cost_of("h200:8", remat=POLICIES["full"], accumulation=2).flops
    sent = by_axis(there)[HOST_AXIS, HOST_LINK]
    # Of two micro-batches of 2 rows a device: 4 x 32 and 2 x 96 numbers of two bytes a token, and 4 of four.
    assert sent == 2 * 3 * 2 * LENGTH * (2 * (4 * 32 + 2 * 96) + 4 * 4)
    assert (HOST_AXIS, HOST_LINK) not in by_axis(here)


def by_axis(found: Cost) -> dict[tuple[str, str], int]:
    totals: dict[tuple[str, str], int] = {}
    for traffic in found.traffic:
        key = traffic.axis, traffic.link
        totals[key] = totals.get(key, 0) + traffic.bytes
    return totals


def gathered(topology: str = "v5e:2x4", **changes) -> int:
    (found,) = (each for each in cost_of(topology, **changes).traffic if each.what == "matrices gathered")
    assert found.axis == "fsdp"
    return found.bytes


def test_matrices_are_gathered_over_fsdp_and_their_gradients_split():
    matrices, down = 3 * (4 * 32 * 32 + 3 * 32 * 96), 3 * 32 * 96
    assert gathered() == gathered(remat=POLICIES["full"]) == 2 * matrices * 2 * 7 // 8  # forward and backward
    assert gathered(accumulation=3) == 3 * gathered()
    again = gathered("h200:8", remat=POLICIES["full"]) - gathered("h200:8")
    assert again == (matrices - down) * 2 * 7 // 8
    (summed,) = (each for each in cost_of(reduce_in_float32=True).traffic if each.what == "gradients summed and split")
    assert summed.bytes == matrices * 4 * 7 // 8


def test_tokens_go_to_experts_as_the_exchange_sends_them():
    """Of 16 x 64 tokens an eighth is on a device, in rows of 32 numbers of two bytes."""

    def received(exchange: str) -> int:
        found = cost_of(model=MODEL_OF_EXPERTS, sizes={"expert": 8}, exchange=exchange, remat=POLICIES["full"])
        return sum(each.bytes for each in found.traffic if each.what.startswith("tokens"))

    here = 16 * 64 * 32 * 2 // 8
    assert received("ragged") == 3 * 6 * here * 2 * 7 // 8  # there and back: forward, computed again and backward
    assert received("gather") == 3 * 5 * here * 8 * 7 // 8


def test_axes_of_one_device_send_nothing():
    assert {axis for axis, _ in by_axis(cost_of())} == {"fsdp"}
    assert {axis for axis, _ in by_axis(cost_of(sizes={"data": 2, "tensor": 4}))} == {"data", "tensor"}
    assert cost_of(sizes={}, topology="h200:1").traffic == ()


def test_between_slices_goes_what_the_axis_between_them_sends():
    mesh = MeshConfig(data=2, fsdp=8, dcn_data=2)
    found = by_axis(cost_of("2xv5e:2x4", mesh, sizes={"data": 2, "fsdp": 8}))
    assert set(found) == {("fsdp", "ICI"), ("data", "DCN")}
    whole = by_axis(cost_of("2xv5e:2x4", MeshConfig(fsdp=16, dcn_fsdp=2), sizes={"fsdp": 16}))
    assert set(whole) == {("fsdp", "ICI"), ("fsdp", "DCN")}
    # Half of everything lies in the other slice, and each of the eight devices here fetches an eighth of that.
    assert whole["fsdp", "DCN"] == pytest.approx(whole["fsdp", "ICI"] * (8 / 7) / 16, rel=1e-3)


def test_between_hosts_the_last_axes_fill_a_host_first():
    model = dataclasses.replace(MODEL, num_heads=8)
    found = by_axis(cost_of("2xh200:8", MeshConfig(fsdp=2, tensor=8), model=model, sizes={"fsdp": 2, "tensor": 8}))
    assert ("tensor", "NVLink") in found
    assert ("tensor", "network") not in found
    assert ("fsdp", "network") in found
    assert ("fsdp", "NVLink") not in found


def test_an_axis_that_straddles_hosts_goes_over_the_network():
    model = dataclasses.replace(MODEL, num_heads=6, head_dim=8, vocab_size=768)
    mesh = MeshConfig(fsdp=4, tensor=6)
    found = by_axis(cost_of("3xh200:8", mesh, model=model, sizes={"fsdp": 4, "tensor": 6}))
    assert ("fsdp", "network") in found


def test_the_bound_is_the_slowest_part_at_its_peak():
    topology = parse_topology("v5p:2x2x2")
    found = Cost(
        model_flops=1,
        flops=459 * 10**12,
        memory_bytes=2765 * 10**9 * 2,
        traffic=(Traffic("fsdp", "x", "ICI", 600 * 10**9 * 3), Traffic("data", "y", "DCN", 25 * 10**9)),
    )
    seconds = bound(found, topology)
    assert seconds is not None
    assert seconds == pytest.approx(Bound(1.0, 2.0, 3.0, 4.0, 0.0, 0.0))
    assert seconds.seconds == seconds.predicted == pytest.approx(4.0)
    assert seconds._replace(network=0.0, links=0.0).predicted == pytest.approx(3.0)
    assert bound(found, parse_topology("cpu:8")) is None


def test_a_step_waits_for_what_goes_along_tensor_and_expert():
    parts = [Traffic(axis, "x", "ICI", 60 * 10**9) for axis in ("fsdp", "tensor", "expert")]
    found = Cost(model_flops=1, flops=459 * 10**12, memory_bytes=0, traffic=tuple(parts))
    seconds = bound(found, parse_topology("v5p:2x2x2"))
    assert seconds is not None
    assert seconds.waited_for == pytest.approx(0.2)
    assert seconds.seconds == pytest.approx(1.0)
    assert seconds.predicted == pytest.approx(1.2)


def test_more_of_everything_takes_no_less_time():
    topology = parse_topology("h200:8")
    seconds = []
    for rows in (8, 16, 32):
        found = bound(cost_of("h200:8", rows=rows), topology)
        assert found is not None
        seconds.append(found.seconds)
    assert seconds == sorted(seconds)
    assert all(map(math.isfinite, seconds))
