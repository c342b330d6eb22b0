"""A Hugging Face model in and out: ``lmjax convert import`` and ``export`` against rewriting the same files.

    python -m benchmarks.convert [--gigabytes 2] [--dtype bfloat16]

The model is of the Llama kind, with random weights, and as large as asked for. The peer reads its files, takes their
SHA-256, writes them elsewhere and calls fsync: what anyone has to do who copies a model and vouches for the copy. We
import it (check all tensors, transpose, stack the layers, write a checkpoint, sync, SHA-256), and export that again
in the dtype of the source (verify the SHA-256, read, put together, write, sync). All run one after
the other in each round, every one in a process of its own that has imported what it needs before its clock runs. The
files that are read are in the page cache. Before each clock starts the disk is synced, and as much memory touched and
freed as any of the three takes: a virtual machine hands free pages to its host, and whoever comes first pays for
getting them back. ``ratio`` is the smaller of
the medians of the peer's seconds by ours; ``ratio_import`` and ``ratio_export`` are both, and ``…_cpu`` the same of the
seconds that the processors worked. The last line is one JSON object.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from lmjax.checkpoint.slices import open_step
from lmjax.convert.exporting import export_model
from lmjax.convert.families.llama import FAMILY
from lmjax.convert.importing import HUGGING_FACE, import_model
from lmjax.convert.pieces import pieces
from lmjax.convert.safetensors_files import SafetensorsWriter
from lmjax.convert.settings import CONFIG_FILE, write_json
from lmjax.convert.weights import find_saved
from lmjax.models.config import DecoderConfig

SHARD_BYTES = 1_000_000_000
MEMORY_TAKEN = 3
"""Times the size of the model, in the page cache and in the process."""
BLOCK_BYTES = 1 << 18
"""What is read, and written, in one go: larger writes are slower here, and vary more."""
LAYER = DecoderConfig(
    vocab_size=32_000, max_length=4096, embed_dim=2048, num_heads=16, num_kv_heads=8, mlp_dim=8192, num_layers=1
)

Dtype = Literal["float32", "bfloat16"]


class Measured(NamedTuple):
    """What one process did."""

    seconds: float
    cpu_seconds: float


def write_model(directory: Path, num_bytes: float, dtype: Dtype) -> int:
    """A model of about so many bytes; how many there are."""
    itemsize = 4 if dtype == "float32" else 2
    of_layer = sum(itemsize * math.prod(piece.shape) for piece in pieces(FAMILY, LAYER) if ".layers." in piece.name)
    outside = 2 * itemsize * LAYER.vocab_size * LAYER.embed_dim
    config = dataclasses.replace(LAYER, num_layers=max(1, round((num_bytes - outside) / of_layer)))
    wanted = [(piece.name, piece.shape) for piece in pieces(FAMILY, config)]
    directory.mkdir()
    writer = SafetensorsWriter(directory, wanted, dtype=dtype, shard_bytes=SHARD_BYTES)
    rng = np.random.default_rng(0)
    for name, shape in wanted:
        writer.write(name, rng.standard_normal(shape, np.float32) * np.float32(0.02))
    writer.finish()
    write_json(directory / CONFIG_FILE, {"model_type": "llama", "torch_dtype": dtype, **FAMILY.write_config(config)})
    return writer.total_bytes


def rewrite(source: Path, target: Path) -> None:
    """The peer."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as file, (target / path.name).open("wb") as out:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                out.write(block)
            out.flush()
            os.fsync(out.fileno())


def export(imported: Path, target: Path) -> None:
    saved = find_saved(epath.Path(imported))
    assert saved is not None
    with open_step(saved.checkpoints) as step:
        export_model(step, saved.config, target, huggingface=imported / HUGGING_FACE, shard_bytes=SHARD_BYTES)


def measured(num_bytes: int, function: Callable[..., Any], *arguments: Any) -> Measured:
    os.sync()
    np.ones(MEMORY_TAKEN * num_bytes, np.uint8)
    before, began = cpu_seconds(), time.perf_counter()
    function(*arguments)
    return Measured(time.perf_counter() - began, cpu_seconds() - before)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def alone(num_bytes: int, function: Callable[..., Any], *arguments: Any) -> Measured:
    """In a process of its own; the model has so many bytes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        return executor.submit(measured, num_bytes, function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each of the three")
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the model's files")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model's files")
    parser.add_argument("--directory", type=Path, help="where to write; five times the size is needed")
    arguments = parser.parse_args()
    rounds: list[dict[str, Measured]] = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        source, copy, imported, exported = (Path(folder) / name for name in ("source", "copy", "imported", "exported"))
        num_bytes = write_model(source, arguments.gigabytes * 1e9, arguments.dtype)
        for number in range(arguments.rounds):
            found = {
                "peer": alone(num_bytes, rewrite, source, copy),
                "import": alone(num_bytes, import_model, source, imported),
                "export": alone(num_bytes, export, imported, exported),
            }
            rounds.append(found)
            for path in (copy, imported, exported):
                shutil.rmtree(path)
            print(
                f"round {number}: "
                + ", ".join(f"{name} {row.seconds:.2f} s ({row.cpu_seconds:.2f} CPU)" for name, row in found.items()),
                flush=True,
            )

    def ratio(name: str, field: str) -> float:
        return round(statistics.median(getattr(row["peer"], field) / getattr(row[name], field) for row in rounds), 3)

    result = {
        "name": "convert",
        "ratio": min(ratio("import", "seconds"), ratio("export", "seconds")),
        "ratio_import": ratio("import", "seconds"),
        "ratio_export": ratio("export", "seconds"),
        "ratio_import_cpu": ratio("import", "cpu_seconds"),
        "ratio_export_cpu": ratio("export", "cpu_seconds"),
        "import_megabytes_per_second": round(
            statistics.median(num_bytes / 1e6 / row["import"].seconds for row in rounds)
        ),
        "run": f"{num_bytes / 1e9:.3g} GB of {arguments.dtype}, {arguments.rounds} rounds",
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore", "numpy")},
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
