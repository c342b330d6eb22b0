import jax
import numpy as np

from lmjax.nn.attention import Attention
from tests.tiny import FLOAT32, by_rows, mesh_of

B, T, D, N, K, H, THETA, WINDOW = 2, 6, 12, 4, 2, 4, 100.0, 3


def by_hand(kernels, x, positions, segment_ids):
    """Each head and query on its own, in float64."""
    out = np.zeros((B, T, D))
    frequencies = THETA ** (-np.arange(H // 2) / (H // 2))
    for b, n, t in np.ndindex(B, N, T):

        def rotated(kernel, i, b=b):
            head = x[b, i] @ kernel
            pairs = (head[: H // 2] + 1j * head[H // 2 :]) * np.exp(1j * positions[b, i] * frequencies)
            return np.concatenate([pairs.real, pairs.imag])

        seen = [j for j in range(t + 1) if t - j < WINDOW and segment_ids[b, j] == segment_ids[b, t]]
        query, kv_head = rotated(kernels["query"][:, n], t), n // (N // K)
        scores = np.array([query @ rotated(kernels["key"][:, kv_head], j) / np.sqrt(H) for j in seen])
        weights = np.exp(scores - scores.max())
        values = np.stack([x[b, j] @ kernels["value"][:, kv_head] for j in seen])
        out[b, t] += (weights / weights.sum()) @ values @ kernels["out"][n]
    return out


def test_attention_is_its_formula(rng):
    """Grouped heads, rotary positions, a window and documents, against loops over heads and positions."""
    mesh = mesh_of(1, 1, 1)
    layer = Attention(D, N, K, H, window=WINDOW, rope_theta=THETA, output_std=0.5, key=jax.random.key(2))
    for projection in (layer.query, layer.key, layer.value):
        projection.kernel[...] = projection.kernel[...] * 30
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    segment_ids = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 2]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]], np.int32)
    with jax.set_mesh(mesh):
        attend = jax.jit(lambda layer, *inputs: layer(*inputs, FLOAT32)[0])
        found = attend(layer, *by_rows(mesh, x, positions, segment_ids))
    names = ("query", "key", "value", "out")
    kernels = {name: np.asarray(getattr(layer, name).kernel[...], np.float64) for name in names}
    np.testing.assert_allclose(found, by_hand(kernels, x, positions, segment_ids), rtol=1e-4, atol=1e-4)
    apart = by_hand(kernels, x, positions, np.ones_like(segment_ids))
    assert np.abs(np.asarray(found) - apart).max() > 1e-2
