"""Eight CPU devices for every test, a shared compilation cache, and random numbers whose seed a failure prints."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import object_store

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

CACHE = Path.home() / ".cache" / "lmjax" / "compiled" / jax.__version__
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of the random inputs")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--seed")


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """Random inputs, the same in every run unless ``--seed`` asks for others: a suite that gates must not draw lots."""
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """A server that speaks S3, on loopback."""
    with object_store.s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket of its own, as ``s3://name``, and an empty cache of this machine beside it."""
    import fsspec

    for name, value in object_store.environment(s3_address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    path = f"s3://{tmp_path.name.replace('_', '-').lower()[-40:]}-{os.getpid()}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(path)
    return path


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = (yield).get_result()
    if report.failed and "seed" in getattr(item, "fixturenames", ()):
        seed = item.config.getoption("--seed")
        report.sections.append(("seed", f"run again with: pytest --seed {seed} '{item.nodeid}'"))
