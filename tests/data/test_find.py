"""Sources in an object store: the same files and texts as on a disk."""

import json
from pathlib import Path

import pytest
from etils import epath

from lmjax.data.config import CsvSource, FilesSource, JsonlSource, ParquetSource
from lmjax.data.sources import check_columns, cut, list_files, read_texts
from lmjax.errors import InputError
from tests.data.archive_files import csv_bytes, write_packed, write_parquet


@pytest.fixture
def both(tmp_path, bucket):
    """The same files on this disk and in a store."""
    root = tmp_path / "texts"
    (root / "inner").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "inner" / "a.txt").write_text("first\n")
    (root / ".hidden" / "b.txt").write_text("hidden")
    write_packed(root / "c.txt.zst", b"second\n" * 50)
    write_packed(root / "d.jsonl.gz", "".join(f"{json.dumps({'text': str(n)})}\n" for n in range(50)).encode())
    (root / "e.jsonl").write_text("".join(f"{json.dumps({'text': f'line {n}'})}\n" for n in range(50)))
    (root / "f.csv").write_bytes(csv_bytes([["text"], *([f"row {n}"] for n in range(9))]))
    write_parquet(root / "g.parquet", [{"text": f"row {n}"} for n in range(50)], 7)
    for file in root.rglob("*"):
        if file.is_file():
            target = epath.Path(bucket) / "texts" / file.relative_to(root).as_posix()
            target.write_bytes(file.read_bytes())
    return str(root), f"{bucket}/texts"


def found(source):
    files = list_files([source])
    check_columns(files)
    return [(file.name, file.size) for file in files], [text for piece in cut(files, 200) for text in read_texts(piece)]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (FilesSource, ""),
        (FilesSource, "/inner/a.txt"),
        (FilesSource, "/*/*.txt"),
        (JsonlSource, ""),
        (JsonlSource, "/*.jsonl"),
        (CsvSource, ""),
        (ParquetSource, "/g.parquet"),
    ],
)
def test_a_source_in_a_store_gives_what_it_gives_on_a_disk(both, kind, path):
    local, remote = (found(kind(path=root + path)) for root in both)
    assert remote == local
    assert local[1]


def test_an_object_that_changes_has_another_stamp(both):
    source = JsonlSource(path=f"{both[1]}/e.jsonl")
    (before,) = list_files([source])
    assert list(list_files([source])) == [before]
    content = epath.Path(source.path).read_bytes()
    epath.Path(source.path).write_bytes(content.replace(b"line 7", b"line X"))
    (after,) = list_files([source])
    assert (after.size, after.mtime_ns == before.mtime_ns) == (before.size, False)


@pytest.mark.parametrize("path", ["/none", "/none/*.txt", "/inner"])
def test_a_source_without_objects_is_an_input_error(both, path):
    with pytest.raises(InputError, match=r"data\.sources\.0\.path: .*(no object|matches no object)"):
        list_files([JsonlSource(path=both[1] + path)])


def test_a_bucket_that_is_not_there_is_an_input_error(both):
    with pytest.raises(InputError, match=r"data\.sources\.0\.path|the object store cannot be used"):
        list_files([JsonlSource(path="s3://no-such-bucket-here/texts")])
    assert not Path("s3:").exists()
