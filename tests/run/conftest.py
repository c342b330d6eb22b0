"""A small corpus and a tiny experiment on it, driven through the command line in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.command import lmjax

TEXT = "the model reads one row of tokens and predicts each next token from those before it in the same document"
WORDS = TEXT.split()


def corpus() -> list[str]:
    """Sixty documents of 5 to 60 words, no two the same."""
    return [
        " ".join(WORDS[(i * 7 + j * (1 + i % 3)) % len(WORDS)] for j in range(5 + i % 56)) + f" {i}." for i in range(60)
    ]


EXPERIMENT = {
    "model": {"vocab_size": 259, "max_length": 64, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 64},
    "tokenizer": {"kind": "bytes"},
    "precision": {"compute": "float32"},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
    "train": {"steps": 6, "global_batch_size": 8, "log_batch_hash": True},
    "evaluate": {"every_steps": 3, "max_rows": 4},
    "checkpoint": {"every_steps": 2, "keep_last": 3},
    "logging": {"progress": "lines"},
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The data section of a prepared dataset."""
    root = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(corpus()):
        (root / f"{number:03d}.txt").write_text(text)
    section = {
        "path": str(root / "dataset"),
        "sources": [{"kind": "files", "path": str(root)}],
        "sequence_length": 64,
        "validation_fraction": 0.1,
    }
    file = root / "prepare.yaml"
    file.write_text(yaml.safe_dump({**EXPERIMENT, "run_dir": str(root / "unused"), "data": section}))
    assert lmjax("data", "prepare", str(file)) == 0
    return section


@pytest.fixture
def experiment(dataset: dict, tmp_path: Path) -> Callable[..., str]:
    """Writes the experiment's file: run directory ``name``, with sections changed by keyword."""

    def write(name: str = "run", **sections: dict) -> str:
        tree = {**EXPERIMENT, "data": dataset, "run_dir": str(tmp_path / name)}
        tree = {**tree, **{key: {**tree.get(key, {}), **value} for key, value in sections.items()}}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return str(file)

    return write
