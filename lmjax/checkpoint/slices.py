"""A step's arrays in slices: written and read without any of them being whole in memory.

What is written is what ``save`` writes: Orbax's PyTree in OCDBT, one part, and our manifest last. ``restore`` reads it
onto any mesh.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from lmjax.checkpoint import store
from lmjax.checkpoint.layout import CHUNK_BYTES, MIN_ROW_BYTES, absolute
from lmjax.checkpoint.manifest import LeafEntry, Manifest, describe_files, write_manifest
from lmjax.checkpoint.restore import find_good
from lmjax.checkpoint.save import SAVE_ERRORS
from lmjax.errors import InputError
from lmjax.paths import is_remote

Index = tuple[slice | int, ...]

WRITE_COPIES = 3
"""Times a slice is in memory while it is written: as it was read, encoded, and on its way to the file."""
READ_COPIES = 3
"""The same of a chunk that is read."""
CACHE_BYTES = 1 << 27


class SlicedArray(Protocol):
    """An array of which parts can be had."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def stored(self) -> np.dtype:
        """What it is written in: each value is one of its dtype in the state, in fewer bits perhaps."""
        ...

    @property
    def order(self) -> Literal["C", "F"]:
        """In which its layers are read and written fastest."""
        ...

    def read_stored(self, index: Index = ()) -> np.ndarray:
        """The values at ``index`` in that dtype; called from several threads."""
        ...


@dataclasses.dataclass(frozen=True)
class _Value:
    """What Orbax takes for the leaf of a tree."""

    array: SlicedArray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.stored

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _SliceHandler(ocp.type_handlers.NumpyHandler):
    """Writes an array chunk by chunk."""

    def __init__(self, at_once: int, written: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._turns = asyncio.Semaphore(at_once)
        self._threads = ThreadPoolExecutor(at_once, "slices")
        self._written = written
        self._error: BaseException | None = None

    def close(self) -> None:
        self._threads.shutdown()

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        await super()._background_serialize(values, infos, args)
        if self._error is not None:  # now that nothing writes any more
            raise self._error

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        chunks = chunk_shape(value.shape, value.dtype.itemsize)
        # A chunk of one layer lies as its values do where they are from, so that neither side has to transpose it.
        order = value.array.order if chunks[:1] == (1,) else "C"
        tspec["metadata"] |= {"chunks": chunks, "compressor": None, "order": order}
        for files in (tspec["kvstore"]["base"], tspec["kvstore"]["manifest"]):
            files["file_io_sync"] = False  # at the end, and not after each slice
        with self._kept():
            target = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            indices = _grid(value.shape, _slice_shape(value.shape, value.dtype.itemsize))
            await asyncio.gather(*(self._write(value.array, index, target) for index in indices))

    async def _write(self, array: SlicedArray, index: Index, target: ts.TensorStore) -> None:
        async with self._turns:
            with self._kept():
                if self._error is None:
                    loop = asyncio.get_running_loop()
                    values = await loop.run_in_executor(self._threads, array.read_stored, index)
                    await target[index].write(values, can_reference_source_data_indefinitely=True)
                    self._written(values.nbytes)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep the first error for ``_background_serialize``; the slices that are not begun are left out."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - raised by _background_serialize, when nothing writes any more
            self._error = self._error or error


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of an array's chunks, CHUNK_BYTES at most: a layer of a stack of matrices apart from the others, and
    equal parts of anything else, cut along its first dimensions."""
    row = itemsize * math.prod(shape[1:])
    limit = max(row, MIN_ROW_BYTES) if len(shape) > 2 else CHUNK_BYTES
    return _block(shape, itemsize, min(limit, CHUNK_BYTES))


def slice_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of what is written of an array in one go."""
    return itemsize * math.prod(_slice_shape(shape, itemsize))


def _slice_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """As many chunks as CHUNK_BYTES allow: each write ends in a sync of the disk."""
    chunk = chunk_shape(shape, itemsize)
    number = max(1, CHUNK_BYTES // (itemsize * math.prod(chunk)))
    return (min(shape[0], chunk[0] * number), *chunk[1:]) if shape else ()


def _block(shape: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, ...]:
    block: list[int] = []
    for dim, size in enumerate(shape):
        unit = itemsize * math.prod(shape[dim + 1 :]) * math.prod(block)
        most = max(1, min(size, limit // unit))
        fewest = -(-size // most)
        # Equal parts, which the shards of a mesh can be made of: the file has the last one in full in any case.
        parts = next((number for number in range(fewest, 2 * fewest) if size % number == 0), fewest)
        block.append(-(-size // parts))
    return tuple(block)


def _grid(shape: tuple[int, ...], step: tuple[int, ...]) -> Iterator[Index]:
    """Blocks of this shape, from the first to the last."""
    starts = [range(0, size, width) for size, width in zip(shape, step, strict=True)]
    for corner in itertools.product(*starts):
        ends = (min(start + width, size) for start, width, size in zip(corner, step, shape, strict=True))
        yield tuple(itertools.starmap(slice, zip(corner, ends, strict=True)))


def write_step(
    directory: epath.PathLike,
    step: int,
    part: str,
    arrays: Mapping[str, SlicedArray],
    metadata: dict[str, Any],
    *,
    dtype: str,
    num_at_once: int,
    written: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write ``arrays``, by their paths in ``part``, as checkpoint ``step`` of a directory on this machine's disk.

    ``dtype`` is what they are in the state, and what ``restore`` makes them. ``num_at_once`` slices are in memory, each
    WRITE_COPIES times its CHUNK_BYTES at most; nothing is compressed. ``written`` is called with the bytes of each
    slice. One process calls it. Raises InputError where the directory cannot be written to; what is there then has no
    manifest.
    """
    path = absolute(directory) / str(step)
    handler = _SliceHandler(num_at_once, written)
    unused = ocp.type_handlers.ArrayHandler(array_metadata_store=None)  # Orbax warns where there is none
    registry = ocp.type_handlers.create_type_handler_registry((_Value, handler), (jax.Array, unused))
    tree = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    composite = ocp.CompositeCheckpointHandler(**{part: tree})  # pyright: ignore[reportArgumentType]
    values = {f"{part}/{name}": _Value(array) for name, array in arrays.items()}
    try:
        with ocp.Checkpointer(composite) as checkpointer:
            checkpointer.save(path, args=ocp.args.Composite(**{part: ocp.args.PyTreeSave(values)}))
        leaves = {name: LeafEntry(value.shape, dtype) for name, value in values.items()}
        files = describe_files(path, sync=True)
        metadata = json.loads(json.dumps(metadata))
        write_manifest(path, Manifest(step=step, metadata=metadata, leaves=leaves, files=files))
    except SAVE_ERRORS as error:
        raise InputError(f"{path}: the checkpoint cannot be written: {_first_line(error)}; make room") from error
    finally:
        handler.close()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(" [")[0].rstrip(".")


class StepReader:
    """One part of a step that was verified, read in slices."""

    def __init__(self, directory: epath.Path, manifest: Manifest, part: str, cache_bytes: int):
        """``directory`` has the files of the step, on this machine's disk."""
        self.step = manifest.step
        self.metadata = manifest.metadata
        prefix = f"{part}/"
        self.leaves: dict[str, LeafEntry] = {
            name.removeprefix(prefix): leaf for name, leaf in manifest.leaves.items() if name.startswith(prefix)
        }
        """By path in the part, such as ``embed/table``."""
        self._directory = directory / part
        self._prefix = prefix
        direct = self._open(self.leaves, 0)
        shared = [name for name, array in direct.items() if _has_several_layers(array)]
        self._arrays = direct | self._open(shared, cache_bytes)

    def _open(self, names: Iterable[str], cache_bytes: int) -> dict[str, ts.TensorStore]:
        context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": cache_bytes},
                "cache_pool#ocdbt": {"total_bytes_limit": 1 << 24},
                "file_io_concurrency": {"limit": 2},
                "data_copy_concurrency": {"limit": 2},
            }
        )
        base = {"driver": "file", "path": f"{self._directory}/"}
        kvstore = {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#ocdbt"}
        options = {"fill_missing_data_reads": False, "recheck_cached_data": False}
        opened = {
            name: ts.open(
                {"driver": "zarr", "kvstore": kvstore | {"path": f"{self._prefix}{name}"}, **options},
                open=True,
                read=True,
                context=context,
            )
            for name in names
        }
        return {name: future.result() for name, future in opened.items()}

    def chunk(self, path: str) -> tuple[int, ...]:
        """The part of an array that is read in one go: any value of it takes as much memory."""
        chunk = self._arrays[path].chunk_layout.read_chunk.shape
        assert chunk is not None, "zarr arrays have chunks"
        return tuple(size for size in chunk if size is not None)

    def read(self, path: str, index: Index = ()) -> np.ndarray:
        """The values of an array at ``index``; a new array. READ_COPIES of it are in memory meanwhile."""
        return self.read_stored(path, index).astype(self.leaves[path].dtype, copy=False)

    def read_stored(self, path: str, index: Index = ()) -> np.ndarray:
        """The same in the dtype that is on the disk, which may have fewer bits, and in the order of its chunks."""
        array = self._arrays[path]
        is_reversed = array.chunk_layout.inner_order == (*reversed(range(array.ndim)),)
        return array[index].read(order="F" if is_reversed and array.ndim > 1 else "C").result()


def _has_several_layers(array: ts.TensorStore) -> bool:
    """Whether a chunk is read again for the next layer."""
    chunk = array.chunk_layout.read_chunk.shape
    return array.ndim > 2 and chunk is not None and chunk[0] != 1


@contextlib.contextmanager
def open_step(
    directory: epath.PathLike, *, step: int | None = None, part: str = "params", cache_bytes: int = CACHE_BYTES
) -> Iterator[StepReader]:
    """The newest good step in ``directory``, or ``step``, for reading one part of it in slices.

    So many bytes of chunks are kept for the next read, which pays where one chunk has several layers.
    Its files are verified first; those of an object store are fetched to this machine's disk. One process calls it.
    Raises InputError where there is no good step.
    """
    directory = absolute(directory)
    found = find_good(directory, step, part)
    if found is None:
        raise InputError(f"{directory}: no checkpoint; give a run, or a directory of checkpoints")
    path = directory / str(found.manifest.step)
    with contextlib.ExitStack() as stack:
        if is_remote(path):
            path = stack.enter_context(store.fetched(found.manifest.files, found.manifest.of_part(part)))
        yield StepReader(path, found.manifest, part, cache_bytes)
