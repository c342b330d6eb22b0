import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax import sharding
from lmjax.errors import InputError
from lmjax.sharding import (
    ACTIVATION_RULES,
    PARAMETER_RULES,
    activation_spec,
    batch_sharding,
    leaf_report,
    parameter_spec,
)
from tests.tiny import mesh_of

pytestmark = pytest.mark.fast

SIZES = {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (6, 8), P(("fsdp", "expert"), "tensor")),
        (("mlp", "embed"), (8, 6), P("tensor", ("fsdp", "expert"))),
        (("vocab", "embed"), (128, 6), P("tensor", ("fsdp", "expert"))),
        (("embed", "heads", "head_dim"), (6, 4, 5), P(("fsdp", "expert"), "tensor", None)),
        (("embed", "kv_heads", "head_dim"), (6, 4, 5), P(("fsdp", "expert"), "tensor", None)),
        (("embed", "kv_heads", "head_dim"), (6, 1, 5), P(("fsdp", "expert"), None, None)),
        (("norm",), (7,), P(None)),
        # A stack of layers has a dimension more than its axes.
        (("embed", "mlp"), (3, 6, 8), P(None, ("fsdp", "expert"), "tensor")),
    ],
)
def test_parameters_follow_their_table(axes, shape, expected):
    assert parameter_spec(axes, shape, SIZES) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("batch", "seq", "embed"), (8, 6, 5), P(("data", "fsdp", "expert"), None, None)),
        (("batch", "seq_residual", "embed"), (8, 6, 5), P(("data", "fsdp", "expert"), "tensor", None)),
        (("batch", "seq_residual", "embed"), (8, 1, 5), P(("data", "fsdp", "expert"), None, None)),
        (("batch", "seq", "mlp"), (8, 6, 4), P(("data", "fsdp", "expert"), None, "tensor")),
        (("batch", "seq", "kv_heads", "head_dim"), (8, 6, 3, 4), P(("data", "fsdp", "expert"), None, None, None)),
    ],
)
def test_activations_follow_their_table(axes, shape, expected):
    with jax.set_mesh(mesh_of(2, 2, 2)):
        assert activation_spec(axes, shape) == expected


def test_both_tables_know_the_same_axes_of_the_mesh():
    known = {"data", "fsdp", "expert", "tensor", None}
    for rules in (PARAMETER_RULES, ACTIVATION_RULES):
        for rule in rules.values():
            assert set(rule if isinstance(rule, tuple) else (rule,)) <= known


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embed", "mpl"), (6, 8), "unknown logical axis 'mpl'"),
        (("heads", "mlp"), (4, 8), "use a mesh axis twice"),
        (("embed", "embed"), (4, 8), "use a mesh axis twice"),
        (("embed", "mlp", "head_dim"), (4, 8), "do not fit shape"),
    ],
)
def test_unknown_and_doubly_used_axes_are_refused(axes, shape, message):
    with pytest.raises(ValueError, match=message):
        parameter_spec(axes, shape, SIZES)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embed", "mlp"), (7, 8), "embed has size 7.*fsdp = 2 devices: 7 mod 2 = 1"),
        (("vocab", "embed"), (129, 6), "vocab has size 129.*tensor = 2 devices: 129 mod 2 = 1"),
    ],
)
def test_uneven_sizes_are_refused_with_the_arithmetic(axes, shape, message):
    with pytest.raises(InputError, match=message):
        parameter_spec(axes, shape, SIZES)


def test_an_uneven_batch_is_refused_with_the_arithmetic():
    with jax.set_mesh(mesh_of(2, 2, 2)), pytest.raises(InputError, match="data x fsdp = 4 devices: 6 mod 4 = 2"):
        activation_spec(("batch", "seq", "embed"), (6, 4, 4))


def test_rows_are_contiguous_over_the_batch_axes():
    rows = jax.device_put(np.arange(16).reshape(2, 8), batch_sharding(mesh_of(2, 2, 2), num_leading=1))
    held = {tuple(np.asarray(shard.data)[0]) for shard in rows.addressable_shards}
    assert held == {(0, 1), (2, 3), (4, 5), (6, 7)}


def test_the_report_tells_what_a_device_holds():
    mesh = mesh_of(2, 2, 2)
    tree = {
        "a": jax.device_put(jnp.zeros((4, 6), jnp.float32), jax.NamedSharding(mesh, P(("fsdp", "expert"), "tensor"))),
        "b": jax.ShapeDtypeStruct((3,), jnp.int32, sharding=sharding.replicated(mesh)),
    }
    one, two = leaf_report(tree)
    assert (one.path, one.shape, one.dtype, one.bytes_per_device) == ("a", (4, 6), "float32", 4 * 2 * 3)
    assert "fsdp" in one.spec
    assert (two.path, two.dtype, two.bytes_per_device) == ("b", "int32", 12)
    assert one.bytes_per_device == tree["a"].addressable_shards[0].data.nbytes
