"""A model's files: which of them are taken, shards and their index, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lmjax.convert.tensors import open_tensors
from lmjax.errors import InputError

pytestmark = pytest.mark.fast

save_file = pytest.importorskip("safetensors.numpy").save_file
INDEX = "model.safetensors.index.json"


def write_index(directory, where):
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


@pytest.fixture
def shards(tmp_path, rng):
    """Two shards with their index, and what is in them."""
    tensors = {name: rng.standard_normal((3, 2)) for name in "abc"}
    save_file({"a": tensors["a"], "b": tensors["b"]}, tmp_path / "one.safetensors")
    save_file({"c": tensors["c"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tensors


def test_shards_are_read_as_one(tmp_path, shards):
    files = open_tensors(tmp_path)
    assert {name: info.file for name, info in files.infos.items()}["c"] == "two.safetensors"
    for _ in range(2):
        views = {name: files.read(name) for name in shards}
        for name, array in shards.items():
            np.testing.assert_array_equal(views[name], array)
            np.testing.assert_array_equal(files.read(name), array)


def resident_bytes(path):
    """What this process has in memory of a mapped file."""
    found, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            within = line.endswith(str(path.resolve()))
        elif within and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_the_pages_of_a_tensor_are_let_go_when_the_next_one_is_read(tmp_path, rng):
    size = 1 << 22
    save_file({name: rng.integers(0, 256, size, np.uint8) for name in "abcd"}, tmp_path / "model.safetensors")
    files = open_tensors(tmp_path)
    for name in "abcd":
        files.read(name).sum()
        assert 0 < resident_bytes(tmp_path / "model.safetensors") < 1.5 * size


def test_one_file_goes_before_an_index_and_safetensors_before_the_rest(tmp_path, shards):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    (tmp_path / "model.gguf").write_bytes(b"not looked at")
    assert open_tensors(tmp_path).infos.keys() == shards.keys()
    save_file({"whole": np.zeros(2)}, tmp_path / "model.safetensors")
    assert open_tensors(tmp_path).infos.keys() == {"whole"}
    for file in tmp_path.glob("*safetensors*"):
        file.unlink()
    with pytest.raises(InputError, match="pytorch_model.bin: cut off"):
        open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="model.gguf: cut off"):
        open_tensors(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="several GGUF files: model.gguf, other.gguf; give the path of one"):
        open_tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path, shards):
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(InputError, match="1 of 2 shards are missing: two.safetensors; fetch them"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ({"a": "one", "c": "two"}, "they also have b \\(one.safetensors\\)"),
        ({"a": "one", "b": "one", "c": "two", "d": "two"}, "the shards lack d \\(two.safetensors\\)"),
        ({"a": "one", "b": "two", "c": "two"}, "the shards lack b \\(two.*\\); they also have b \\(one"),
    ],
)
def test_an_index_that_does_not_agree_with_its_shards_is_refused(tmp_path, shards, where, what):
    write_index(tmp_path, {name: f"{file}.safetensors" for name, file in where.items()})
    with pytest.raises(InputError, match=f"{INDEX}: does not agree with its shards: {what}"):
        open_tensors(tmp_path)


def test_two_shards_with_a_tensor_of_one_name_are_refused(tmp_path, shards):
    save_file({"a": np.zeros(1), "c": np.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="two.safetensors: one.safetensors beside it also has the tensor a"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("file", ["../one.safetensors", "/one.safetensors", "sub/one.safetensors", "..", ""])
def test_an_index_cannot_lead_out_of_its_directory(tmp_path, file):
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    for place in (tmp_path, inner / "sub"):
        save_file({"a": np.zeros(2)}, place / "one.safetensors")
    write_index(inner, {"a": file})
    with pytest.raises(InputError, match=f"a is said to be in '{file}'; a shard has to lie beside its index"):
        open_tensors(inner)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weights": {}}'])
def test_an_index_that_is_not_one_is_refused(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InputError, match=f"{INDEX}: .*fetch (it|the index) anew"):
        open_tensors(tmp_path)


def test_gits_pointer_to_a_file_is_told_from_a_damaged_one(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(InputError, match="Git's pointer to the file, not the file; run `git lfs pull`"):
        open_tensors(tmp_path)


def test_a_place_without_weights_is_refused_with_what_it_has(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: not there; give a Hugging Face directory"):
        open_tensors(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no weights under the names .*or a .gguf file$"):
        open_tensors(tmp_path)
    save_file({"a": np.zeros(2)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(InputError, match=r"a .gguf file; it has consolidated.safetensors"):
        open_tensors(tmp_path)
    with pytest.raises(InputError, match=r"consolidated.safetensors: a file; give a Hugging Face directory"):
        open_tensors(tmp_path / "consolidated.safetensors")
