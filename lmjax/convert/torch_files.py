"""Files that torch.save wrote, read without torch and without running anything that they contain.

Such a file is a zip archive: ``data.pkl`` is a pickle of a dictionary whose tensors name storages, and each storage is
an entry of its own, not compressed. A pickle can call any function of the machine that reads it. This reader knows the
five names that a dictionary of tensors needs, answers them with its own inert stand-ins, and refuses all others.
"""

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lmjax.convert.mapped_files import Stored
from lmjax.errors import InputError

SINGLE = "pytorch_model.bin"
STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
"""Classes of the module torch, and what they hold."""
LOCAL_HEADER = struct.Struct("<26xHH")
"""Of an entry of a zip archive: the lengths of its name and of its extra field, which come before its content."""
MAX_NUMBER = 1 << 48
"""More than any size, stride or offset."""
MALFORMED = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    ValueError,
)
"""What unpickling raises for a pickle that is damaged."""


def read_state(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name.

    Raises InputError where it is cut off or of the format before torch 1.6, where it names anything but tensors, where
    it was written on a big-endian machine or is compressed, and where a tensor does not lie in its storage.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(
                f"{path}: cut off, or not a file that torch 1.6 or newer wrote; fetch it anew, or write it again with "
                "torch.save(torch.load(FILE, weights_only=True), FILE)"
            )
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            places = {name: _place(path, file, entry) for name, entry in entries.items()}
            order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
            content = archive.read(entries["data.pkl"])
    except KeyError as error:
        raise InputError(f"{path}: not a file of torch.save: the archive has no {error}; fetch it anew") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
        raise InputError(f"{path}: damaged ({error}); fetch it anew") from None
    if order != b"little":
        raise InputError(f"{path}: written in the byte order {order.decode(errors='replace')!r}; only little is read")
    tensors = _unpickle(path, content)
    return {name: _stored(path, name, tensor, places) for name, tensor in tensors.items()}


class _Place(NamedTuple):
    """Where the content of an entry is."""

    offset: int
    size: int


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _place(path: Path, file: Any, entry: zipfile.ZipInfo) -> _Place:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path}: {entry.filename} is compressed; torch.save does not do that; fetch the file anew")
    file.seek(entry.header_offset)
    lengths = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    place = _Place(entry.header_offset + LOCAL_HEADER.size + sum(lengths), entry.file_size)
    if place.offset + place.size > path.stat().st_size:
        raise zipfile.BadZipFile(f"{entry.filename} reaches beyond the end")
    return place


def _unpickle(path: Path, content: bytes) -> dict[str, _Tensor]:
    try:
        found = _Unpickler(io.BytesIO(content)).load()
    except _ForbiddenError as error:
        raise InputError(
            f"{path}: refused: its pickle asks for {error}, which a file of tensors does not need and which may run "
            "any code; nothing of it was run. Take a safetensors file of this model"
        ) from None
    except MALFORMED as error:
        raise InputError(f"{path}: its pickle is damaged ({error!r}); fetch the file anew") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {type(found).__name__}, where tensors by name are expected")
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, _Tensor)):
            raise InputError(
                f"{path}: {name!r} is {type(value).__name__} and no tensor; save the model's state_dict alone"
            )
    return found


class _ForbiddenError(Exception):
    pass


# A pickle may set attributes of what it gets, and call it; these have none to set and do nothing.
class _StorageType(NamedTuple):
    name: str


class _RebuildTensor:
    """torch._utils._rebuild_tensor_v2: a view of a storage."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_gradient_and_hooks: Any) -> _Tensor:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise ValueError(f"not a tensor: {storage}, {shape}, {strides}")
        if not all(type(number) is int and 0 <= number < MAX_NUMBER for number in numbers):
            raise ValueError(f"not whole numbers below {MAX_NUMBER}: {numbers}")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
    """torch._utils._rebuild_parameter: the tensor itself."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_gradient_and_hooks: Any) -> Any:
        return tensor


class _Unpickler(pickle.Unpickler):
    """Knows the names that a dictionary of tensors needs, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        if module == "torch" and name in STORAGES:
            return _StorageType(name)
        raise _ForbiddenError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _device, _length = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise ValueError(f"not a storage: {pid}")
        return _Storage(key, STORAGES[storage_type.name])


def _stored(path: Path, name: str, tensor: _Tensor, places: dict[str, _Place]) -> Stored:
    """Where a tensor is in the file. Raises InputError where its storage is missing or too small for it."""
    place = places.get(f"data/{tensor.storage.key}")
    itemsize = tensor.storage.dtype.itemsize
    reach = 0
    if 0 not in tensor.shape:
        steps = (stride * (length - 1) for stride, length in zip(tensor.strides, tensor.shape, strict=True))
        reach = (tensor.offset + sum(steps) + 1) * itemsize
    if place is None or reach > place.size:
        held = "is not in the file" if place is None else f"has {place.size} bytes, and {reach} are needed"
        raise InputError(f"{path}: the storage of {name} {held}; fetch the file anew")
    # The strides of a tensor without elements mean nothing, and may lead out of the file.
    strides = tuple(stride * itemsize for stride in tensor.strides) if reach else None
    offset = place.offset + (tensor.offset * itemsize if reach else 0)
    return Stored(tensor.shape, tensor.storage.dtype, offset, strides)
