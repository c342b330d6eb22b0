"""The KV cache: where it lies, how large it is, and that logits from it are those of the whole row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.generate import steps
from lmjax.generate.cache import empty_cache, repeat_rows
from lmjax.nn.attention_latent import LatentConfig
from lmjax.nn.cache import CacheWrite, slots_of_window
from lmjax.nn.moe import MoEConfig
from tests import tiny
from tests.generate.case import CONFIG, Uncached, parameters

P = jax.sharding.PartitionSpec
BATCH = ("data", "fsdp", "expert")
LENGTHS = np.array([7, 3, 32, 1, 30, 17, 8, 9], np.int32)
COLUMNS = 32
NEW = 12
PART = 4
"""Columns of a part of the prompts; of a window of 3 tokens, a layer keeps 8 slots."""
LONG = tiny.with_changes(CONFIG, max_length=COLUMNS + NEW)
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, shared_dim=16, capacity_factor=4.0)
"""With room for all, in the whole passes that the cached ones are compared with."""
LATENT = {
    "num_kv_heads": None,
    "head_dim": 10,
    "latent": LatentConfig(kv_rank=8, query_rank=12, rope_dim=4, value_dim=6),
}


@pytest.mark.fast
@pytest.mark.parametrize(("shape", "heads"), [((2, 2, 2), "tensor"), ((1, 1, 8), None)])
def test_cache_is_split_by_rows_and_by_heads_where_they_divide(shape, heads):
    with jax.set_mesh(tiny.mesh_of(*shape)):
        cache = empty_cache(CONFIG, 4, 64, jnp.dtype("bfloat16"), part=PART)
    assert [[stacked.keys.shape[0] for stacked in group] for group in cache] == [[1, 1], [1]]
    for leaf in jax.tree.leaves(cache):
        assert leaf.shape[1:] in ((4, 2, 64, 4), (4, 2, 8, 4))
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding.spec == P(None, BATCH, heads, None, None)


@pytest.mark.fast
def test_a_windowed_layer_has_the_same_bytes_at_any_length():
    with jax.set_mesh(tiny.mesh_of(1, 1, 1)):

        def sizes(slots: int) -> list[int]:
            """Bytes of each block's cache: sliding, full, sliding."""
            cache = empty_cache(CONFIG, 4, slots, jnp.dtype("float32"), part=PART)
            return [sum(leaf.nbytes for leaf in stacked) for group in cache for stacked in group]

        short, long = sizes(64), sizes(64 * 8)
    per_slot = 2 * 4 * 2 * 4 * 4  # keys and values of 4 rows x 2 heads x 4 dimensions x 4 bytes
    window = slots_of_window(3, PART)
    assert window == 8
    assert short == [window * per_slot, 64 * per_slot, window * per_slot]
    assert long == [short[0], 8 * short[1], short[2]]


@pytest.mark.fast
@pytest.mark.parametrize(("window", "part"), [(1, 1), (3, 1), (3, 4), (4, 4), (5, 4), (512, 512), (128, 128)])
def test_slots_of_a_window_hold_all_that_a_part_sees_and_no_part_wraps(window, part):
    slots = slots_of_window(window, part)
    assert slots % part == 0
    assert window - 1 + part <= slots < window - 1 + 2 * part


@pytest.mark.fast
def test_rows_are_repeated_one_after_the_other_on_their_devices():
    with jax.set_mesh(tiny.mesh_of(2, 2, 2)):
        cache = jax.tree.map(
            lambda zeros: zeros + jax.lax.broadcasted_iota(zeros.dtype, zeros.shape, 1, out_sharding=zeros.sharding),
            empty_cache(CONFIG, 4, 16, jnp.dtype("float32"), part=PART),
        )
        repeated = jax.jit(functools.partial(repeat_rows, times=3))(cache)
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(repeated), strict=True):
        assert after.sharding.spec == before.sharding.spec
        np.testing.assert_array_equal(after, np.repeat(before, 3, axis=1))


def cached_logits(config, shape, tokens, params):
    """The logits after each prompt and after each of the NEW tokens that follow it, (rows, NEW + 1, vocab)."""
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(*shape))

    @jax.jit
    def run(params, prompts, lengths, new):
        decoder = blueprint.decoder(params)
        hidden, cache = steps.prefill(decoder, tiny.FLOAT32, prompts, lengths, COLUMNS + NEW)
        first = steps.next_logits(decoder, hidden, config.vocab_size)

        def step(cache, i):
            positions = lengths + i
            write = CacheWrite(COLUMNS + i, COLUMNS - lengths, positions + 1)
            token = jax.lax.dynamic_slice_in_dim(new, i, 1, 1)
            hidden, cache = decoder.hidden_with_cache(token, positions[:, None], tiny.FLOAT32, cache, write)
            return cache, steps.next_logits(decoder, hidden[:, 0], config.vocab_size)

        _, others = jax.lax.scan(step, cache, jnp.arange(NEW))
        both = jnp.concatenate([first[None], others]).swapaxes(0, 1)
        return jax.sharding.reshard(both, P()), [leaf.shape[-2] for leaf in jax.tree.leaves(cache)]

    prompts = np.full((len(LENGTHS), COLUMNS), 77, np.int32)  # 77: padding, seen by nothing
    for row, length in enumerate(LENGTHS):
        prompts[row, COLUMNS - length :] = tokens[row, :length]
    new = np.take_along_axis(tokens, LENGTHS[:, None] + np.arange(NEW), 1).astype(np.int32)
    with jax.set_mesh(blueprint.mesh):
        logits, slots = run(params(blueprint), *tiny.by_rows(blueprint.mesh, prompts, LENGTHS, new))
    return np.asarray(logits), list(map(int, slots))


def check_cached(rng, config, shape):
    """Cached logits are those of whole forward passes on one device; returns the slots, and all that others need."""
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    arrays, one_device = parameters(blueprint, rng)
    tokens = rng.integers(0, config.vocab_size, (len(LENGTHS), COLUMNS + NEW)).astype(np.int32)
    whole = Uncached(blueprint, one_device).logits(tokens)
    expected = np.take_along_axis(whole, (LENGTHS[:, None] - 1 + np.arange(NEW + 1))[..., None], 1)

    def params(blueprint):
        return tiny.state_of(blueprint, arrays).params

    found, slots = cached_logits(config, shape, tokens, params)
    assert np.all(np.isneginf(found[..., config.vocab_size :]))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found[..., : config.vocab_size], expected, rtol=0, atol=2e-5)
    return slots, tokens, params, expected


def test_logits_over_several_windows_equal_uncached_ones_with_a_rolling_buffer(rng, monkeypatch):
    """Eight parts of the prompts and twelve steps through 8 slots; rows that begin in the first, the last, any part."""
    monkeypatch.setattr(steps, "PREFILL_PART", PART)
    slots, tokens, params, expected = check_cached(rng, LONG, (1, 1, 1))
    assert slots == [8, 8, COLUMNS + NEW, COLUMNS + NEW, 8, 8]
    off_by_one = tiny.with_changes(LONG, sliding_window=4)
    wrong, _ = cached_logits(off_by_one, (1, 1, 1), tokens, params)
    assert np.abs(wrong[..., : LONG.vocab_size] - expected).max() > 1e-2


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_logits_from_latent_vectors_equal_those_from_the_keys_and_values_made_of_them(rng, monkeypatch, shape):
    """One head in the cache, of a latent vector and a rotated key: the matrices go to the queries and the result."""
    monkeypatch.setattr(steps, "PREFILL_PART", PART)
    config = tiny.with_changes(LONG, num_layers=2, **LATENT)
    slots, tokens, params, expected = check_cached(rng, config, shape)
    assert slots == [8, 8, COLUMNS + NEW, COLUMNS + NEW]
    wrong, _ = cached_logits(tiny.with_changes(config, rope_interleaved=True), shape, tokens, params)
    assert np.abs(wrong[..., : config.vocab_size] - expected).max() > 1e-2


@pytest.mark.fast
def test_a_cache_of_latent_vectors_has_one_head():
    with jax.set_mesh(tiny.mesh_of(2, 2, 2)):
        cache = empty_cache(tiny.with_changes(LONG, **LATENT), 4, 64, jnp.dtype("bfloat16"), part=PART)
    assert {leaf.shape[1:] for leaf in cache[0][1]} == {(4, 1, 64, 8 + 4), (4, 1, 64, 8)}
    assert all(leaf.sharding.spec == P(None, BATCH, None, None, None) for leaf in jax.tree.leaves(cache))


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches",
    [
        {"position": "alibi", "attention_sinks": True, "rope_theta": 10_000.0},
        {"position": "learned", "attention_softcap": 3.0, "residual": "parallel", "rope_theta": 10_000.0},
        {"rope_fraction": 0.5, "rope_theta_sliding": 20.0, "qk_norm": "full", "norm_placement": "sandwich"},
        {"moe": EXPERTS},
    ],
    ids=["alibi", "learned", "partial", "experts"],
)
def test_logits_of_other_families_equal_uncached_ones(rng, monkeypatch, switches):
    monkeypatch.setattr(steps, "PREFILL_PART", PART)
    check_cached(rng, tiny.with_changes(LONG, num_layers=2, **switches), (1, 1, 1))


def test_a_step_writes_the_cache_in_place(rng):
    """Beside the donated cache, a step needs less than half of its bytes: the layers' parts are not copied."""
    config = tiny.with_changes(tiny.CONFIG, num_kv_heads=2, num_layers=8, max_length=4096)
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    _, params = parameters(blueprint, rng)

    def step(params, cache, tokens, positions):
        write = CacheWrite(jnp.asarray(7), 7 - positions, positions + 1)
        return blueprint.decoder(params).hidden_with_cache(tokens, positions[:, None], tiny.FLOAT32, cache, write)

    with jax.set_mesh(blueprint.mesh):
        empty = functools.partial(empty_cache, config, 4, 4096, jnp.dtype("float32"), part=1)
        cache = jax.jit(empty)()
        inputs = tiny.by_rows(blueprint.mesh, np.zeros((4, 1), np.int32), np.full(4, 7, np.int32))
        compiled = jax.jit(step, donate_argnums=1).lower(params, cache, *inputs).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2


@pytest.mark.parametrize("shape", tiny.MESHES)
def test_logits_on_a_mesh_equal_uncached_ones_of_one_device(rng, shape):
    check_cached(rng, tiny.with_changes(LONG, num_kv_heads=4, num_layers=2), shape)
