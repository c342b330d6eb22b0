"""Data configs: built from JSON by kind, and refused with a reason where fields make no sense."""

import pydantic
import pytest

from lmjax.data.config import (
    CsvSource,
    DataConfig,
    FilesSource,
    JsonlSource,
    ParquetSource,
    StdlibSource,
    WeightsFromStep,
)
from lmjax.errors import InputError

pytestmark = pytest.mark.fast
FILES = FilesSource(path="texts")


def test_sources_are_told_apart_by_their_kind():
    text = (
        '{"path": "d", "sequence_length": 8, "sources": [{"kind": "files", "path": "a", "extensions": [".c"]}, '
        '{"kind": "jsonl", "path": "b"}, {"kind": "stdlib"}, {"kind": "csv", "path": "c"}, '
        '{"kind": "parquet", "path": "d"}]}'
    )
    found = pydantic.TypeAdapter(DataConfig).validate_json(text)
    assert found.sources == (
        FilesSource(path="a", extensions=(".c",)),
        JsonlSource(path="b"),
        StdlibSource(),
        CsvSource(path="c"),
        ParquetSource(path="d"),
    )
    assert found.mixture is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"sources": ()}, "sources is empty"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"normalize": "NFD"}, "normalize"),
        ({"sources": (FilesSource(path="a", content="code"),), "ftfy": False}, "ftfy=false changes nothing"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(fields, message):
    good = {"path": "d", "sources": (FILES,), "sequence_length": 8}
    DataConfig(**good)
    with pytest.raises(InputError, match=message):
        DataConfig(**{**good, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"path": "a", "extensions": ()}, "extensions is empty"),
        ({"path": "a", "extensions": ("txt",)}, "begins with a dot"),
        ({"path": "a", "content": "poems"}, "content"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        FilesSource(**fields)


@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        (JsonlSource, {"text_field": ""}, "text_field is empty"),
        (JsonlSource, {"text_field": "{a"}, "text_field is '{a'"),
        (CsvSource, {"delimiter": "||"}, "delimiter is"),
        (CsvSource, {"delimiter": '"'}, "delimiter is"),
        (ParquetSource, {"path": ""}, "path is empty"),
        (ParquetSource, {"delimiter": ","}, "delimiter"),
        (FilesSource, {"name": "a.b"}, "name is 'a.b'; it has letters"),
        (FilesSource, {"name": ""}, "name is ''"),
        (FilesSource, {"weight": -1}, "weight is -1"),
        (FilesSource, {"epochs": 0}, "epochs is 0"),
    ],
)
def test_a_field_of_a_source_that_makes_no_sense_is_refused(source, fields, message):
    with pytest.raises(InputError, match=message):
        source(**{"path": "a", **fields})


def mixed(*sources, **fields):
    return DataConfig(path="d", sequence_length=8, sources=tuple(FilesSource(path="a", **s) for s in sources), **fields)


A, B = {"name": "a", "weight": 3}, {"name": "b", "weight": 0.5}


def test_a_mixture_has_the_weights_of_the_sources_and_then_those_of_each_step():
    data = mixed({**A, "epochs": 2}, B, weights_by_step=(WeightsFromStep(from_step=5, weights={"b": 1, "a": 0}),))
    assert data.mixture is not None
    assert data.mixture.sources == ("a", "b")
    assert data.mixture.epochs == (2, None)
    assert data.mixture.stages == ((0, (3.0, 0.5)), (5, (0.0, 1.0)))
    assert mixed({"name": "a"}, {"name": "b"}).mixture is None


@pytest.mark.parametrize(
    ("sources", "schedule", "message"),
    [
        ([A, {}], [], "sources.1 has no name, but others have"),
        ([A, {"name": "A", "weight": 1}], [], "sources.1 has the name of another one, A"),
        ([A, {"name": "b"}], [], "sources.1 has no weight, but others have"),
        ([{"weight": 1}], [], "weights and no names"),
        ([{"name": "a", "epochs": 2}], [], "sources.0 has epochs, which need weights"),
        ([{**A, "weight": 0}], [], r"sources: weights are \[0.0\].*above 0"),
        ([A, {**B, "weight": 0.1234567}], [], "sources: weights .* round them"),
        ([{"name": "a"}], [(1, {"a": 1})], "weights_by_step needs sources with weights"),
        ([A, B], [(1, {"a": 1})], "weights_by_step.0 has weights for a; it has to have one for each of a, b"),
        ([A, B], [(1, {"a": 1, "b": 1, "c": 1})], "weights_by_step.0 has weights for a, b, c"),
        ([A, B], [(4, {"a": 1, "b": 1}), (4, {"a": 1, "b": 2})], "weights_by_step.1 is from step 4, not after step 4"),
        ([A, B], [(4, {"a": 0, "b": 0})], "weights_by_step.0: weights are"),
        ([A, B], [(0, {"a": 1, "b": 1})], "from_step is 0; it has to be 1 or more"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(sources, schedule, message):
    def made():
        steps = tuple(WeightsFromStep(from_step=step, weights=weights) for step, weights in schedule)
        return mixed(*sources, weights_by_step=steps)

    with pytest.raises(InputError, match=message):
        made()
