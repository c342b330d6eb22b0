"""An imported model in an object store is read, and exported, as it is from a disk."""

from pathlib import Path

import numpy as np
import pytest
from etils import epath

from lmjax import paths
from lmjax.checkpoint.manifest import read_manifest
from lmjax.checkpoint.slices import StepReader, open_step
from lmjax.convert.exporting import export_model
from lmjax.convert.importing import import_model
from lmjax.convert.weights import find_saved
from lmjax.errors import InputError
from tests.command import lmjax
from tests.convert.test_exporting import equal, tensors
from tests.convert.tiny_model import write_model


@pytest.fixture
def local(rng: np.random.Generator, tmp_path: Path) -> Path:
    """A model that was imported onto the disk."""
    write_model(tmp_path / "source", rng)
    import_model(tmp_path / "source", tmp_path / "imported")
    return tmp_path / "imported"


@pytest.fixture
def remote(local: Path, bucket: str) -> epath.Path:
    """The whole directory again, in the store."""
    target = epath.Path(bucket) / "imported"
    for file in sorted(path for path in local.rglob("*") if path.is_file()):
        paths.upload(file, target / file.relative_to(local).as_posix())
    return target


def values(step: StepReader) -> dict[str, np.ndarray]:
    return {name: step.read(name) for name in step.leaves}


def test_the_values_and_the_export_are_those_of_the_disk(local, remote, rng, tmp_path):
    other = write_model(tmp_path / "other", rng)
    found, on_disk = find_saved(remote), find_saved(epath.Path(local))
    assert found is not None
    assert on_disk is not None
    assert found.config == on_disk.config
    kept = local / "huggingface"
    with open_step(local / "checkpoints") as step:
        expected = values(step)
        export_model(step, found.config, tmp_path / "out-local", huggingface=kept)
    with open_step(f"{remote}/checkpoints") as step:
        read = values(step)
        export_model(step, found.config, tmp_path / "out-remote", huggingface=kept)
    assert read.keys() == expected.keys() != set()
    for name, array in expected.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes(), name
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out-local", "out-remote")]
    assert weights[0] == weights[1]
    assert equal(tensors(tmp_path / "out-remote"), tensors(tmp_path / "source"))
    assert not equal(tensors(tmp_path / "out-remote"), tensors(other)), "another model's file has other bytes"
    cached = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name != "locks"]
    assert cached == [], "what was fetched is gone from this machine"


def test_a_damaged_object_is_refused_by_name(remote, tmp_path):
    files = read_manifest(remote / "checkpoints", 0).files
    name = max(files, key=lambda name: files[name].size)
    content = bytearray((remote / "checkpoints" / "0" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (remote / "checkpoints" / "0" / name).write_bytes(bytes(content))
    with pytest.raises(InputError, match="no good checkpoint") as refused, open_step(remote / "checkpoints"):
        pass
    assert f"{remote / 'checkpoints' / '0' / name}: damaged" in str(refused.value)


def test_the_export_command_wants_the_imported_model_on_a_disk(remote, tmp_path, capsys):
    assert lmjax("convert", "export", str(remote), str(tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert f"{remote}: an imported model whose huggingface/ is not on this machine's disk" in said
    assert "copy the directory" in said.lower()
    assert not (tmp_path / "out").exists()
