"""What a layer of experts sends between devices, as it is compiled: what was planned and nothing else."""

import jax
import jax.numpy as jnp
import pytest

from lmjax.mesh import MeshConfig
from lmjax.ops.experts import (
    EXPERT_AXES,
    ExpertExchange,
    ExpertOptions,
    ExpertParams,
    choose_exchange,
    expert_mlp,
)
from lmjax.ops.routing import RouterOptions
from lmjax.plan.compile import topology_mesh
from lmjax.plan.hlo import Collective, collectives
from lmjax.sharding import activation_spec, parameter_spec
from tests.tiny import mesh_of

B, T, D, F, E, K = 8, 12, 16, 20, 8, 2
SHAPES = ExpertParams(router=(D, E), choice_bias=None, gate=(E, D, F), up=(E, D, F), down=(E, F, D))  # pyright: ignore[reportArgumentType]


def compiled(
    sizes: tuple[int, int, int, int],
    capacity_factor: float | None,
    exchange: ExpertExchange = "gather",
    topology: str | None = None,
) -> dict[str, Collective]:
    """The collectives of the forward pass on a mesh of these sizes of data, fsdp, tensor and expert."""
    if topology is None:
        mesh = mesh_of(*sizes)
    else:
        data, fsdp, tensor, expert = sizes
        mesh = topology_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, expert=expert), topology)
    options = ExpertOptions(
        router=RouterOptions(num_experts=E, experts_per_token=K),
        activation=jax.nn.silu,
        capacity_factor=capacity_factor,
        exchange=exchange,
        jitter=0.0,
        platform="cpu" if topology is None else "tpu",
        reduce_f32=False,
        tag=lambda array, name: array,
    )

    def struct(shape: tuple[int, ...], spec: jax.P, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        x = struct((B, T, D), activation_spec(("batch", "seq", "embed"), (B, T, D)))
        valid = struct((B, T), activation_spec(("batch", "seq"), (B, T)), jnp.bool_)
        params = ExpertParams._make(
            None if shape is None else struct(shape, parameter_spec(EXPERT_AXES[name], shape, mesh.shape))
            for name, shape in SHAPES._asdict().items()
        )
        run = jax.jit(lambda x, valid, params: expert_mlp(x, valid, params, options, None)[0])
        platforms = (options.platform,)
        return collectives(run.trace(x, valid, params).lower(lowering_platforms=platforms).compile().as_text())


def test_with_capacity_slots_go_to_their_experts_and_come_back():
    found = compiled((1, 1, 1, 8), 1.0)
    slots = E * (B // 8) * (T * K // E) * D * 4
    assert found["all-to-all"] == Collective(2, 2 * slots)
    assert set(found) <= {"all-to-all", "all-gather"}, "the router's matrix is gathered, as all that all tokens share"
    assert found["all-gather"].bytes == D * E * 4


def test_dropless_every_device_sees_the_tokens_of_all_and_sums_are_scattered():
    found = compiled((1, 1, 1, 8), None)
    tokens = B * T
    assert found["reduce-scatter"] == Collective(1, tokens * D * 4)
    assert "all-to-all" not in found
    gathered = tokens * (D * 4 + 2 * K * 4 + 1) + D * E * 4  # tokens, weights and choices, what is padding; the router
    assert found["all-gather"].bytes == gathered


def test_a_tpu_sends_each_choice_to_its_expert_and_gets_it_back():
    pytest.importorskip("libtpu")
    found = compiled((1, 1, 1, 8), None, "ragged", "v5p:2x2x2")
    received = 8 * (B // 8 * T) * 1  # a device has one expert: at most one choice of every token comes here
    assert found["ragged-all-to-all"].count == 2
    assert found["ragged-all-to-all"].bytes >= 2 * received * D * 4
    assert not {"all-to-all", "reduce-scatter"} & set(found)
    small = sum(found[kind].bytes for kind in ("all-gather", "all-reduce"))
    assert small == D * E * 4 + 8 * E * 4, "the router's matrix, and how many rows every device has for each expert"


@pytest.mark.fast
def test_the_exchange_that_sends_less_is_taken_where_there_is_one():
    assert choose_exchange("auto", 2, 8, "tpu") == choose_exchange("auto", 7, 8, "gpu") == "ragged"
    assert choose_exchange("auto", 8, 8, "tpu") == choose_exchange("auto", 2, 8, "cpu") == "gather"
    assert choose_exchange("ragged", 2, 8, "cpu") == "ragged"
    assert choose_exchange("gather", 2, 8, "tpu") == "gather"
    assert choose_exchange("auto", 2, 1, "tpu") == "gather"


def test_experts_are_gathered_over_fsdp_and_summed_over_tensor():
    found = compiled((1, 4, 2, 1), None)
    matrices = 3 * E * D * F // 2 * 4 + D * E * 4
    assert found["all-gather"].bytes == matrices
    assert found["reduce-scatter"] == Collective(1, B // 4 * T * D * 4)
    assert set(found) == {"all-gather", "reduce-scatter"}


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_one_device_sends_nothing(capacity_factor):
    assert compiled((1, 1, 1, 1), capacity_factor) == {}
