import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.ops.lookup import lookup
from lmjax.plan.hlo import sent_by_axis
from tests.ops.sharded import BATCH, run_on

VOCAB, EMBED = 64, 16
TABLE, TOKENS = P("tensor", ("fsdp", "expert")), P(BATCH)


@pytest.fixture
def table(rng):
    return rng.normal(size=(VOCAB, EMBED)).astype(np.float32)


@pytest.mark.parametrize("length", [16, 5], ids=["sequence-sharded", "whole-sequences"])
def test_rows_and_gradient_are_those_of_plain_indexing(mesh, rng, table, length):
    tokens = rng.integers(0, VOCAB, (8, length)).astype(np.int32)
    weights = rng.normal(size=(8, length, EMBED)).astype(np.float32)

    def forward_and_backward(table, tokens, weights):
        x, pull_back = jax.vjp(lambda table: lookup(table, tokens, jnp.dtype("float32")), table)
        return x, *pull_back(jax.sharding.reshard(weights, jax.typeof(x).sharding.spec))

    x, gradient = run_on(mesh, forward_and_backward, (table, TABLE), (tokens, TOKENS), (weights, P(BATCH)))
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, weights)
    np.testing.assert_array_equal(x, table[tokens])
    np.testing.assert_allclose(gradient, expected, atol=2e-6)
    assert not np.allclose(gradient, np.roll(expected, 1, axis=0), atol=1e-2)
    assert gradient.sharding.spec == TABLE
    split = "tensor" if length % mesh.shape["tensor"] == 0 else None
    assert x.sharding.spec == P(BATCH, split, None)


def test_gradient_of_a_frequent_token_is_summed_in_float32(mesh_2x2x2, table):
    tokens = np.zeros((8, 128), np.int32)

    def gradient(table, tokens):
        return jax.grad(lambda table: lookup(table, tokens, jnp.dtype("bfloat16")).astype(jnp.float32).sum())(table)

    found = run_on(mesh_2x2x2, gradient, (table, TABLE), (tokens, TOKENS))
    in_bfloat16 = jnp.zeros(VOCAB, jnp.bfloat16).at[tokens.reshape(-1)].add(jnp.bfloat16(1))
    assert np.all(np.asarray(found)[0] == tokens.size)
    assert in_bfloat16[0] < tokens.size


def test_what_goes_over_data_is_a_part_of_the_tables_gradient(mesh_2x2x2, table):
    tokens = np.zeros((8, 16), np.int32)
    placed = [(table, TABLE), (tokens, TOKENS)]
    with jax.set_mesh(mesh_2x2x2):
        arrays = [jax.device_put(array, jax.NamedSharding(mesh_2x2x2, spec)) for array, spec in placed]
        gradient = jax.jit(jax.grad(lambda table, tokens: lookup(table, tokens, jnp.dtype("float32")).sum()))
        program = gradient.lower(*arrays).compile().as_text()
    sent = {(each.axes, each.kind): each.bytes for each in sent_by_axis(program, mesh_2x2x2.shape)}
    whole = VOCAB // 2 * EMBED * 4  # of a device, before it is split over fsdp
    (over_data,) = (num_bytes for (axes, _), num_bytes in sent.items() if axes == "data")
    assert over_data == whole // 2
