"""How tensors of files hold parts of ours: each layout by an example, and read and write as inverses of each other."""

import numpy as np
import pytest

from lmjax.convert.layouts import Experts, Rows, Table

pytestmark = pytest.mark.fast

HEADS, WIDTH, EMBED = 4, 2, 6
QUERY, OUT = (EMBED, HEADS, WIDTH), (HEADS, WIDTH, EMBED)


def key_shape(num_kv_heads: int) -> tuple[int, ...]:
    return (EMBED, num_kv_heads, WIDTH)


CASES = {
    "a linear layer": (Rows(num_inputs=1), [QUERY]),
    "an output projection": (Rows(num_inputs=2), [OUT]),
    "a layer stored (in, out)": (Rows(num_inputs=1, input_first=True), [QUERY]),
    "an output projection stored (in, out)": (Rows(num_inputs=2, input_first=True), [OUT]),
    "a vector": (Rows(num_inputs=0), [(EMBED,)]),
    "a bias of heads": (Rows(num_inputs=0), [(HEADS, WIDTH)]),
    "stacked": (Rows(num_inputs=1), [QUERY, key_shape(2), key_shape(2)]),
    "stacked, stored (in, out)": (Rows(num_inputs=1, input_first=True), [QUERY, key_shape(4), key_shape(4)]),
    "stacked biases": (Rows(num_inputs=0), [(HEADS, WIDTH), (2, WIDTH), (2, WIDTH)]),
    "grouped, as many key heads": (Rows(num_inputs=1, order="grouped"), [QUERY, key_shape(4), key_shape(4)]),
    "grouped, one key head": (Rows(num_inputs=1, order="grouped"), [QUERY, key_shape(1), key_shape(1)]),
    "grouped, two key heads": (Rows(num_inputs=1, order="grouped"), [QUERY, key_shape(2), key_shape(2)]),
    "grouped, of two widths": (Rows(num_inputs=1, order="grouped"), [(EMBED, 4, 3), (EMBED, 4, 2)]),
    "grouped biases": (Rows(num_inputs=0, order="grouped"), [(HEADS, WIDTH), (2, WIDTH), (2, WIDTH)]),
    "experts, outputs first": (Experts(output_first=True), [(3, EMBED, 4)]),
    "experts, inputs first": (Experts(output_first=False), [(3, 4, EMBED)]),
    "a table": (Table(num_rows=5), [(5, EMBED)]),
    "a padded table": (Table(num_rows=5), [(8, EMBED)]),
    "a padded vector": (Table(num_rows=5), [(8,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_and_written_is_the_same_tensor(name, rng):
    layout, shapes = CASES[name]
    tensor = rng.standard_normal(layout.shape(shapes)).astype(np.float32)
    parts = [layout.read(tensor, shapes, number) for number in range(len(shapes))]
    assert [part.shape for part in parts] == shapes
    written = layout.write(parts)
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, tensor)


@pytest.mark.parametrize("name", [name for name in CASES if "grouped" not in name and "padded" not in name])
def test_a_part_is_a_view_where_one_is_possible(name, rng):
    layout, shapes = CASES[name]
    tensor = rng.standard_normal(layout.shape(shapes)).astype(np.float32)
    for number in range(len(shapes)):
        assert np.shares_memory(layout.read(tensor, shapes, number), tensor)


def test_a_linear_layer_is_transposed_and_its_outputs_become_heads(rng):
    weight, x = rng.standard_normal((HEADS * WIDTH, EMBED)), rng.standard_normal(EMBED)
    kernel = Rows(num_inputs=1).read(weight, [QUERY], 0)
    np.testing.assert_allclose(np.einsum("d,dnh->nh", x, kernel), (weight @ x).reshape(HEADS, WIDTH))


def test_the_inputs_of_an_output_projection_are_heads(rng):
    weight, x = rng.standard_normal((EMBED, HEADS * WIDTH)), rng.standard_normal((HEADS, WIDTH))
    kernel = Rows(num_inputs=2).read(weight, [OUT], 0)
    np.testing.assert_allclose(np.einsum("nh,nhd->d", x, kernel), weight @ x.reshape(-1))


def test_conv1d_is_not_transposed_even_where_it_is_square(rng):
    weight = rng.standard_normal((8, 8))
    layout = Rows(num_inputs=1, input_first=True)
    np.testing.assert_array_equal(layout.read(weight, [(8, 8)], 0), weight)
    assert layout.shape([(3, 5)]) == (3, 5)
    assert Rows(num_inputs=1).shape([(3, 5)]) == (5, 3)


def test_experts_lie_one_after_the_other(rng):
    w1, w2 = rng.standard_normal((2, 3 * 4, EMBED))  # of three experts with four hidden numbers
    x, hidden = rng.standard_normal(EMBED), rng.standard_normal(4)
    up = Experts(output_first=True).read(w1, [(3, EMBED, 4)], 0)
    down = Experts(output_first=False).read(w2, [(3, 4, EMBED)], 0)
    np.testing.assert_allclose(x @ up[1], w1[4:8] @ x)
    np.testing.assert_allclose(hidden @ down[1], hidden @ w2[4:8])


def test_stacked_parts_follow_one_another():
    rows = np.arange(8.0)[:, None] * np.ones(3)
    shapes = [(3, 4, 1), (3, 2, 1), (3, 2, 1)]
    found = [Rows(num_inputs=1).read(rows, shapes, number)[0, :, 0].tolist() for number in range(3)]
    assert found == [[0, 1, 2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("num_kv_heads", "expected"),
    [
        (4, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]),  # GPT-NeoX and BLOOM: (heads, 3, head_dim)
        (2, [[0, 1, 4, 5], [2, 6], [3, 7]]),  # Falcon 40B: for each key head, its query heads, itself, its value head
        (1, [[0, 1, 2, 3], [4], [5]]),  # Falcon 7B
    ],
)
def test_grouped_parts_lie_head_by_head(num_kv_heads, expected):
    rows = np.arange(4.0 + 2 * num_kv_heads)[:, None] * np.ones(3)
    shapes = [(3, 4, 1), (3, num_kv_heads, 1), (3, num_kv_heads, 1)]
    layout = Rows(num_inputs=1, order="grouped")
    assert [layout.read(rows, shapes, number)[0, :, 0].tolist() for number in range(3)] == expected
    vectors = [shape[1:] for shape in shapes]
    layout = Rows(num_inputs=0, order="grouped")
    assert [layout.read(rows[:, 0], vectors, number)[:, 0].tolist() for number in range(3)] == expected


def test_rows_of_padding_are_zero_in_ours_and_absent_in_the_file(rng):
    layout = Table(num_rows=5)
    tensor = rng.standard_normal((5, 2))
    padded = layout.read(tensor, [(8, 2)], 0)
    np.testing.assert_array_equal(padded[:5], tensor)
    assert not padded[5:].any()
    assert layout.shape([(8, 2)]) == (5, 2)
    padded[5:] = 1
    np.testing.assert_array_equal(layout.write([padded]), tensor)


def test_rows_before_the_first_position_are_skipped_and_written_as_zeros(rng):
    layout = Table(num_rows=4, before=2)
    tensor = rng.standard_normal((6, 3))
    assert layout.shape([(4, 3)]) == (6, 3)
    np.testing.assert_array_equal(layout.read(tensor, [(4, 3)], 0), tensor[2:])
    written = layout.write([tensor[2:]])
    np.testing.assert_array_equal(written[2:], tensor[2:])
    assert not written[:2].any()
