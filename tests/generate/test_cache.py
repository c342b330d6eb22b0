"""The KV cache: where it lies, and that logits from it are those of the whole row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.generate import decode
from lmjax.generate.cache import empty_cache
from lmjax.nn.cache import CacheWrite
from tests import tiny
from tests.generate.case import CONFIG, Uncached, parameters

P = jax.sharding.PartitionSpec
BATCH = ("data", "fsdp")
LENGTHS = np.array([7, 3, 8, 1], np.int32)
NEW = 4


@pytest.mark.fast
@pytest.mark.parametrize(("shape", "heads"), [((2, 2, 2), "tensor"), ((1, 1, 8), None)])
def test_cache_is_split_by_rows_and_by_heads_where_they_divide(shape, heads):
    with jax.set_mesh(tiny.mesh_of(*shape)):
        cache = empty_cache(CONFIG, 4, 16, jnp.dtype("bfloat16"))
    assert [[len(group), group[0].keys_BSKH.shape[0]] for group in cache] == [[2, 1], [1, 1]]
    for leaf in jax.tree.leaves(cache):
        assert leaf.shape[1:] == (4, 16, 2, 4)
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding.spec == P(None, BATCH, None, heads, None)


def cached_logits(config, tokens, params):
    """The logits after each prompt and after each of the NEW tokens that follow it, (rows, NEW + 1, vocab)."""
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))

    @jax.jit
    def run(params, prompts, lengths, new):
        decoder = blueprint.decoder(params)
        hidden, cache, key_positions = decode.prefill(decoder, tiny.FLOAT32, prompts, lengths, 8 + NEW)
        first = decode.next_logits(decoder, hidden, config.vocab_size)

        def step(carry, i):
            cache, key_positions = carry
            positions = (lengths + i)[:, None]
            token = jax.lax.dynamic_slice_in_dim(new, i, 1, 1)
            key_positions = jax.lax.dynamic_update_slice_in_dim(key_positions, positions, 8 + i, 1)
            write = CacheWrite(8 + i, key_positions)
            hidden, cache = decoder.hidden_with_cache(token, positions, tiny.FLOAT32, cache, write)
            return (cache, key_positions), decode.next_logits(decoder, hidden[:, 0], config.vocab_size)

        _, others = jax.lax.scan(step, (cache, key_positions), jnp.arange(NEW))
        return jnp.concatenate([first[None], others]).swapaxes(0, 1)

    numbers = np.arange(8)
    prompts = np.where(numbers < LENGTHS[:, None], tokens[:, :8], 77).astype(np.int32)  # 77: padding, seen by nothing
    new = np.take_along_axis(tokens, LENGTHS[:, None] + np.arange(NEW), 1).astype(np.int32)
    with jax.set_mesh(blueprint.mesh):
        return np.asarray(run(params, *tiny.by_rows(blueprint.mesh, prompts, LENGTHS, new)))


def test_cached_logits_equal_uncached_ones(rng, monkeypatch):
    monkeypatch.setattr(decode, "PREFILL_PART", 4)  # two parts of the prompts, and rows that end in either
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(1, 1, 1))
    _, params = parameters(blueprint, rng)
    tokens = rng.integers(0, CONFIG.vocab_size, (4, 8 + NEW)).astype(np.int32)
    whole = Uncached(blueprint, params).logits(tokens)
    places = LENGTHS[:, None] - 1 + np.arange(NEW + 1)
    expected = np.take_along_axis(whole, places[..., None], 1)
    found = cached_logits(CONFIG, tokens, params)
    assert np.all(np.isneginf(found[..., CONFIG.vocab_size :]))
    found = found[..., : CONFIG.vocab_size]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    off_by_one = tiny.with_changes(CONFIG, sliding_window=4)
    wrong = cached_logits(off_by_one, tokens, params)[..., : CONFIG.vocab_size]
    assert np.abs(wrong - expected).max() > 1e-2
