"""The safetensors format: what the package writes is read in place, and what is written the package reads."""

import json
import resource
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from lmjax.convert import safetensors_files
from lmjax.convert.safetensors_files import SafetensorsWriter
from lmjax.convert.tensors import open_tensors
from lmjax.errors import InputError

pytestmark = pytest.mark.fast

safetensors_numpy = pytest.importorskip("safetensors.numpy")
NAME = "model.safetensors"


def make_file(path, header, data=b"", length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + data)


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def random_tensors(rng):
    shapes = {"a": (3, 5), "vector": (7,), "scalar": (), "nothing": (4, 0), "deep": (2, 3, 4)}
    tensors = {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    tensors["transposed"] = rng.standard_normal((33, 40), np.float32).T
    tensors["strided"] = rng.standard_normal((9, 8), np.float32)[::2, 1::3]
    return tensors


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"])
def test_a_tensor_of_the_package_is_read_in_place(tmp_path, rng, dtype):
    whole = rng.integers(0, 2 if dtype == "bool" else 100, (6, 5)).astype(dtype)
    safetensors_numpy.save_file({"x": whole, "y": whole[0].copy()}, tmp_path / NAME)
    files = open_tensors(tmp_path)
    x = files.read("x")
    assert files.infos["x"] == ((6, 5), np.dtype(dtype), NAME)
    assert x.dtype == whole.dtype
    np.testing.assert_array_equal(x, whole)
    np.testing.assert_array_equal(files.read("y"), whole[0])
    assert not x.flags.owndata
    assert not x.flags.writeable
    files.close()
    np.testing.assert_array_equal(x, whole)


def test_bfloat16_and_8_bit_floats_of_torch_are_read_bit_by_bit(tmp_path, rng):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    bits = torch.tensor(rng.integers(-(2**15), 2**15, (64, 9)), dtype=torch.int16)
    small = torch.tensor(rng.integers(0, 256, (8, 3)), dtype=torch.uint8)
    kinds = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
    tensors = {name: (bits if name == "bfloat16" else small).clone().view(kind) for name, kind in kinds.items()}
    save_file(tensors, tmp_path / NAME)
    files = open_tensors(tmp_path)
    for name in kinds:
        found = files.read(name)
        assert found.dtype.name == name
        np.testing.assert_array_equal(found.view(np.uint8), tensors[name].view(torch.uint8).numpy())


def test_a_tensor_that_is_not_aligned_is_read(tmp_path, rng):
    values = rng.standard_normal((4, 3)).astype(ml_dtypes.bfloat16)
    header = {"odd": entry(0, 1), "x": entry(1, 25, [4, 3], "BF16")}
    content = json.dumps(header).encode()
    make_file(tmp_path / NAME, content + b" " * (len(content) % 2), b"\0" + values.tobytes())
    found = open_tensors(tmp_path).read("x")
    assert not found.flags.aligned
    np.testing.assert_array_equal(found.astype(np.float32), values.astype(np.float32))


@pytest.mark.parametrize(
    ("header", "data", "length", "what"),
    [
        ({"x": entry(0, 4)}, b"abc", None, "cut off: it has .* bytes, and its header tells of"),
        ({"x": entry(0, 4)}, b"abcde", None, "too long"),
        ({"x": entry(0, 4), "y": entry(3, 6)}, b"abcdef", None, "y overlaps the tensor before it"),
        ({"x": entry(0, 2), "y": entry(3, 6)}, b"abcdef", None, "y leaves a gap before it"),
        ({"x": entry(0, 4, [5])}, b"abcd", None, "4 bytes for U8 \\[5\\]"),
        ({"x": entry(0, 4, [-4])}, b"abcd", None, "not all sizes are whole numbers"),
        ({"x": entry(-4, 0, [4])}, b"abcd", None, "not all sizes are whole numbers"),
        ({"x": entry(0, 4, [4], "F4")}, b"abcd", None, "dtype F4; known are .*BF16"),
        ({"x": {"shape": [4]}}, b"abcd", None, "the header cannot be read .*dtype"),
        ([1, 2], b"", None, "the header cannot be read"),
        (b"{]", b"", None, "the header cannot be read"),
        (b'{"x": 1, "x": 2}', b"", None, "a name is there twice"),
        ({"x": entry(0, 4)}, b"abcd", 1000, "cut off, or not a safetensors file"),
        ({"x": entry(0, 4)}, b"abcd", 2**63, "cut off, or not a safetensors file"),
    ],
)
def test_a_file_that_is_cut_off_or_does_not_fit_its_header_is_refused(tmp_path, header, data, length, what):
    make_file(tmp_path / NAME, header, data, length)
    with pytest.raises(InputError, match=f"{NAME}: .*{what}"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 8, 60, -1])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, rng, size):
    safetensors_numpy.save_file({"x": rng.standard_normal((4, 4))}, tmp_path / NAME)
    content = (tmp_path / NAME).read_bytes()
    open_tensors(tmp_path)
    (tmp_path / NAME).write_bytes(content[:size])
    with pytest.raises(InputError, match="cut off"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("piece_bytes", [64, 1 << 24])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_package_reads_what_is_written_and_the_rounding_is_torchs(tmp_path, rng, monkeypatch, dtype, piece_bytes):
    torch = pytest.importorskip("torch")
    from safetensors import safe_open
    from safetensors.torch import load_file

    monkeypatch.setattr(safetensors_files, "PIECE_BYTES", piece_bytes)
    tensors = random_tensors(rng)
    # halfway between two bfloat16, of which the lower is even, and odd; and numbers that no rounding may lose
    special = np.array([1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf, np.nan, -0.0, 1e-40, 3.4e38], np.float32)
    tensors["special"] = special
    shapes = [(name, array.shape) for name, array in tensors.items()]
    writer = SafetensorsWriter(tmp_path, shapes, dtype=dtype, shard_bytes=1 << 20)
    for name, array in reversed(tensors.items()):
        writer.write(name, array)
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    found = load_file(tmp_path / NAME)
    assert found.keys() == tensors.keys()
    kind = getattr(torch, dtype)
    for name, array in tensors.items():
        expected = torch.tensor(array).to(kind)
        assert found[name].dtype == kind
        assert found[name].shape == expected.shape
        assert torch.equal(torch.nan_to_num(found[name], 7.0), torch.nan_to_num(expected, 7.0)), name
    assert int.from_bytes((tmp_path / NAME).read_bytes()[:8], "little") % 8 == 0  # the data is aligned
    with safe_open(tmp_path / NAME, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_cut_in_order_and_the_index_names_them(tmp_path, rng):
    tensors = {f"layer.{number}": rng.standard_normal((size,), np.float32) for number, size in enumerate([9, 5, 3, 2])}
    shapes = [(name, array.shape) for name, array in tensors.items()]
    writer = SafetensorsWriter(tmp_path, shapes, dtype="float32", shard_bytes=32)
    for name, array in tensors.items():
        writer.write(name, array)
    assert not (tmp_path / f"{NAME}.index.json").exists()
    writer.finish()
    index = json.loads((tmp_path / f"{NAME}.index.json").read_text())
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index["metadata"]["total_size"] == writer.total_bytes == 76
    assert index["weight_map"] == dict(zip(tensors, [names[0], names[1], names[1], names[2]], strict=True))
    files = open_tensors(tmp_path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(files.read(name), array)
        np.testing.assert_array_equal(safetensors_numpy.load_file(tmp_path / files.infos[name].file)[name], array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_piece_of_a_tensor_at_a_time_is_in_memory(tmp_path, rng, monkeypatch, dtype):
    monkeypatch.setattr(safetensors_files, "PIECE_BYTES", 1 << 15)
    array = rng.standard_normal((1024, 512), np.float32).T
    writer = SafetensorsWriter(tmp_path, [("x", array.shape)], dtype=dtype, shard_bytes=1 << 30)
    tracemalloc.start()
    writer.write("x", array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    writer.finish()
    assert peak < array.nbytes / 4


def test_what_was_planned_has_to_be_written_once_and_with_its_shape(tmp_path):
    writer = SafetensorsWriter(tmp_path, [("x", (2,)), ("y", (3,))], dtype="float32", shard_bytes=99)
    with pytest.raises(AssertionError, match="y has the shape"):
        writer.write("y", np.zeros(4, np.float32))
    writer.write("x", np.zeros(2, np.float32))
    with pytest.raises(AssertionError, match="x is written a second time"):
        writer.write("x", np.zeros(2, np.float32))
    with pytest.raises(AssertionError, match="never written: \\['y'\\]"):
        writer.finish()
    writer.close()


def test_a_disk_that_is_full_is_told_with_what_is_needed(tmp_path, rng):
    writer = SafetensorsWriter(tmp_path, [("x", (4, 300_000))], dtype="float32", shard_bytes=1 << 30)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(InputError, match=f"{NAME}: cannot be written .*the weights take 0.0048 GB in all"):
            writer.write("x", rng.standard_normal((4, 300_000), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(InputError):
        open_tensors(tmp_path)
