"""Files of torch.save: the same tensors as torch reads, and nothing in them is ever run."""

import collections
import os
import pickle
import zipfile

import numpy as np
import pytest

from lmjax.convert.tensors import open_tensors
from lmjax.errors import InputError

pytestmark = pytest.mark.fast

NAME = "pytorch_model.bin"


def make_archive(path, pickled, storages=None, compression=zipfile.ZIP_STORED, byteorder=b"little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)


class Global:
    """Stands in a pickle for a name of a module that need not be installed."""

    def __init__(self, name):
        self.name = name


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Storage:
    def __init__(self, *pid):
        self.pid = pid


def assemble(value):
    """A pickle, opcode by opcode: torch is not there on every machine, and would not write what these tests need."""
    if isinstance(value, Global):
        module, _, name = value.name.rpartition(".")
        return f"c{module}\n{name}\n".encode()
    if isinstance(value, Call):
        return assemble(value.function) + assemble(tuple(value.arguments)) + b"R"
    if isinstance(value, Storage):
        return assemble(value.pid) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(assemble, value)) + b"t"
    if isinstance(value, dict):
        return b"(" + b"".join(assemble(part) for item in value.items() for part in item) + b"d"
    return pickle.dumps(value, 0).removesuffix(b".").replace(b"p0\n", b"")


def tensor(key="0", offset=0, shape=(2, 3), strides=(3, 1), kind="torch.FloatStorage"):
    storage = Storage("storage", Global(kind), key, "cpu", 6)
    return Call(Global("torch._utils._rebuild_tensor_v2"), storage, offset, shape, strides, False, None)


def write(directory, value, **options):
    make_archive(directory / NAME, assemble(value) + b".", **options)


SIX = {"0": np.arange(6, dtype="<f4").tobytes()}


def test_a_tensor_is_a_view_of_the_file(tmp_path):
    parameter = Call(Global("torch._utils._rebuild_parameter"), tensor(), True, None)
    write(tmp_path, {"x": tensor(), "t": tensor(shape=(3, 2), strides=(1, 3)), "p": parameter}, storages=SIX)
    files = open_tensors(tmp_path)
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(files.read("x"), expected)
    np.testing.assert_array_equal(files.read("p"), expected)
    np.testing.assert_array_equal(files.read("t"), expected.T)
    assert not files.read("x").flags.owndata
    assert not files.read("x").flags.writeable


def test_torch_reads_the_same(tmp_path, rng):
    torch = pytest.importorskip("torch")
    base = torch.tensor(rng.standard_normal((6, 8)), dtype=torch.float32)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8)
    state = collections.OrderedDict({str(kind): (base * 9).to(kind) for kind in (*kinds, torch.bool)})
    state["transposed"], state["sliced"] = base.T, base[1:4, 2::3]
    state["expanded"] = base[0, :1].expand(5, 3)
    state["nothing"], state["scalar"] = torch.zeros(0, 3), torch.tensor(3.5)
    state["nothing at the end"] = base[6:]
    state["parameter"] = torch.nn.Parameter(base + 1)
    state |= torch.nn.Linear(3, 4).state_dict()
    torch.save(state, tmp_path / NAME)
    expected = torch.load(tmp_path / NAME, weights_only=True)
    files = open_tensors(tmp_path)
    assert files.infos.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = files.read(name)
        assert str(theirs.dtype) == f"torch.{ours.dtype.name}", name
        values = theirs.detach().float().numpy() if theirs.dtype == torch.bfloat16 else theirs.detach().numpy()
        np.testing.assert_array_equal(ours.astype(values.dtype), values, err_msg=name)


def test_shards_with_an_index_are_read(tmp_path, rng):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(rng.standard_normal(4)) for name in "ab"}
    for name, value in state.items():
        torch.save({name: value}, tmp_path / f"part-{name}.bin")
    (tmp_path / f"{NAME}.index.json").write_text('{"weight_map": {"a": "part-a.bin", "b": "part-b.bin"}}')
    files = open_tensors(tmp_path)
    for name, value in state.items():
        np.testing.assert_array_equal(files.read(name), value.numpy())


class Evil:
    """Reduces to a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "eval"), (exec, "exec"), (getattr, "getattr"), (print, "print")],
)
def test_a_pickle_that_calls_anything_is_refused_and_has_not_run(tmp_path, protocol, function, name):
    mark = tmp_path / "it ran"
    code = f"mkdir '{mark}'" if function is os.system else f"__import__('os').mkdir({str(mark)!r})"
    arguments = (code, "x") if function is getattr else (code,)
    make_archive(tmp_path / NAME, pickle.dumps({"x": Evil(function, arguments)}, protocol))
    with pytest.raises(InputError, match=f"refused: its pickle asks for \\w+\\.{name}, .*nothing of it was run"):
        open_tensors(tmp_path)
    assert not mark.exists()
    # the same pickle does run where it is loaded as it stands
    if function in (os.system, eval, exec):
        pickle.loads(pickle.dumps(Evil(function, (code,)), protocol))
        assert mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.load",
        "torch.nn.Linear",
        "torch.Float8_e4m3fnStorage",
        "torch._utils._rebuild_tensor_v2.__globals__",
        "torch._utils._rebuild_tensor_v3",
        "collections.OrderedDict.__class__",
        "collections.defaultdict",
        "numpy.core.multiarray._reconstruct",
        "builtins.dict",
    ],
)
def test_names_near_those_that_are_known_are_refused(tmp_path, name):
    write(tmp_path, {"x": Call(Global(name))}, storages=SIX)
    module, _, last = name.rpartition(".")
    with pytest.raises(InputError, match=f"its pickle asks for {module}.{last}"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "collections.OrderedDict"])
def test_a_pickle_cannot_change_what_it_gets(tmp_path, name):
    state = assemble((None, {"__call__": 1, "name": 2}))
    make_archive(tmp_path / NAME, assemble(Global(name)) + state + b"b.", storages=SIX)
    with pytest.raises(InputError, match="its pickle is damaged"):
        open_tensors(tmp_path)
    write(tmp_path, {"x": tensor()}, storages=SIX)
    assert open_tensors(tmp_path).read("x").shape == (2, 3)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"x": tensor(shape=(2, 4), strides=(4, 1))}, "the storage of x has 24 bytes, and 32 are needed"),
        ({"x": tensor(offset=1)}, "the storage of x has 24 bytes, and 28 are needed"),
        ({"x": tensor(strides=(9, 1))}, "the storage of x has 24 bytes"),
        ({"x": tensor(strides=(-3, 1))}, "damaged .*not whole numbers"),
        ({"x": tensor(offset=-1)}, "damaged .*not whole numbers"),
        ({"x": tensor(strides=(1 << 62, 1), shape=(1, 1))}, "damaged .*not whole numbers below"),
        ({"x": tensor(shape=(2,))}, "damaged .*not a tensor"),
        ({"x": tensor(key="1")}, "the storage of x is not in the file"),
        ({"x": tensor(key="../data.pkl")}, "the storage of x is not in the file"),
        ({"x": tensor(), "step": 7}, "'step' is int and no tensor; save the model's state_dict alone"),
        ({"model": {"x": tensor()}}, "'model' is dict and no tensor"),
        ((1, 2), "holds tuple, where tensors by name are expected"),
    ],
)
def test_what_is_not_tensors_in_their_storages_is_refused(tmp_path, value, what):
    write(tmp_path, value, storages=SIX)
    with pytest.raises(InputError, match=f"{NAME}: .*{what}"):
        open_tensors(tmp_path)


def test_a_damaged_archive_is_refused(tmp_path):
    path = tmp_path / NAME
    write(tmp_path, {"x": tensor()}, storages=SIX)
    content = path.read_bytes()
    local = b"\x0e\0\0\0archive/data/0"  # the lengths of the name and of the extra field, and the name
    for what, damaged in {
        "cut off, or not a file that torch": content[:-30],
        "damaged .*Bad CRC-32": content.replace(b"FloatStorage", b"FloatStoragf"),
        "not a file of torch.save: the archive has no 'data.pkl'": content.replace(b"data.pkl", b"data.pkx"),
        "damaged .*File name in directory": content.replace(b"archive/data.pkl", b"archive/data.pkx", 1),
        "damaged .*data/0 reaches beyond the end": content.replace(local, local[:2] + b"\xff\xff" + local[4:]),
    }.items():
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=what):
            open_tensors(tmp_path)
    make_archive(path, assemble({"x": tensor()})[:-5], SIX)
    with pytest.raises(InputError, match="its pickle is damaged"):
        open_tensors(tmp_path)


def test_compressed_big_endian_and_old_files_are_refused(tmp_path):
    write(tmp_path, {"x": tensor()}, storages=SIX, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="is compressed; torch.save does not do that"):
        open_tensors(tmp_path)
    write(tmp_path, {"x": tensor()}, storages=SIX, byteorder=b"big")
    with pytest.raises(InputError, match="byte order 'big'"):
        open_tensors(tmp_path)
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.zeros(2)}, tmp_path / NAME, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="write it again with torch.save\\(torch.load\\(FILE, weights_only=True\\)"):
        open_tensors(tmp_path)
