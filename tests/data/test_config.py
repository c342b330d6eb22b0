"""Data configs: built from JSON by kind, and refused with a reason where fields make no sense."""

import pydantic
import pytest

from lmjax.data.config import DataConfig, FilesSource, JsonlSource, StdlibSource
from lmjax.errors import InputError

pytestmark = pytest.mark.fast
FILES = FilesSource(path="texts")


def test_sources_are_told_apart_by_their_kind():
    text = (
        '{"path": "d", "sequence_length": 8, "sources": [{"kind": "files", "path": "a", "extensions": [".c"]}, '
        '{"kind": "jsonl", "path": "b"}, {"kind": "stdlib"}]}'
    )
    found = pydantic.TypeAdapter(DataConfig).validate_json(text)
    assert found.sources == (FilesSource(path="a", extensions=(".c",)), JsonlSource(path="b"), StdlibSource())


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
