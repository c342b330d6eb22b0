"""The head of a GGUF file: what the gguf package writes is read, and a damaged file is refused wherever it is cut."""

import struct

import numpy as np
import pytest

from lmjax.convert.gguf_header import read_header
from lmjax.errors import InputError

pytestmark = pytest.mark.fast

gguf = pytest.importorskip("gguf")


@pytest.fixture
def path(tmp_path, rng):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for kind, value in {"uint8": 250, "int8": -3, "uint16": 65_000, "int16": -300, "uint32": 1 << 31}.items():
        getattr(writer, f"add_{kind}")(f"n.{kind}", value)
    for kind, value in {"int32": -9, "uint64": 1 << 63, "int64": -(1 << 62), "float32": 0.5, "float64": 0.1}.items():
        getattr(writer, f"add_{kind}")(f"n.{kind}", value)
    writer.add_bool("yes", True)
    writer.add_string("text", "ünï\ncode")
    writer.add_array("texts", ["a", "", "日本"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_tensor("x", rng.standard_normal((3, 5), np.float32))
    writer.add_tensor("y", np.zeros((2, 68), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_it_is_what_the_package_reads(path):
    header = read_header(path)
    reader = gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == theirs
    assert header.metadata["yes"] is True
    assert header.metadata["text"] == "ünï\ncode"
    for tensor in reader.tensors:
        packed = header.tensors[tensor.name]
        assert packed.shape == tuple(reversed(tensor.shape.tolist()))
        assert (packed.kind, packed.offset) == (tensor.tensor_type.name, tensor.data_offset)
        assert packed.row_bytes == tensor.data.nbytes // packed.shape[0]


def test_a_file_that_is_cut_anywhere_is_refused(path):
    content = path.read_bytes()
    end = max(packed.offset + packed.shape[0] * packed.row_bytes for packed in read_header(path).tensors.values())
    for size in [*range(0, end, 7), end - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match="cut off"):
            read_header(path)
    path.write_bytes(content[:end])
    assert read_header(path).tensors.keys() == {"x", "y"}


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        (0, b"GGML", "not a GGUF file: it begins with b'GGML'"),
        (4, struct.pack("<I", 1), "GGUF version 1, and 2 and 3"),
        (4, struct.pack(">I", 3), "GGUF version 50331648"),
        (8, struct.pack("<Q", 1 << 60), "values are to come"),
        (16, struct.pack("<Q", 1 << 60), "values are to come"),
        (24, struct.pack("<Q", 1 << 60), "bytes are to come"),
        (b"texts", b"yes\xff\xfe", "is not UTF-8"),
        (b"n.int16", b"n.int32", "n.int32 is there twice"),
    ],
)
def test_a_damaged_file_is_refused(path, place, value, what):
    content = bytearray(path.read_bytes())
    place = content.index(place) if isinstance(place, bytes) else place
    content[place : place + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(InputError, match=what):
        read_header(path)


def test_tensors_that_overlap_or_have_no_type_are_refused(path):
    content = path.read_bytes()
    entry = content.index(b"y", content.index(struct.pack("<Q", 1) + b"x") + 20)
    kind, offset = entry + 1 + 4 + 16, entry + 1 + 4 + 16 + 4
    for place, value, what in [
        (kind, struct.pack("<I", 999), "y is of the unknown type 999"),
        (
            kind,
            struct.pack("<I", int(gguf.GGMLQuantizationType.Q4_K)),
            "y has the shape \\[2, 64\\], and Q4_K has blocks",
        ),
        (offset, struct.pack("<Q", 32), "y overlaps x"),
        (offset, struct.pack("<Q", 1 << 40), "y ends at byte"),
    ]:
        path.write_bytes(content[:place] + value + content[place + len(value) :])
        with pytest.raises(InputError, match=what):
            read_header(path)
