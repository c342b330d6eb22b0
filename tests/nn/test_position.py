import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.nn.position import Rope, alibi_slopes, document_lengths, sinusoids
from lmjax.nn.rope_scaling import DynamicScaling
from tests.tiny import mesh_of

THETA = 100.0


def rotated(rope: Rope, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.asarray(rope.rotate(jnp.asarray(x), rope.rotation(jnp.asarray(positions, jnp.int32))), np.float32)


def turned(x: np.ndarray, position: int, width: int, interleaved: bool) -> np.ndarray:
    """One head rotated by hand: pair i of the first ``width`` dimensions by position / theta^(2i / width)."""
    y = x.copy()
    for i in range(width // 2):
        one, other = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        pair = (x[one] + 1j * x[other]) * np.exp(1j * position / THETA ** (2 * i / width))
        y[one], y[other] = pair.real, pair.imag
    return y


@pytest.mark.fast
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [6, 4, 2])
def test_rotation_is_its_formula(width, interleaved, rng):
    x = rng.standard_normal((2, 3, 2, 6)).astype(np.float32)
    positions = np.array([[0, 1, 7], [3, 0, 1]])
    found = rotated(Rope(width=width, theta=THETA, interleaved=interleaved), x, positions)
    for b, t, n in np.ndindex(2, 3, 2):
        expected = turned(x[b, t, n], positions[b, t], width, interleaved)
        np.testing.assert_allclose(found[b, t, n], expected, atol=1e-5)
    assert np.abs(found[0, 1, 0] - turned(x[0, 1, 0], 2, width, interleaved)).max() > 1e-2
    if width > 2:
        assert np.abs(found[0, 2, 0] - turned(x[0, 2, 0], 7, width, not interleaved)).max() > 1e-2


@pytest.mark.fast
def test_the_rest_of_a_head_stays(rng):
    x = rng.standard_normal((1, 2, 1, 6)).astype(np.float32)
    found = rotated(Rope(width=4, theta=THETA), x, np.array([[5, 9]]))
    assert np.array_equal(found[..., 4:], x[..., 4:])
    assert not np.isclose(found[..., :4], x[..., :4]).any()


@pytest.mark.fast
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved, rng):
    q, k = (rng.standard_normal((1, 1, 1, 8)).astype(np.float32) for _ in range(2))
    rope = Rope(width=8, theta=THETA, interleaved=interleaved)

    def score(query_position: int, key_position: int) -> float:
        return float(
            (rotated(rope, q, np.array([[query_position]])) * rotated(rope, k, np.array([[key_position]]))).sum()
        )

    assert score(9, 4) == pytest.approx(score(5, 0), rel=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.fast
def test_angles_are_computed_in_float32():
    """In bfloat16, position 1001 would be 1000."""
    rope = Rope(width=2, theta=THETA)
    x = jnp.ones((1, 2, 1, 2), jnp.bfloat16)
    found = np.asarray(rope.rotate(x, rope.rotation(jnp.array([[1000, 1001]]))), np.float32)[0, :, 0, 0]
    np.testing.assert_allclose(found, np.cos([1000, 1001]) - np.sin([1000, 1001]), atol=2**-7)


@pytest.mark.fast
def test_sinusoids_are_their_formula():
    """Even dimensions are sines, odd ones cosines, of position / 10000^(2i / width)."""
    positions, width = np.array([[0, 1, 2], [50, 7, 0]]), 6
    with jax.set_mesh(mesh_of(1, 1, 1)):
        found = np.asarray(sinusoids(jnp.asarray(positions), width))
    for b, t in np.ndindex(2, 3):
        for i in range(width // 2):
            angle = positions[b, t] / 10_000 ** (2 * i / width)
            assert found[b, t, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert found[b, t, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1


@pytest.mark.fast
def test_slopes_are_the_geometric_series_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(1), [2.0**-8], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(6), [2.0**-i for i in (2, 4, 6, 8, 1, 3)], rtol=1e-6)


HEADS = [1, 2, 3, 5, 6, 7, 12, 16, 20, 71, 112]


@pytest.mark.parametrize("num_heads", HEADS)
def test_slopes_are_those_of_bloom(num_heads):
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    expected = bloom._get_alibi_slopes(num_heads, torch.device("cpu")).numpy()
    np.testing.assert_allclose(alibi_slopes(num_heads), expected, rtol=1e-5)


@pytest.mark.parametrize("largest", [8, 16])
@pytest.mark.parametrize("num_heads", HEADS)
def test_slopes_are_those_of_mpt(num_heads, largest):
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    expected = -mpt.build_mpt_alibi_tensor(num_heads, 2, alibi_bias_max=largest)[:, 0, 0].numpy()  # at distance 1
    np.testing.assert_allclose(alibi_slopes(num_heads, largest), expected, rtol=1e-5)


@pytest.mark.fast
def test_documents_of_a_packed_row_are_as_long_as_alone():
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1]])
    assert document_lengths(positions, segment_ids).tolist() == [[3, 3, 3, 2, 2, 1, 1], [7] * 7]


@pytest.mark.fast
def test_angles_of_a_document_do_not_depend_on_what_is_packed_beside_it():
    """With a scaling that goes by the length; without the documents' lengths they do depend."""
    rope = Rope(width=8, theta=100.0, scaling=DynamicScaling(factor=4.0, original_length=3))
    positions, segment_ids = jnp.array([[*range(9), 0, 1]]), jnp.array([[1] * 9 + [2] * 2])
    packed = rope.rotation(positions, document_lengths(positions, segment_ids))
    alone = rope.rotation(jnp.array([[0, 1]]))
    np.testing.assert_allclose(packed.cos_BTR[:, 9:], alone.cos_BTR, rtol=1e-6)
    np.testing.assert_allclose(packed.sin_BTR[:, :9], rope.rotation(positions[:, :9]).sin_BTR, rtol=1e-6)
    assert np.abs(rope.rotation(positions).cos_BTR[:, 9:] - alone.cos_BTR).max() > 0.03
