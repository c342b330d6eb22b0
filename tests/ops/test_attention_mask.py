import numpy as np
import pytest

from lmjax.errors import InputError
from lmjax.ops.attention_mask import Mask, same_segment

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("mask", "sees"),
    [
        (Mask(), lambda i, j: j <= i),
        (Mask(causal=False), lambda i, j: True),
        (Mask(window=1), lambda i, j: i == j),
        (Mask(window=3), lambda i, j: i - 3 < j <= i),
    ],
)
def test_visible_keys(mask, sees):
    queries, keys = np.arange(2, 9), np.arange(6)
    assert mask.visible(queries[:, None] - keys).tolist() == [[sees(i, j) for j in keys] for i in queries]


def test_padding_sees_nothing_and_is_not_seen():
    segments = np.array([[1, 1, 2, 0]])
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert same_segment(segments, segments)[0].astype(int).tolist() == expected


@pytest.mark.parametrize(
    ("fields", "words"), [({"window": 0}, "window is 0"), ({"window": 4, "causal": False}, "needs causal=True")]
)
def test_impossible_masks_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        Mask(**fields)
