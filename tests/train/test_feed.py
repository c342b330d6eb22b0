"""Rows reach the right device in the right micro-batch, each read once, and errors reach the reader."""

import jax
import numpy as np
import pytest

from lmjax.data.batches import Batch
from lmjax.mesh import MeshConfig, make_mesh
from lmjax.train.feed import Feed, to_devices

LENGTH = 4


def numbered(start: int, stop: int) -> Batch:
    """Rows that hold their own number."""
    ids = np.repeat(np.arange(start, stop, dtype=np.int32)[:, None], LENGTH, axis=1)
    return Batch(ids, ids + 1, ids + 2, ids + 3, ids.astype(np.float32))


@pytest.mark.fast
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_micro_batch_a_has_the_rows_r_with_r_mod_accumulation_a(sizes: tuple[int, int, int], accumulation: int):
    data, fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[:8])
    reads = []

    def rows(start: int, stop: int) -> Batch:
        reads.append((start, stop))
        return numbered(start, stop)

    batch = to_devices(rows, 32, LENGTH, accumulation, mesh)
    expected = np.arange(32).reshape(-1, accumulation).T
    np.testing.assert_array_equal(np.asarray(batch.tokens)[:, :, 0], expected)
    for offset, field in enumerate((batch.tokens, batch.targets, batch.segment_ids, batch.positions)):
        np.testing.assert_array_equal(np.asarray(field)[:, :, -1], expected + offset)
    assert batch.weights.dtype == np.float32
    assert sorted(row for start, stop in reads for row in range(start, stop)) == list(range(32))


@pytest.mark.fast
def test_a_feed_gives_its_steps_in_order_and_then_ends():
    feed = Feed(lambda step: step, 3, 7)  # pyright: ignore[reportArgumentType]
    assert list(feed) == [3, 4, 5, 6]
    feed.close()


@pytest.mark.fast
def test_an_error_while_making_a_batch_is_raised_where_it_is_read():
    def make(step: int):
        if step == 2:
            raise ValueError("no such rows")
        return step

    feed = iter(Feed(make, 0, 4))  # pyright: ignore[reportArgumentType]
    assert next(feed) == 0
    assert next(feed) == 1
    with pytest.raises(ValueError, match="no such rows"):
        next(feed)
