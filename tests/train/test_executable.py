"""The compiled step in a file: the same numbers, and refused for anything but what it was made of."""

import importlib.metadata
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lmjax.compat import compiling_anew
from lmjax.errors import InputError
from lmjax.mesh import MeshConfig, make_mesh
from lmjax.models.decoder import DecoderConfig, Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.train.executable import COMPILERS, about, load_executable, save_executable
from lmjax.train.feed import abstract_batch
from lmjax.train.state import init_state, make_blueprint
from lmjax.train.step import lower_step

MODEL = DecoderConfig(vocab_size=64, max_length=16, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32)


@pytest.fixture(autouse=True)
def _compiled_here():
    with compiling_anew():
        yield


def lowered(fsdp: int = 2, rows: int = 4):
    mesh = make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:fsdp])
    blueprint = make_blueprint(MODEL, OptimizerConfig(), 10, mesh)
    batch = abstract_batch(rows, 16, 1, mesh)
    return lower_step(blueprint, Execution(compute_dtype=jnp.dtype("float32")), LossOptions(), batch), blueprint, batch


@pytest.fixture
def saved(tmp_path: Path) -> str:
    step, blueprint, _ = lowered()
    file = str(tmp_path / "step")
    save_executable(file, step.compile(), about(step, blueprint.mesh, {}))
    return file


def test_a_loaded_step_gives_the_same_bits(saved: str):
    step, blueprint, batch = lowered()
    ones = jax.tree.map(lambda leaf: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding), batch)
    results = [
        compiled(init_state(blueprint, 0), ones)
        for compiled in (load_executable(saved, step, blueprint.mesh, {}), step.compile())
    ]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *results)))
    assert results[0][1].loss > 1


@pytest.mark.parametrize(
    ("changes", "asked", "what"),
    [
        ({"rows": 8}, {}, "program"),
        ({"fsdp": 4}, {}, r"devices \[0, 1\]"),
        ({}, {"xla_cpu_enable_fast_math": True}, "flags"),
    ],
)
def test_one_of_something_else_is_refused(saved: str, changes: dict, asked: dict, what: str):
    step, blueprint, _ = lowered(**changes)
    with pytest.raises(InputError, match=f"compiled for something else .*{what}.*leave --executable out"):
        load_executable(saved, step, blueprint.mesh, asked)


def test_one_of_another_compiler_is_refused(saved: str):
    with zipfile.ZipFile(saved) as archive:
        found, payload = json.loads(archive.read("about.json")), archive.read("executable")
    found["versions"]["jaxlib"] = "0.0.1"
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr("about.json", json.dumps(found))
        archive.writestr("executable", payload)
    step, blueprint, _ = lowered()
    with pytest.raises(InputError, match=r"versions .*'jaxlib': '0\.0\.1'"):
        load_executable(saved, step, blueprint.mesh, {})


def test_only_what_compiles_for_the_platform_counts(saved: str, monkeypatch: pytest.MonkeyPatch):
    """A machine that plans may have compilers for other devices beside it."""
    step, blueprint, _ = lowered()
    version = importlib.metadata.version
    other = {"libtpu": "1", "jax-cuda13-plugin": "2", "jax-cuda13-pjrt": "3"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: other.get(name) or version(name))
    load_executable(saved, step, blueprint.mesh, {})
    assert "libtpu" in COMPILERS["tpu"]
    assert "jax-cuda13-plugin" in COMPILERS["gpu"]


def test_one_that_was_compiled_with_other_options_of_the_process_is_refused(
    saved: str, monkeypatch: pytest.MonkeyPatch
):
    step, blueprint, _ = lowered()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=8")
    load_executable(saved, step, blueprint.mesh, {})
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    with pytest.raises(InputError, match=r"environment \{'XLA_FLAGS': \[\]\}, here .*fast_math"):
        load_executable(saved, step, blueprint.mesh, {})


def test_what_is_no_such_file_is_refused_and_none_is_overwritten(saved: str, tmp_path: Path):
    step, blueprint, _ = lowered()
    with pytest.raises(InputError, match="no such file"):
        load_executable(str(tmp_path / "none"), step, blueprint.mesh, {})
    text = tmp_path / "text"
    text.write_text("not a step")
    with pytest.raises(InputError, match="not a compiled step"):
        load_executable(str(text), step, blueprint.mesh, {})
    with pytest.raises(InputError, match="is there already"):
        save_executable(str(text), step.compile(), about(step, blueprint.mesh, {}))
    assert text.read_text() == "not a step"
