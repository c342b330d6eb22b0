"""Every committed YAML loads, is short, says what it is for, holds only what differs from the defaults, and lowers."""

import copy
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from omegaconf import OmegaConf

from lmjax.config import RunConfig, load, load_as, load_model
from lmjax.config.run import ModelFile
from lmjax.errors import InputError
from lmjax.mesh import MeshConfig, make_mesh
from lmjax.models.counts import parameter_count, training_flops
from lmjax.models.decoder import DecoderConfig, Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.train.config import TrainConfig
from lmjax.train.feed import abstract_batch
from lmjax.train.state import make_blueprint
from lmjax.train.step import make_step

ROOT = Path(__file__).parent.parent
MAX_LINES = 40
MODELS = sorted((ROOT / "configs" / "models").rglob("*.yaml"))
EXPERIMENTS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(MODELS))


def names(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


def one_a_family(files: list[str]) -> list[Any]:
    """The files, those whose name begins as that of an earlier one (gemma2_27b, gemma2_2b) in the slow tier."""
    seen: set[str] = set()
    parameters = []
    for file in files:
        family = Path(file).stem.split("_")[0]
        parameters.append(pytest.param(file, marks=pytest.mark.slow) if family in seen else file)
        seen.add(family)
    return parameters


def opening(text: str) -> list[str]:
    """The lines of the comment that a file begins with, without their marks."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    return lines


def missing_from_opening(text: str) -> list[str]:
    """What the opening comment of an experiment should tell and does not."""
    comment = opening(text)
    missing = [word for word in ("Hardware:", "Time:", "Result:") if word not in " ".join(comment)]
    if not any(re.match(r" {3,}(make|lmjax|launch/\S+) ", line + " ") for line in comment):
        missing.append("an indented command")
    return missing


def leaves(tree: Any, above: tuple = ()) -> Iterator[tuple]:
    """The path of every value in nested mappings; a list is one value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key)


def without(tree: dict, path: tuple) -> dict:
    tree = copy.deepcopy(tree)
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return tree


def redundant(cls: type, file: Path, scratch: Path) -> list[str]:
    """The keys that ``file`` sets and that its bases or the defaults would set to the same."""
    tree = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(tree, dict)
    whole = load_as(cls, str(file))
    bases = [tree.get("base", [])] if isinstance(tree.get("base"), str) else tree.get("base", [])
    found = []
    for path in leaves({key: value for key, value in tree.items() if key != "base"}):
        rest = without(tree, path) | {"base": [str(file.parent / base) for base in bases]}
        OmegaConf.save(OmegaConf.create(rest), scratch)
        try:
            same = load_as(cls, str(scratch)) == whole
        except InputError:
            continue
        if same:
            found.append(".".join(path))
    return found


@pytest.mark.parametrize("file", names(EXPERIMENTS))
def test_an_experiment_loads_and_says_what_to_expect(file, tmp_path):
    text = (ROOT / file).read_text()
    assert load(str(ROOT / file)).run_dir.startswith("runs/")
    assert missing_from_opening(text) == []
    assert len(text.splitlines()) <= MAX_LINES
    assert redundant(RunConfig, ROOT / file, tmp_path / "rest.yaml") == []


@pytest.mark.parametrize("file", one_a_family(names(MODELS)))
def test_a_model_loads_and_states_its_parameters_and_its_source(file, tmp_path):
    text = (ROOT / file).read_text()
    model = load_model(str(ROOT / file))
    comment = " ".join(opening(text))
    assert f"{parameter_count(model):,} parameters" in comment
    assert re.search(r"arXiv \d{4}\.\d{5}|GPT-2 report", comment)
    assert len(text.splitlines()) <= MAX_LINES
    assert redundant(ModelFile, ROOT / file, tmp_path / "rest.yaml") == []


def lowered(model: DecoderConfig, train: TrainConfig, length: int, mesh: Mesh) -> str:
    """The train step's program, before any compiler sees it."""
    blueprint = make_blueprint(model, OptimizerConfig(), train.steps, mesh)
    execution = Execution(compute_dtype=jnp.dtype("bfloat16"), remat=train.remat, scan_layers=train.scan_layers)
    batch = abstract_batch(train.global_batch_size, length, train.accumulation, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(make_step(blueprint, execution, LossOptions())).lower(blueprint.state, batch).as_text()


@pytest.mark.parametrize("file", [file for file in names(EXPERIMENTS) if "/pretrain/" not in file])
def test_the_step_of_an_experiment_lowers(file):  # those of configs/pretrain are compiled in tests/plan/test_recipes.py
    config = load(str(ROOT / file))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = lowered(config.model, config.train, config.data.sequence_length, mesh)
    rows = config.train.global_batch_size // config.train.accumulation
    assert f"tensor<{rows}x{config.data.sequence_length}x{config.model.embed_dim}xbf16>" in program


@pytest.mark.parametrize("file", one_a_family(names(MODELS)))
def test_the_step_of_a_model_lowers_on_a_mesh(file):
    model = load_model(str(ROOT / file))
    tensor = math.gcd(2, model.num_heads)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4 // tensor, tensor=tensor))
    program = lowered(model, TrainConfig(steps=1, global_batch_size=8), 256, mesh)
    matrices = f"{model.embed_dim}x{model.mlp_dim}"
    if model.moe is not None:  # the experts of each device, with its part of their width
        matrices = f"{model.moe.num_experts}x{model.embed_dim}x{model.expert_dim // tensor}"
    assert f"{matrices}xbf16>" in program


def test_the_switch_model_and_its_dense_twin_differ_in_experts_alone():
    experts, dense = (load(str(ROOT / "configs" / f"switch_small{of}.yaml"), []) for of in ("", "_dense"))
    assert experts.model.moe is not None
    assert dataclasses.replace(experts.model, moe=None) == dense.model
    assert (experts.train, experts.optimizer, experts.data) == (dense.train, dense.optimizer, dense.data)
    routers = experts.model.num_layers // 2 * experts.model.embed_dim * experts.model.moe.num_experts
    flops = (training_flops(config.model, 1, 256) for config in (experts, dense))
    assert next(flops) - next(flops) == 6 * 256 * routers


def test_the_files_were_found():
    assert "configs/quickstart.yaml" in names(EXPERIMENTS)
    assert "configs/models/llama3_8b.yaml" in names(MODELS)


def test_a_poor_opening_and_a_redundant_key_are_noticed(tmp_path):
    good = "#\n#   lmjax train configs/x.yaml\n#\n# Hardware: a. Time: b.\n# Result: c.\nmodel:"
    assert missing_from_opening(good) == []
    assert missing_from_opening(good.replace("   lmjax", " lmjax")) == ["an indented command"]
    assert missing_from_opening(good.replace("Time", "When")) == ["Time:"]
    assert missing_from_opening("\n" + good) != []
    (tmp_path / "base.yaml").write_text("model: {vocab_size: 9, max_length: 9, embed_dim: 8, num_layers: 1}")
    top = tmp_path / "top.yaml"
    top.write_text(
        "base: base.yaml\nmodel: {num_heads: 1, mlp_dim: 8, embed_dim: 8, norm_epsilon: 1e-5, num_layers: 2}"
    )
    assert redundant(ModelFile, top, tmp_path / "rest.yaml") == ["model.embed_dim", "model.norm_epsilon"]
