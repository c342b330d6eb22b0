import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from lmjax.nn.attention import Attention, AttentionOptions, Rows
from lmjax.nn.norm import Norm
from lmjax.nn.position import Rope, alibi_slopes
from tests.tiny import FLOAT32, by_rows, mesh_of

B, T, D, N, K, H = 2, 6, 12, 4, 2, 4
POSITIONS = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]], np.int32)
SEGMENT_IDS = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 2]], np.int32)
PREFIX = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0]], bool)

OPTIONS = AttentionOptions(
    embed_dim=D,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    window=3,
    rope=Rope(width=H, theta=100.0),
    slopes=None,
    qk_norm=None,
    norm="rms",
    norm_epsilon=1e-2,
    norm_unit_offset=False,
    query_scale=0.5,
    softcap=None,
    sinks=False,
    qkv_clip=None,
    qkv_bias=False,
    out_bias=False,
)
CAPPED = dataclasses.replace(
    OPTIONS,
    rope=Rope(width=2, theta=100.0),
    qk_norm="head",
    norm_unit_offset=True,
    query_scale=1.5,
    softcap=2.0,
    sinks=True,
    qkv_bias=True,
    out_bias=True,
)
BIASED = dataclasses.replace(
    OPTIONS, window=None, rope=None, slopes=tuple(3.0 * alibi_slopes(N)), qk_norm="full", norm="layer", qkv_clip=1.5
)


def parameters(layer: Attention) -> dict[str, Any]:
    """In float64, by name; biases and sinks that are not there are zero, or minus infinity."""
    found = {}
    for name in ("query", "key", "value", "out"):
        projection = getattr(layer, name)
        found[name] = np.asarray(projection.kernel[...], np.float64)
        shape = found[name].shape[1:] if name != "out" else (D,)
        found[f"{name}.bias"] = np.zeros(shape) if projection.bias is None else np.asarray(projection.bias[...])
    for name in ("query_norm", "key_norm"):
        norm = getattr(layer, name)
        found[name] = None if norm is None else np.asarray(norm.scale[...], np.float64)
    found["sinks"] = np.full(N, -np.inf) if layer.sinks is None else np.asarray(layer.sinks[...], np.float64)
    return found


def normed(x, scale, options: AttentionOptions):
    """(..., heads, head_dim) over as many last dimensions as ``scale`` has."""
    dims = tuple(range(-scale.ndim, 0))
    if options.norm == "layer":
        x = x - x.mean(dims, keepdims=True)
    offset = 1 if options.norm_unit_offset else 0
    return x / np.sqrt((x * x).mean(dims, keepdims=True) + options.norm_epsilon) * (scale + offset)


def turned(x, positions, rope: Rope):
    """The first ``width`` dimensions of (B, T, heads, head_dim) as complex numbers times exp(i angle)."""
    half = rope.width // 2
    angles = positions[:, :, None, None] * rope.theta ** (-np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half : rope.width]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag, x[..., rope.width :]], axis=-1)


def by_hand(given: dict[str, Any], options: AttentionOptions, x, prefix=None, segment_ids=SEGMENT_IDS):
    """Each head and query on its own, in float64."""
    q, k, v = (np.tensordot(x, given[name], 1) + given[f"{name}.bias"] for name in ("query", "key", "value"))
    if options.qk_norm is not None:
        q, k = normed(q, given["query_norm"], options), normed(k, given["key_norm"], options)
    if options.qkv_clip is not None:
        q, k, v = (np.clip(array, -options.qkv_clip, options.qkv_clip) for array in (q, k, v))
    if options.rope is not None:
        q, k = turned(q, POSITIONS, options.rope), turned(k, POSITIONS, options.rope)
    slopes = np.zeros(N) if options.slopes is None else np.array(options.slopes)
    out = np.zeros((B, T, D)) + given["out.bias"]
    for b, n, t in np.ndindex(B, N, T):
        near = range(t + 1) if options.window is None else range(max(0, t + 1 - options.window), t + 1)
        late = [] if prefix is None else [j for j in range(t + 1, T) if prefix[b, j]]
        seen = [j for j in (*near, *late) if segment_ids[b, j] == segment_ids[b, t]]
        scores = np.array([options.query_scale * q[b, t, n] @ k[b, j, n // (N // K)] for j in seen])
        if options.softcap is not None:
            scores = options.softcap * np.tanh(scores / options.softcap)
        scores -= slopes[n] * np.abs(t - np.array(seen))
        weights = np.exp(scores) / (np.exp(scores).sum() + np.exp(given["sinks"][n]))
        out[b, t] += weights @ v[b, seen, n // (N // K)] @ given["out"][n]
    return out


def norms(layer: Attention) -> list[Norm]:
    return [norm for norm in (layer.query_norm, layer.key_norm) if norm is not None]


def make(options: AttentionOptions, rng: np.random.Generator) -> Attention:
    """An attention in which everything is random and large enough to be seen."""
    layer = Attention(options, output_std=0.5, key=jax.random.key(2))
    for projection in (layer.query, layer.key, layer.value):
        projection.kernel[...] = projection.kernel[...] * 30
    named = [layer.query.bias, layer.key.bias, layer.value.bias, layer.out.bias, layer.sinks]
    named += [norm.scale for norm in norms(layer)]
    for parameter in named:
        if parameter is not None:
            parameter[...] = rng.standard_normal(parameter.shape).astype(np.float32)
    return layer


def run(layer: Attention, options: AttentionOptions, x: np.ndarray, prefix=None) -> np.ndarray:
    mesh = mesh_of(1, 1, 1)

    @jax.jit
    def attend(layer, x, positions, segment_ids, prefix):
        rotation = None if options.rope is None else options.rope.rotation(positions)
        return layer(x, Rows(positions, segment_ids, prefix), rotation, FLOAT32)[0]

    with jax.set_mesh(mesh):
        placed = by_rows(mesh, x, POSITIONS, SEGMENT_IDS)
        return np.asarray(attend(layer, *placed, None if prefix is None else by_rows(mesh, prefix)[0]))


CHANGES: dict[str, list[dict[str, Any]]] = {
    "plain": [{"window": 4}, {"rope": Rope(width=H, theta=10.0)}, {"query_scale": 0.4}],
    "capped": [{"softcap": 3.0}, {"norm_unit_offset": False}, {"norm_epsilon": 0.1}, {"rope": OPTIONS.rope}],
    "biased": [
        {"slopes": None},
        {"slopes": tuple(2.0 * alibi_slopes(N))},
        {"qkv_clip": 1.6},
        {"norm": "rms"},
        {"qkv_clip": None},
    ],
}


@pytest.mark.parametrize(("name", "options"), [("plain", OPTIONS), ("capped", CAPPED), ("biased", BIASED)])
def test_attention_is_its_formula(rng, name, options):
    """Against loops over heads and positions; and against the same with one option, or one parameter, changed."""
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    layer = make(options, rng)
    found, given = run(layer, options, x), parameters(layer)
    np.testing.assert_allclose(found, by_hand(given, options, x), rtol=1e-4, atol=1e-4)
    others = [by_hand(given, options, x, segment_ids=np.ones_like(SEGMENT_IDS))]
    others += [by_hand(given, dataclasses.replace(options, **change), x) for change in CHANGES[name]]
    for key, value in given.items():
        if value is not None and np.any(value != np.zeros(())) and np.all(np.isfinite(value)):
            others.append(by_hand(given | {key: np.roll(value, 1)}, options, x))
    for other in others:
        assert np.abs(found - other).max() > 1e-2


def test_tokens_of_a_prefix_are_seen_by_all_of_their_document(rng):
    options = dataclasses.replace(CAPPED, window=None)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    layer = make(options, rng)
    found, given = run(layer, options, x, PREFIX), parameters(layer)
    np.testing.assert_allclose(found, by_hand(given, options, x, PREFIX), rtol=1e-4, atol=1e-4)
    assert np.abs(found - by_hand(given, options, x)).max() > 1e-2


@pytest.mark.fast
def test_parameters_are_those_that_the_options_ask_for():
    plain = Attention(OPTIONS, output_std=0.5, key=jax.random.key(0))
    assert (plain.query_norm, plain.key_norm, plain.sinks, plain.query.bias, plain.out.bias) == (None,) * 5
    assert plain.query.kernel[...].std() < 0.05 < plain.out.kernel[...].std()
    capped = Attention(CAPPED, output_std=0.5, key=jax.random.key(0))
    assert capped.sinks is not None
    assert capped.sinks.axes == ("heads",)
    assert not np.any(capped.sinks[...])
    assert [norm.scale.shape for norm in norms(capped)] == [(H,), (H,)]
    biases = [layer.bias for layer in (capped.query, capped.key, capped.value, capped.out)]
    assert [bias.axes for bias in biases if bias is not None] == [
        ("heads", "head_dim"),
        *[("kv_heads", "head_dim")] * 2,
        ("norm",),
    ]
    assert not any(np.any(bias[...]) for bias in biases if bias is not None)
    full = Attention(BIASED, output_std=0.5, key=jax.random.key(0))
    assert [norm.scale.shape for norm in norms(full)] == [(N, H), (K, H)]
    assert [norm.scale.axes[0] for norm in norms(full)] == ["heads", "kv_heads"]
