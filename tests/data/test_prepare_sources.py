"""Preparation of archives, tables and named sources: the same bytes after any kill and with any number of workers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lmjax.data import parts, plans
from lmjax.data import prepare as preparation
from lmjax.data.batches import Batches
from lmjax.data.config import CsvSource, DataConfig, FilesSource, JsonlSource, ParquetSource, WeightsFromStep
from lmjax.data.index import Index, fingerprint, read_index
from lmjax.data.inspect import inspect_dataset
from lmjax.data.plans import ensure_plans
from lmjax.data.prepare import check_options, prepare
from lmjax.data.shards import read_documents
from lmjax.data.tokenizer import BytesTokenizer, load_tokenizer
from lmjax.errors import InputError
from tests.data.archive_files import csv_bytes, write_packed, write_parquet

BYTES = BytesTokenizer()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "MIN_PART_BYTES", 800)
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 800)
    monkeypatch.setattr(parts, "VOLUME_CHARACTERS", 500)
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 200)


def text(kind: str, number: int) -> str:
    return f"{kind} {number}: {' '.join(chr(97 + number * k % 26) * 3 for k in range(4 + number % 9))}"


TEXTS = {kind: [text(kind, number) for number in range(40)] for kind in ("jsonl", "csv", "parquet", "files")}
TEXTS["parquet"][5] = TEXTS["jsonl"][7]  # a duplicate, which stays where it comes first


@pytest.fixture
def config(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    write_packed(root / "a.jsonl.gz", "".join(json.dumps({"text": t}) + "\n" for t in TEXTS["jsonl"]).encode())
    write_packed(root / "a.csv.zst", csv_bytes([["body"], *([t] for t in TEXTS["csv"])]))
    write_parquet(root / "a.parquet", [{"doc": {"text": t}} for t in TEXTS["parquet"]], rows_a_group=9)
    for number, content in enumerate(TEXTS["files"]):
        write_packed(root / f"{number:02d}.txt{('', '.gz', '.zst')[number % 3]}", content.encode())
    return DataConfig(
        path=str(tmp_path / "dataset"),
        sources=(
            JsonlSource(path=str(root), name="lines"),
            CsvSource(path=str(root), text_field="body", name="table"),
            ParquetSource(path=str(root), text_field="doc.text", name="Parquet_1"),
            FilesSource(path=str(root), name="single-files"),
        ),
        sequence_length=32,
        validation_fraction=0.2,
        shard_bytes=2500,
        num_workers=1,
    )


def run(config, **changes) -> tuple[Index, str]:
    said = []
    index = prepare(dataclasses.replace(config, **changes), BYTES, announce=said.append)
    return index, "\n".join(said)


def content(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def texts_of(directory, index, split, source=None):
    documents = read_documents(directory, index.of_source(source), split)
    return [load_tokenizer(directory).decode(documents[number][1:-1]) for number in range(len(documents))]


def unnamed(config):
    return tuple(dataclasses.replace(source, name=None) for source in config.sources)


def weighted(config, *weights, epochs=None):
    return tuple(
        dataclasses.replace(source, weight=weight, epochs=epochs)
        for source, weight in zip(config.sources, weights, strict=True)
    )


@pytest.mark.fast
def test_every_source_has_shards_of_its_own_in_its_order(config):
    index, _ = run(config)
    for source, kind in zip(config.sources, TEXTS, strict=True):
        both = [texts_of(config.path, index, split, source.name) for split in ("train", "validation")]
        found = both[0] + both[1]
        expected = [text for text in TEXTS[kind] if kind != "parquet" or text not in TEXTS["jsonl"]]
        assert sorted(found) == sorted(expected)
        for texts in both:
            assert texts == [text for text in expected if text in set(texts)]
    assert index.duplicate_documents == 1
    assert index.sources("train") == ["lines", "table", "Parquet_1", "single-files"]
    assert any(shard.file.startswith("train.Parquet_1-00001-of-") for shard in index.shards)


@pytest.mark.fast
def test_names_part_the_documents_and_change_nothing_else(config, tmp_path):
    named, _ = run(config)
    plain, _ = run(config, sources=unnamed(config), path=str(tmp_path / "plain"))
    for split in ("train", "validation"):
        assert texts_of(config.path, named, split) == texts_of(str(tmp_path / "plain"), plain, split)
    assert named.token_counts == plain.token_counts
    assert {shard.source for shard in plain.shards} == {None}
    assert fingerprint(named) != fingerprint(plain)
    for name in ("plan-train-best_fit-32.pieces.npy", "plan-validation-best_fit-32.pieces.npy"):
        assert content(config.path)[name] == content(tmp_path / "plain")[name], "the one stream of both is the same"
    with pytest.raises(InputError, match=r"data\.sources: prepared with"):
        run(config, sources=unnamed(config))


@pytest.mark.fast
def test_a_part_of_any_size_is_kept_in_volumes_of_bounded_size(config, tmp_path, monkeypatch):
    sizes = []
    savez = np.savez
    monkeypatch.setattr(
        np, "savez", lambda file, **arrays: (sizes.append(arrays["train_tokens"].size), savez(file, **arrays))
    )
    run(config)
    assert max(sizes) < 500 + 2 * 200
    bounded, before = len(sizes), content(config.path)
    sizes.clear()
    monkeypatch.setattr(parts, "VOLUME_CHARACTERS", 1 << 20)
    run(config, path=str(tmp_path / "whole"))
    assert len(sizes) < bounded
    assert max(sizes) > 1000, "control: an archive is one piece"
    assert content(tmp_path / "whole") == before


def test_the_dataset_does_not_depend_on_the_number_of_workers(config, tmp_path):
    run(config)
    run(config, path=str(tmp_path / "by-2"), num_workers=2)
    assert content(tmp_path / "by-2") == content(config.path)
    run(config, path=str(tmp_path / "other"), validation_fraction=0.3)
    assert content(tmp_path / "other") != content(config.path), "control"


class Killed(BaseException):
    """What a kill is to the code that it ends."""


@pytest.mark.fast
def test_killed_at_any_volume_it_goes_on_and_ends_with_the_same_bytes(config, tmp_path, monkeypatch):
    run(config)
    whole = content(config.path)
    write = parts._write
    total = 0
    for number in range(1, 100):
        directory = tmp_path / f"killed-{number}"
        calls = 0

        def killing(*args):
            nonlocal calls
            calls += 1
            write(*args)
            if calls == number:  # noqa: B023
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(parts, "_write", killing)
            try:
                run(config, path=str(directory))
                break
            except Killed:
                total += 1
        if number % 5 == 1:
            run(config, path=str(directory))
            assert content(directory) == whole
    assert total > 10
    assert content(directory) == whole, "without a kill"


@pytest.mark.fast
@pytest.mark.parametrize("num_sources", [1, 4])
def test_plans_are_made_without_reading_the_shards_again_and_are_those_of_a_reading(config, monkeypatch, num_sources):
    """Of one source without a name, and of a mixture."""
    alone = (dataclasses.replace(config.sources[0], name=None),)
    changes = {"sources": weighted(config, 1, 2, 3, 4) if num_sources > 1 else alone, "shard_bytes": 900}
    read = plans.read_documents
    monkeypatch.setattr(plans, "read_documents", None)
    index, _ = run(config, **changes)
    made = sorted(Path(config.path).glob("plan-*"))
    assert len(made) == 3 * (num_sources + 1), "of each source, and of the validation split"
    assert len(index.shards) > num_sources + 1, "some splits are in several shards"
    written = {file: file.read_bytes() for file in made}
    monkeypatch.setattr(plans, "read_documents", read)
    for file in made:
        file.unlink()
    assert "already prepared" in run(config, **changes)[1]
    assert {file: file.read_bytes() for file in sorted(Path(config.path).glob("plan-*"))} == written


@pytest.mark.fast
def test_weights_change_without_preparing_again(config, monkeypatch):
    run(config)
    monkeypatch.setattr(preparation, "_make", None)
    before = content(config.path)
    mixed = weighted(config, 3, 1.5, 0, 1, epochs=2)
    schedule = (WeightsFromStep(from_step=2, weights={"lines": 0, "table": 1, "Parquet_1": 1, "single-files": 1}),)
    index, said = run(config, sources=mixed, weights_by_step=schedule)
    assert "already prepared" in said
    check_options(config.path, index, dataclasses.replace(config, sources=mixed), BYTES)
    after = content(config.path)
    assert {name: after[name] for name in before} == before
    assert {name.split("-best")[0] for name in after.keys() - before.keys()} == {
        f"plan-train.{source.name}" for source in config.sources
    }
    data = dataclasses.replace(config, sources=mixed, weights_by_step=schedule)
    found = ensure_plans(data, index)
    source = Batches(config.path, index, found.train, global_batch_size=6, seed=0, mixture=data.mixture, steps=4)
    assert [source.mixture(step) for step in (0, 1, 2)] == [
        {"lines": 4, "table": 1, "Parquet_1": 0, "single-files": 1},
        {"lines": 3, "table": 2, "Parquet_1": 0, "single-files": 1},
        {"lines": 0, "table": 2, "Parquet_1": 2, "single-files": 2},
    ]
    with pytest.raises(InputError, match=r"(?s)lines: .*it ends in step|table: .*it ends in step"):
        Batches(config.path, index, found.train, global_batch_size=6, seed=0, mixture=data.mixture, steps=10**6)


@pytest.mark.fast
def test_a_column_that_is_not_there_is_refused_before_anything_is_made(config):
    table = dataclasses.replace(config.sources[1], text_field="text")
    with pytest.raises(InputError, match=r"a\.csv\.zst has no column 'text'; it has 'body'"):
        run(config, sources=(config.sources[0], table))
    assert not list(Path(config.path).rglob("*.npz"))


def test_an_archive_that_breaks_is_refused_by_name_and_made_good_goes_on(config, tmp_path):
    archive = tmp_path / "texts" / "a.jsonl.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz is a broken gzip archive"):
        run(config, num_workers=2)
    archive.write_bytes(whole)
    run(config)
    run(config, path=str(tmp_path / "undisturbed"))
    assert content(config.path) == content(tmp_path / "undisturbed")


@pytest.mark.fast
def test_an_inspection_shows_each_source_beside_all(config):
    run(config)
    index = read_index(config.path)
    found = inspect_dataset(config.path, index, sequence_lengths=[32], packing="best_fit", num_samples=1)
    names = [source.name for source in config.sources]
    assert [(split.split, split.source) for split in found.splits] == [
        (split, source) for split in ("train", "validation") for source in (None, *names)
    ]
    for split in ("train", "validation"):
        whole, *each = [row for row in found.splits if row.split == split]
        assert whole.documents == sum(row.documents for row in each)
        assert whole.tokens == sum(row.tokens for row in each)
        assert whole.shards == sum(row.shards for row in each)
    rows = {(row.split, row.source, row.packing): row for row in found.packing}
    for source in (None, *names):
        best, cut = (rows["train", source, packing] for packing in ("best_fit", "concat"))
        assert best.documents_cut <= cut.documents_cut
        assert best.lost_targets <= cut.lost_targets
        assert best.padding >= cut.padding
        assert cut.padding < 32
        assert best.rows * 32 - best.padding == cut.rows * 32 - cut.padding
    assert rows["train", "lines", "concat"].documents_cut > 0
