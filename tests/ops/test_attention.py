import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.errors import InputError
from lmjax.hardware import Hardware
from lmjax.ops.attention import attention
from lmjax.ops.attention_kernels import KERNELS
from lmjax.ops.attention_mask import Mask
from tests.ops.attention_case import PLAIN, Case, Features, forward_and_backward, make_case, run_reference
from tests.ops.flash_cases import TILING
from tests.ops.sharded import BATCH, assert_trees_close, run_on

MASK = Mask(window=5)
HEADS, ALL_HEADS = P(BATCH, None, "tensor", None), P(BATCH, None, None, None)


EXTRAS = {"prefix": P(BATCH), "slopes": P("tensor"), "sinks": P("tensor")}


def run_sharded(mesh, case: Case, kernel: str = "reference", mask: Mask = MASK, features: Features = PLAIN):
    kv_spec = ALL_HEADS if case.k.shape[2] % mesh.shape["tensor"] else HEADS
    wanted = [name for name, is_wanted in zip(EXTRAS, features.extras_wanted, strict=True) if is_wanted]

    def attend(q, k, v, segment_ids, **extras):
        return attention(
            q, k, v, mask=mask, segment_ids=segment_ids, scale=0.3, kernel=kernel, **features.options, **extras
        )

    def run(q, k, v, segment_ids, dout, *extras):
        return forward_and_backward(attend)(q, k, v, segment_ids, dout, dict(zip(wanted, extras, strict=True)))

    inputs = (case.q, HEADS), (case.k, kv_spec), (case.v, kv_spec), (case.segment_ids, P(BATCH)), (case.dout, HEADS)
    found = run_on(mesh, run, *inputs, *((getattr(case, name), EXTRAS[name]) for name in wanted))
    specs = [HEADS, HEADS, kv_spec, kv_spec, *([P("tensor")] if features.sinks else [])]
    assert [array.sharding.spec for array in found] == specs
    return found


@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_values_and_gradients_are_one_devices_on_any_mesh(mesh, rng, num_kv_heads):
    case = make_case(rng, batch=8, length=16, num_heads=8, num_kv_heads=num_kv_heads)
    assert_trees_close(run_sharded(mesh, case), run_reference(case, MASK), 2e-6)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 3), (8, 1)], ids=["group-cut-in-two", "one-kv-head"])
@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_kv_heads_that_the_mesh_does_not_divide(mesh_2x2x2, rng, kernel, num_heads, num_kv_heads):
    case = make_case(rng, batch=4, length=16, num_heads=num_heads, num_kv_heads=num_kv_heads)
    found = run_sharded(mesh_2x2x2, case, kernel)
    assert_trees_close(found, run_reference(case, MASK), 2e-6)
    if num_kv_heads > 1:
        other_heads = case._replace(k=np.roll(case.k, 1, axis=2))
        with pytest.raises(AssertionError):
            assert_trees_close(found, run_reference(other_heads, MASK), 1e-2)


@pytest.mark.parametrize(
    ("mask", "features"),
    [(MASK, Features(softcap=1.5, alibi=True, sinks=True)), (Mask(), Features(prefix=True, alibi=True, sinks=True))],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["reference", pytest.param("chunked", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 3)], ids=["kv-heads-split", "kv-heads-whole"])
def test_every_device_has_the_slopes_and_sinks_of_its_heads(
    mesh_2x2x2, rng, kernel, num_heads, num_kv_heads, mask, features
):
    case = make_case(rng, batch=4, length=16, num_heads=num_heads, num_kv_heads=num_kv_heads)
    found = run_sharded(mesh_2x2x2, case, kernel, mask, features)
    assert_trees_close(found, run_reference(case, mask, features=features), 3e-6)
    for name in ("slopes", "sinks"):
        other = case._replace(**{name: np.roll(getattr(case, name), num_heads // 2)})
        with pytest.raises(AssertionError):
            assert_trees_close(found, run_reference(other, mask, features=features), 1e-2)


@pytest.mark.parametrize("mask", [MASK, Mask(causal=False)], ids=str)
def test_a_prefix_with_a_window_or_without_causality_is_refused(one_device, rng, mask):
    case = make_case(rng)
    with pytest.raises(InputError, match="a prefix goes with a causal mask without a window"):
        run_sharded(one_device, case, mask=mask, features=Features(prefix=True))


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_no_gradient_reaches_later_positions_or_other_documents(one_device, rng, kernel):
    case = make_case(rng, batch=1)
    query = 9
    dout = np.zeros_like(case.dout)
    dout[:, query] = case.dout[:, query]
    _, _, dk, dv = run_sharded(one_device, case._replace(dout=dout), kernel)
    positions = np.arange(case.q.shape[1])
    visible = (positions <= query) & (positions > query - 5) & (case.segment_ids[0] == case.segment_ids[0, query])
    assert visible.any()
    for gradient in (dk, dv):
        assert (np.abs(np.asarray(gradient)[0]).max(axis=(1, 2)) > 0).tolist() == visible.tolist()


def test_hardware_is_that_of_the_devices_unless_given(one_device, rng):
    case = make_case(rng, batch=1, length=128)

    def traced(hardware):
        def attend(q, k, v, segment_ids):
            inputs = (jax.sharding.reshard(x, HEADS) for x in (q, k, v))
            segment_ids = jax.sharding.reshard(segment_ids, P(BATCH))
            return attention(*inputs, mask=MASK, segment_ids=segment_ids, scale=0.3, hardware=hardware)

        with jax.set_mesh(one_device):
            return str(jax.make_jaxpr(attend)(*case[:4]))

    assert "pallas_call" not in traced(None)
    assert "pallas_call" in traced(Hardware("tpu", "v5p"))


def test_the_tpu_kernel_has_each_devices_rows_heads_and_extras(mesh_2x2x2, rng, monkeypatch):
    interpreted = dataclasses.replace(
        KERNELS["flash_tpu"], hardware=frozenset({"cpu"}), options={"cpu": {"interpret": True, "tiling": TILING}}
    )
    monkeypatch.setitem(KERNELS, "flash_tpu", interpreted)
    features = Features(alibi=True, sinks=True)
    for num_heads, num_kv_heads in ((4, 2), (6, 3)):
        case = make_case(rng, batch=4, length=140, num_heads=num_heads, num_kv_heads=num_kv_heads)
        found = run_sharded(mesh_2x2x2, case, "flash_tpu", MASK, features)
        assert_trees_close(found, run_reference(case, MASK, features=features), 3e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (2, 24, 3, 8), "v": (2, 24, 3, 8)}, "4 query heads do not divide into groups for 3 kv heads"),
        ({"k": (2, 20, 2, 8), "v": (2, 20, 2, 8)}, "rows have to be as long in all three"),
        ({"v": (2, 24, 1, 8)}, "keys and values to have as many heads"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(one_device, rng, changes, message):
    case = make_case(rng)
    arrays = {name: jnp.zeros(changes.get(name, getattr(case, name).shape)) for name in ("q", "k", "v")}
    with jax.set_mesh(one_device), pytest.raises(InputError, match=message):
        attention(*arrays.values(), mask=MASK, segment_ids=None, scale=0.3)


@pytest.mark.parametrize("wrong", ["segments", "prefix"])
def test_known_segments_and_prefixes_out_of_order_are_refused(one_device, rng, wrong):
    case = make_case(rng, length=16)
    segment_ids, prefix = np.ones((2, 16), np.int32), np.zeros((2, 16), bool)
    prefix[:, :3] = True
    with jax.set_mesh(one_device):
        arrays = (jax.device_put(x, HEADS) for x in (case.q, case.k, case.v))
        attend = functools.partial(attention, *arrays, mask=Mask(), scale=0.3)
        assert np.isfinite(
            attend(segment_ids=jax.device_put(segment_ids, P(BATCH)), prefix=jax.device_put(prefix, P(BATCH)))
        ).all()
        (segment_ids if wrong == "segments" else prefix)[1, 5:9] = 2
        with pytest.raises(InputError, match="at position (5|9) of row 1 a segment's id comes back after another"):
            attend(segment_ids=jax.device_put(segment_ids, P(BATCH)), prefix=jax.device_put(prefix, P(BATCH)))
