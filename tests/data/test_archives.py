"""Packed files: they give what the plain ones do, and a broken one is refused."""

import gzip
import json

import pytest

from lmjax.data import text_files
from lmjax.data.config import FilesSource, JsonlSource
from lmjax.data.sources import cut, list_files, read_texts
from lmjax.errors import InputError
from tests.data.archive_files import write_packed

pytestmark = pytest.mark.fast


def texts(source, table_bytes=1 << 20):
    return [text for piece in cut(list_files([source]), table_bytes) for text in read_texts(piece)]


LINES = [json.dumps({"id": number, "text": f"text {number} é\n" * (number % 5)}) for number in range(60)]


@pytest.mark.parametrize("end", [".gz", ".zst"])
@pytest.mark.parametrize("table_bytes", [10, 1 << 20])
def test_packed_lines_are_the_lines(tmp_path, end, table_bytes):
    content = "\n".join(LINES).encode()
    write_packed(tmp_path / f"a.jsonl{end}", content)
    files = list_files([JsonlSource(path=str(tmp_path))])
    assert [file.name for file in files] == [f"a.jsonl{end}"]
    assert len(list(cut(files, table_bytes))) == 1, "it cannot be read but from its beginning"
    assert texts(JsonlSource(path=str(tmp_path)), table_bytes) == [json.loads(line)["text"] for line in LINES]


def test_archives_one_after_the_other_in_a_file_are_all_read(tmp_path):
    for end in (".gz", ".zst"):
        parts = []
        for number in range(3):
            write_packed(tmp_path / f"part{end}", "".join(f"{line}\n" for line in LINES[number::3]).encode())
            parts.append((tmp_path / f"part{end}").read_bytes())
        (tmp_path / f"joined.jsonl{end}").write_bytes(b"".join(parts))
    joined = [json.loads(line)["text"] for number in range(3) for line in LINES[number::3]]
    assert texts(JsonlSource(path=str(tmp_path))) == joined * 2


def test_a_directory_gives_packed_files_beside_plain_ones(tmp_path):
    for name in ("a.txt", "b.txt.gz", "c.md.zst", "d.py.gz", "e.gz", "f.tar.gz"):
        write_packed(tmp_path / name, b"text")
    assert [file.name for file in list_files([FilesSource(path=str(tmp_path))])] == ["a.txt", "b.txt.gz", "c.md.zst"]
    assert [file.name for file in list_files([FilesSource(path=str(tmp_path), content="code")])] == ["d.py.gz"]
    assert texts(FilesSource(path=str(tmp_path))) == ["text"] * 3


@pytest.mark.parametrize("document_bytes", [1, 7, 64, 300])
@pytest.mark.parametrize("search_bytes", [4, 1 << 16])
def test_a_long_packed_text_is_cut_as_the_plain_one_is(tmp_path, rng, monkeypatch, document_bytes, search_bytes):
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", document_bytes)
    monkeypatch.setattr(text_files, "LINE_SEARCH_BYTES", search_bytes)
    characters = ["a", "é", "日", "😀", "\n", "word "]
    whole = "".join(rng.choice(characters, 300))
    cuts = set()
    for length in (0, 1, 64, 300):
        content = whole[:length].encode()
        (tmp_path / "plain.txt").write_bytes(content)
        plain = texts(FilesSource(path=str(tmp_path / "plain.txt")))
        for end in (".gz", ".zst"):
            write_packed(tmp_path / f"packed.txt{end}", content)
            assert texts(FilesSource(path=str(tmp_path / f"packed.txt{end}"))) == plain
        assert "".join(plain) == whole[:length]
        cuts.add(len(plain))
    assert len(cuts) > 1, "the long ones are cut"


@pytest.mark.parametrize(("end", "kind"), [(".gz", "gzip"), (".zst", "zstd")])
def test_a_broken_archive_is_refused_by_name(tmp_path, end, kind):
    path = tmp_path / f"a.jsonl{end}"
    write_packed(path, "\n".join(LINES).encode())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], b"no archive at all", whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"a\.jsonl{end} is a broken {kind} archive \(.+\); copy it anew"):
            texts(JsonlSource(path=str(path)))
    path.write_bytes(whole)
    assert len(texts(JsonlSource(path=str(path)))) == len(LINES)


def test_a_flipped_bit_in_a_gzip_archive_is_found(tmp_path):
    path = tmp_path / "a.txt.gz"
    packed = bytearray(gzip.compress(b"some text " * 50, mtime=0))
    packed[-6] ^= 1  # of its checksum
    path.write_bytes(packed)
    with pytest.raises(InputError, match="broken gzip archive"):
        texts(FilesSource(path=str(path)))


def test_a_bad_line_in_an_archive_is_skipped_and_named(tmp_path):
    write_packed(tmp_path / "a.jsonl.gz", b'{"text": "good"}\nbad\n{"text": "\xff"}\n{"text": "last"}')
    good, *skipped, last = texts(JsonlSource(path=str(tmp_path)))
    assert (good, last) == ("good", "last")
    assert [(skip.name, skip.reason[:8]) for skip in skipped] == [
        ("a.jsonl.gz, line at byte 17", "not JSON"),
        ("a.jsonl.gz, line at byte 21", "not UTF-"),
    ]
