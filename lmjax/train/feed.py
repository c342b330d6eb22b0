"""From rows on the host to global batches on the devices, some steps ahead of the loop."""

import collections
import concurrent.futures
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lmjax.data.batches import Batch
from lmjax.sharding import batch_sharding
from lmjax.train.step import DeviceBatch

Rows = Callable[[int, int], Batch]
"""Rows ``start`` to ``stop`` of a global batch."""


def to_devices(rows: Rows, num_rows: int, length: int, accumulation: int, mesh: Mesh) -> DeviceBatch:
    """A global batch of ``num_rows`` rows as (accumulation, num_rows / accumulation, length) arrays.

    Micro-batch a has the rows r with r mod accumulation = a. A process reads the rows of its own devices only, each of
    them once.
    """
    shape = (accumulation, num_rows // accumulation, length)
    sharding = batch_sharding(mesh, num_leading=1)
    parts: dict[tuple[int, int], Batch] = {}
    devices = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        start, stop, _ = index[1].indices(shape[1])
        devices[device] = start, stop
        if (start, stop) not in parts:
            batch = rows(start * accumulation, stop * accumulation)
            parts[start, stop] = Batch(*(_by_micro_batch(field, accumulation) for field in batch))
    arrays = []
    for i in range(len(Batch._fields)):
        shards = [jax.device_put(parts[part][i], device) for device, part in devices.items()]
        arrays.append(jax.make_array_from_single_device_arrays(shape, sharding, shards))
    return DeviceBatch(*arrays)


def abstract_batch(num_rows: int, length: int, accumulation: int, mesh: Mesh) -> DeviceBatch:
    """The shapes and shardings of what ``to_devices`` gives."""
    sharding = batch_sharding(mesh, num_leading=1)

    def struct(dtype: type[np.generic]) -> Any:
        return jax.ShapeDtypeStruct((accumulation, num_rows // accumulation, length), dtype, sharding=sharding)

    whole, part = struct(np.int32), struct(np.float32)
    return DeviceBatch(tokens=whole, targets=whole, segment_ids=whole, positions=whole, weights=part)


def _by_micro_batch(field: np.ndarray, accumulation: int) -> np.ndarray:
    return np.ascontiguousarray(field.reshape(-1, accumulation, field.shape[-1]).swapaxes(0, 1))


class Feed:
    """Batches of the steps ``start`` to ``stop``, made by a thread that stays up to ``depth`` of them ahead."""

    def __init__(self, make: Callable[[int], DeviceBatch], start: int, stop: int, depth: int = 2):
        self.seconds_waited = 0.0
        """How long the reader has waited for batches so far."""
        self._make = make
        self._steps = iter(range(start, stop))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "feed")
        self._ahead: collections.deque[concurrent.futures.Future[DeviceBatch]] = collections.deque()
        for _ in range(depth):
            self._start_next()

    def __iter__(self) -> Iterator[DeviceBatch]:
        """Raises here what was raised while a batch was made."""
        while self._ahead:
            began = time.perf_counter()
            batch = self._ahead.popleft().result()
            self.seconds_waited += time.perf_counter() - began
            self._start_next()
            yield batch

    def close(self) -> None:
        """End the thread; batches that were made and not read are dropped."""
        self._thread.shutdown(cancel_futures=True)

    def _start_next(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._ahead.append(self._thread.submit(self._make, step))
