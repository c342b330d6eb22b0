"""Csv and Parquet: every row once, a bad row skipped, a wrong column or file refused."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from lmjax.data import parquet, records
from lmjax.data.config import CsvSource, JsonlSource, ParquetSource
from lmjax.data.index import SkippedInput
from lmjax.data.sources import check_columns, cut, list_files, read_texts
from lmjax.errors import InputError
from tests.data.archive_files import csv_bytes, write_packed, write_parquet

pytestmark = pytest.mark.fast
ROWS = [
    {
        "id": number,
        "title": f"title {number}",
        "message": {"content": f'a "quoted" line\nand é {number}, {"x" * (number % 50)}', "size": number},
        "turns": [{"text": f"turn {number}"}],
    }
    for number in range(200)
]


def texts(source, table_bytes=1 << 20):
    return [text for piece in cut(list_files([source]), table_bytes) for text in read_texts(piece)]


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_file_gives_every_row_once(tmp_path, end, delimiter):
    table = [["id", "title", "body"]]
    table += [[str(row["id"]), row["title"], row["message"]["content"]] for row in ROWS]
    write_packed(tmp_path / f"a.csv{end}", b"\xef\xbb\xbf" + csv_bytes(table, delimiter))
    for text_field, expected in (
        ("body", [row["message"]["content"] for row in ROWS]),
        ("{title}: {body}", [f"{row['title']}: {row['message']['content']}" for row in ROWS]),
    ):
        source = CsvSource(path=str(tmp_path), text_field=text_field, delimiter=delimiter)
        check_columns(list_files([source]))
        assert texts(source, 10) == texts(source) == expected


def test_a_bad_row_of_a_csv_file_is_skipped_and_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,good\n\n2\n3,bad \xff\n4,a,b\n5,"two\nlines"\n6,last')
    found = texts(CsvSource(path=str(tmp_path)))
    assert [text for text in found if isinstance(text, str)] == ["good", "two\nlines", "last"]
    assert [(skip.name, skip.reason) for skip in found if isinstance(skip, SkippedInput)] == [
        ("a.csv, line 4", "1 values, and the header has 2"),
        ("a.csv, line 5", "not UTF-8"),
        ("a.csv, line 6", "3 values, and the header has 2"),
    ]
    (tmp_path / "a.csv").write_bytes(b"")
    assert texts(CsvSource(path=str(tmp_path))) == []


def test_a_quote_that_is_never_closed_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_VALUE_CHARACTERS", 1000)
    (tmp_path / "a.csv").write_text('id,text\n1,good\n2,"open\n' + "3,never closed\n" * 500)
    with pytest.raises(InputError, match=r"a\.csv, line \d+: field larger than field limit.*close the quote"):
        texts(CsvSource(path=str(tmp_path)))


@pytest.mark.parametrize("table_bytes", [100, 700, 1 << 20])
@pytest.mark.parametrize("rows_a_group", [7, 1000])
def test_a_parquet_file_gives_every_row_once_however_it_is_cut(tmp_path, table_bytes, rows_a_group, monkeypatch):
    monkeypatch.setattr(parquet, "READ_BYTES", 400)
    rows = ROWS[:30]
    write_parquet(tmp_path / "a.parquet", rows, rows_a_group)
    for text_field, expected in (
        ("title", [row["title"] for row in rows]),
        ("{title}\n{message.content}", [f"{row['title']}\n{row['message']['content']}" for row in rows]),
        ("turns.0.text", [row["turns"][0]["text"] for row in rows]),
    ):
        source = ParquetSource(path=str(tmp_path), text_field=text_field)
        check_columns(list_files([source]))
        assert texts(source, table_bytes) == expected


def test_only_the_columns_of_the_text_are_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", ROWS, 100)
    with pyarrow.parquet.ParquetFile(tmp_path / "a.parquet") as file:
        for text_field, columns in (("message.content", ["message.content"]), ("turns.0.text", ["turns"])):
            template = parquet.Template(("", ""), (text_field,))
            assert parquet.check_parquet_columns(file, "a.parquet", template) == columns


def test_a_row_without_text_is_skipped_and_named(tmp_path):
    table = pyarrow.table({"id": [0, 1, 2, 3], "text": ["good", None, "bad", "last"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes().replace(b"bad", b"b\xffd"))
    found = texts(ParquetSource(path=str(tmp_path)))
    assert [text for text in found if isinstance(text, str)] == ["good", "last"]
    assert [(skip.name, skip.reason) for skip in found if isinstance(skip, SkippedInput)] == [
        ("a.parquet, row 1", "the value of 'text' is not text"),
        ("a.parquet, row 2", "not UTF-8"),
    ]


@pytest.fixture
def tables(tmp_path):
    """A source of each kind with the same rows, by kind."""
    write_parquet(tmp_path / "a.parquet", ROWS, 50)
    (tmp_path / "a.jsonl").write_text("not json\n[]\n" + "".join(f"{json.dumps(row)}\n" for row in ROWS))
    (tmp_path / "a.csv").write_bytes(csv_bytes([["id", "title"], *([str(row["id"]), row["title"]] for row in ROWS)]))
    return {"parquet": ParquetSource, "jsonl": JsonlSource, "csv": CsvSource}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("text_field", ["body", "{title}{body}", "body.inner"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tables, tmp_path, kind, text_field):
    good, bad = (tables[kind](path=str(tmp_path), text_field=found) for found in ("title", text_field))
    check_columns(list_files([good]))
    with pytest.raises(InputError, match=rf"a\.{kind} has no column .*body.*; it has 'id', 'title'.*set text_field"):
        check_columns(list_files([good, bad]))
    if kind != "jsonl":
        with pytest.raises(InputError, match="has no column"):
            texts(bad)


def test_a_jsonl_source_needs_the_key_in_one_line_of_all_its_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"other": "x"}\n' * 3)
    (tmp_path / "b.jsonl").write_text('{"other": "x"}\n{"text": "here"}\n')
    check_columns(list_files([JsonlSource(path=str(tmp_path))]))
    (tmp_path / "b.jsonl").write_text('{"more": "x"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl has no column 'text'; it has 'other';"):
        check_columns(list_files([JsonlSource(path=str(tmp_path))]))
    (tmp_path / "a.jsonl").write_text("no object\n")
    (tmp_path / "b.jsonl").write_text("")
    check_columns(list_files([JsonlSource(path=str(tmp_path))]))


@pytest.mark.parametrize(
    ("text_field", "message"),
    [
        ("id", "the column 'id' is int64, not text"),
        ("message", "the column 'message' is struct<"),
        ("message.text", r"has no column 'message.text'; it has 'message.content', 'message.size'"),
        ("title.inner", "has no column 'title.inner'; it has 'title of type string'"),
    ],
)
def test_a_parquet_column_that_is_no_text_is_refused(tables, tmp_path, text_field, message):
    with pytest.raises(InputError, match=message):
        check_columns(list_files([ParquetSource(path=str(tmp_path), text_field=text_field)]))


def test_a_broken_parquet_file_is_refused_by_name(tmp_path, rng):
    path = tmp_path / "a.parquet"
    rows = [{"text": "".join(map(chr, rng.integers(97, 123, 500)))} for _ in range(40)]
    write_parquet(path, rows, 10)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (whole[: len(whole) // 2], b"no parquet at all", b"", bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.parquet is no Parquet file, or a broken one \(.+\); copy it anew"):
            texts(ParquetSource(path=str(tmp_path)))
    path.write_bytes(whole)
    assert len(texts(ParquetSource(path=str(tmp_path)))) == 40
