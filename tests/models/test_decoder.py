import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import InputError
from lmjax.hardware import CPU
from lmjax.models.config import DecoderConfig, Segment
from lmjax.models.remat import RematConfig
from lmjax.nn.attention_latent import LatentConfig
from lmjax.nn.rope_scaling import LinearScaling, LongRopeScaling
from lmjax.train.step import DeviceBatch, loss_sums, row_keys
from tests import tiny
from tests.models.switches import CONFIGS
from tests.tiny import CONFIG, FLOAT32, LOSS

LENGTH = 12
NO_THETA = {"rope_theta": 10_000.0}
"""The default, since any other goes with rotary positions only."""
LATENT = LatentConfig(kv_rank=8, rope_dim=4, value_dim=6)


def dependence(
    config: DecoderConfig, rng: np.random.Generator, segment_ids: np.ndarray, prefix: np.ndarray | None = None
) -> np.ndarray:
    """[t, j]: how strongly the output at position t depends on the token at position j.

    The tokens differ, so that each position has a row of the embedding table to itself, and that row's gradient tells.
    """
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    params = tiny.state_of(blueprint, tiny.random_params(blueprint, rng)).params
    mesh = blueprint.mesh
    tokens, segment_ids = tiny.by_rows(mesh, np.arange(LENGTH, dtype=np.int32)[None], segment_ids)
    prefix = None if prefix is None else tiny.by_rows(mesh, prefix)[0]
    direction = rng.standard_normal(config.embed_dim).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(table, position):
        decoder = blueprint.decoder({**params, "embed": {"table": table}})
        hidden = decoder.hidden(tokens, tokens, segment_ids, FLOAT32, prefix_BT=prefix)
        return jnp.sum(hidden * (jnp.arange(LENGTH) == position)[None, :, None] * direction)

    with jax.set_mesh(mesh):
        rows = [gradient(params["embed"]["table"], t)[:LENGTH] for t in range(LENGTH)]
    return np.abs(np.stack(rows)).max(axis=-1)


@pytest.mark.parametrize(
    ("changes", "view"),
    [
        ({}, LENGTH),
        # Each of two sliding layers looks back 2 positions beyond itself.
        ({"layer_pattern": ("sliding",), "sliding_window": 3}, 5),
        # The third layer is a segment of its own: what is left of the pattern. 2 + 2 positions, and all.
        ({"layer_pattern": ("sliding", "full"), "sliding_window": 3, "num_layers": 3}, LENGTH),
        ({"position": "alibi", "layer_pattern": ("sliding",), "sliding_window": 3, "residual": "parallel"}, 5),
        pytest.param({"position": "learned", "residual": "parallel_shared_norm"}, LENGTH, marks=pytest.mark.slow),
        pytest.param({"position": "sinusoidal", "norm_placement": "post"}, LENGTH, marks=pytest.mark.slow),
        pytest.param(
            {"position": "none", "attention_sinks": True, "attention_softcap": 5.0}, LENGTH, marks=pytest.mark.slow
        ),
        pytest.param({"rope_interleaved": True, "norm_placement": "sandwich"}, LENGTH, marks=pytest.mark.slow),
    ],
)
def test_a_position_sees_itself_and_what_its_layers_let_through(changes, view, rng):
    config = tiny.with_changes(CONFIG, num_kv_heads=2, **NO_THETA, **changes)
    found = dependence(config, rng, np.ones((1, LENGTH), np.int32)) > 0
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    np.testing.assert_array_equal(found, (distance >= 0) & (distance < view))


def test_a_position_sees_nothing_of_another_document(rng):
    segment_ids = np.repeat([1, 2, 0], [4, 6, 2])[None].astype(np.int32)
    found = dependence(CONFIG, rng, segment_ids) > 0
    expected = np.tril(segment_ids[0][:, None] == segment_ids[0]) & (segment_ids[0] > 0)
    np.testing.assert_array_equal(found, expected | np.eye(LENGTH, dtype=bool))  # padding has its own residual stream


@pytest.mark.parametrize("changes", [{}, {"position": "alibi", "attention_sinks": True}], ids=["rope", "alibi"])
def test_the_tokens_of_a_prefix_see_each_other_and_what_follows_does_not_leak(changes, rng):
    config = tiny.with_changes(CONFIG, **NO_THETA, **changes)
    segment_ids = np.repeat([1, 2, 0], [6, 4, 2])[None].astype(np.int32)
    prefix = np.repeat([True, False, True, False], [4, 2, 2, 4])[None]
    found = dependence(config, rng, segment_ids, prefix) > 0
    sees = np.tril(np.ones((LENGTH, LENGTH), bool)) | prefix[0]
    sees &= (segment_ids[0][:, None] == segment_ids[0]) & (segment_ids[0] > 0)
    np.testing.assert_array_equal(found, sees | np.eye(LENGTH, dtype=bool))
    assert found[0, 3]
    assert not found[:4, 4:].any()


def test_a_prefix_with_a_sliding_layer_is_refused(rng):
    config = tiny.with_changes(CONFIG, layer_pattern=("sliding",), sliding_window=3)
    ones = np.ones((1, LENGTH), np.int32)
    with pytest.raises(InputError, match="a prefix goes with a causal mask without a window"):
        dependence(config, rng, ones, ones.astype(bool))


def hidden_states(config, batch, rng):
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    params = tiny.state_of(blueprint, tiny.random_params(blueprint, rng)).params

    @jax.jit
    def run(params, tokens, positions, segment_ids):
        return blueprint.decoder(params).hidden(tokens, positions, segment_ids, FLOAT32)

    with jax.set_mesh(blueprint.mesh):
        return [np.asarray(run(params, *tiny.by_rows(blueprint.mesh, *inputs))) for inputs in batch]


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "rope", "rope_theta": 100.0},
        {"position": "alibi", "num_heads": 6},
        {"position": "learned", "attention_sinks": True},
        pytest.param({"position": "sinusoidal"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: changes["position"],
)
def test_a_packed_row_equals_its_documents_run_apart(changes, rng):
    config = tiny.with_changes(CONFIG, **(NO_THETA | changes), layer_pattern=("sliding", "full"), sliding_window=4)
    first, second = 5, 7
    tokens = rng.integers(0, config.vocab_size, (1, LENGTH)).astype(np.int32)
    segment_ids = np.repeat([1, 2], [first, second])[None].astype(np.int32)
    restarted = np.concatenate([np.arange(first), np.arange(second)])[None].astype(np.int32)
    ones, straight = np.ones_like(tokens), np.arange(LENGTH, dtype=np.int32)[None]
    alone = np.roll(tokens, -first, axis=1)  # the second document from position 0 on; causality hides what follows
    packed, apart_1, apart_2, mixed = hidden_states(
        config,
        [
            (tokens, restarted, segment_ids),
            (tokens, straight, ones),
            (alone, straight, ones),
            (tokens, restarted, ones),
        ],
        rng,
    )
    apart = np.concatenate([apart_1[:, :first], apart_2[:, :second]], axis=1)
    np.testing.assert_allclose(packed, apart, rtol=1e-5, atol=1e-5)
    assert np.abs(mixed - apart)[:, first:].max() > 1e-2


@pytest.mark.parametrize(
    "config",
    [
        tiny.with_changes(
            CONFIG, num_layers=5, layer_pattern=("sliding", "full"), sliding_window=3, qkv_bias=True, dropout=0.3
        ),
        *(pytest.param(config, marks=pytest.mark.slow) for config in CONFIGS.values()),
    ],
    ids=["sliding, full", *CONFIGS],
)
def test_scan_equals_unrolled(config, rng):
    """And the block's input kept equals everything kept; dropout, where there is some, zeroes the same."""
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    params = tiny.state_of(blueprint, tiny.random_params(blueprint, rng)).params
    batch = DeviceBatch(*tiny.by_rows(blueprint.mesh, *(field[:2] for field in tiny.packed_batch(rng, config))))

    def loss(params, execution):
        keys = row_keys(jax.random.key(0), 1, 2)[0]
        return loss_sums(blueprint.decoder(params), batch, execution, LOSS, keys)[0].loss

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    unrolled = tiny.execution(scan_layers=False, remat=RematConfig(policy="none"))
    with jax.set_mesh(blueprint.mesh):
        expected, expected_grads = gradient(params, FLOAT32)
        found, grads = gradient(params, unrolled)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    tiny.assert_trees_close(grads, expected_grads, 1e-5)
    if config.segments[0].repeats == 1:
        return
    swapped = jax.tree.map(lambda leaf: leaf[::-1], params["segments"][0])  # the depth of a layer matters
    with jax.set_mesh(blueprint.mesh):
        other, _ = gradient({**params, "segments": {**params["segments"], 0: swapped}}, FLOAT32)
    assert abs(float(other - expected)) > 1e-3


@pytest.mark.fast
@pytest.mark.parametrize(
    ("num_layers", "pattern", "segments"),
    [
        (4, ("full",), (Segment(("full",), 4),)),
        (4, ("sliding", "full"), (Segment(("sliding", "full"), 2),)),
        (5, ("sliding", "sliding", "full"), (Segment(("sliding", "sliding", "full"), 1), Segment(("sliding",) * 2, 1))),
        (1, ("sliding", "full"), (Segment(("sliding",), 1),)),
    ],
)
def test_segments_are_whole_patterns_and_the_rest(num_layers, pattern, segments):
    window = 3 if "sliding" in pattern else None
    config = tiny.with_changes(CONFIG, num_layers=num_layers, layer_pattern=pattern, sliding_window=window)
    assert [(tuple(kind.attention for kind in part), repeats) for part, repeats in config.segments] == list(segments)
    kinds = [kind.attention for segment in config.segments for _ in range(segment.repeats) for kind in segment.pattern]
    assert kinds == [kind.attention for kind in config.blocks]
    assert kinds == [pattern[i % len(pattern)] for i in range(num_layers)]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": None, "embed_dim": 36}, "36 mod 8 = 4"),
        ({"num_kv_heads": 3}, "num_heads 8 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"layer_pattern": ()}, "layer_pattern is empty"),
        ({"sliding_window": 4}, "sliding_window is 4"),
        ({"layer_pattern": ("sliding",)}, "sliding_window is None"),
        ({"layer_pattern": ("local",)}, "'full' or 'sliding'"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"mlp_dim": "48"}, "valid integer"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"init": "xavier"}, "'gpt2' or 'olmo2'"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0; it has to be above 0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0"),
        ({"attention_softcap": 0.0}, "attention_softcap is 0.0"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0"),
        ({"qkv_clip": -1.0}, "qkv_clip is -1.0"),
        ({"query_scale": 0.0}, "query_scale is 0.0"),
        ({"residual_multiplier": 0.0}, "residual_multiplier is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0; it has to be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"norm": "batch"}, "'rms' or 'layer'"),
        ({"norm_bias": True}, "norm_bias is true and norm is rms"),
        ({"norm_placement": "sandwich", "residual": "parallel"}, "residual is parallel and norm_placement is sandwich"),
        ({"norm_placement": "post", "residual": "parallel_shared_norm"}, "set norm_placement=pre"),
        ({"activation": "swish"}, "'silu', 'gelu', 'gelu_tanh' or 'relu'"),
        ({"position": "alibi"}, "rope_theta has an effect with position=rope only, not alibi"),
        ({"position": "none", **NO_THETA, "rope_fraction": 0.5}, "rope_fraction has an effect with position=rope only"),
        ({"position": "learned", **NO_THETA, "rope_interleaved": True}, "rope_interleaved has an effect"),
        ({"position": "alibi", **NO_THETA, "rope_scaling": LinearScaling(factor=2.0)}, "rope_scaling has an effect"),
        ({"alibi_max": 6.0}, "alibi_max has an effect with position=alibi only, not rope"),
        ({"alibi_scale": 2.0}, "alibi_scale has an effect with position=alibi only, not rope"),
        ({"position": "sinusoidal", **NO_THETA, "embed_dim": 33}, "embed_dim is 33"),
        ({"rope_fraction": 1.5}, "rope_fraction is 1.5; it is a part of a head, so at most 1"),
        ({"rope_fraction": 0.25}, "head_dim x rope_fraction, is 1"),
        ({"rope_fraction": 0.1}, "head_dim x rope_fraction, is 0"),
        ({"rope_theta_sliding": 10.0}, "rope_theta_sliding has an effect in sliding blocks only"),
        ({"latent": LATENT}, "latent.rope_dim is 4 and head_dim 4: give a head_dim above rope_dim"),
        ({"latent": LATENT, "head_dim": None}, "latent.rope_dim is 4 and head_dim None"),
        ({"latent": LATENT, "head_dim": 8, "num_kv_heads": 2}, "num_kv_heads is 2 and latent is given"),
        ({"latent": LATENT, "head_dim": 8, "qk_norm": "head"}, "qk_norm is head and latent is given"),
        ({"latent": LATENT, "head_dim": 8, "rope_fraction": 0.5}, "rope_fraction is 0.5 and latent is given"),
        ({"latent": LATENT, "head_dim": 8, "position": "none", **NO_THETA}, "position is none and latent is given"),
        ({"latent": dataclasses.replace(LATENT, rope_dim=3), "head_dim": 8}, "latent.rope_dim is 3; rotary positions"),
        (
            {
                "rope_scaling": LongRopeScaling(
                    short_factors=(1.0,), long_factors=(2.0,), original_length=8, attention_factor=1.0
                )
            },
            "rope_scaling has 1 factors and a head 2 rotated pairs",
        ),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        tiny.with_changes(CONFIG, **changes)


@pytest.mark.fast
def test_what_attention_asks_of_a_kernel_is_that_of_the_kind_of_block():
    config = CONFIGS["rope"]
    wanted = functools.partial(DecoderConfig.wanted_attention, hardware=CPU, length=8, dtype="float32")
    assert wanted(config, "full").features == {"causal", "segments", "softcap", "sinks"}
    assert wanted(config, "sliding").features == {"causal", "segments", "softcap", "sinks", "window"}
    assert wanted(config, "sliding", segments=False, prefix=True).features == {
        "causal",
        "prefix",
        "softcap",
        "sinks",
        "window",
    }
    assert wanted(CONFIGS["alibi"], "full").features == {"causal", "segments", "alibi", "sinks"}
    assert wanted(CONFIG, "full").features == {"causal", "segments"}
    latent = wanted(CONFIGS["latent"], "full")
    assert (latent.head_dim, latent.value_dim) == (CONFIGS["latent"].head_width, CONFIGS["latent"].latent.value_dim)
