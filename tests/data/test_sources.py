"""Sources: which files are found, and that cutting them into pieces loses and doubles nothing."""

import json
import os

import pytest

from lmjax.data import text_files
from lmjax.data.config import FilesSource, JsonlSource, StdlibSource
from lmjax.data.index import SkippedInput
from lmjax.data.sources import cut, list_files, read_texts
from lmjax.errors import InputError

pytestmark = pytest.mark.fast


def names(*found):
    return [file.name for file in list_files(found)]


def texts(source, jsonl_bytes=1 << 20):
    return [text for piece in cut(list_files([source]), jsonl_bytes) for text in read_texts(piece)]


def test_a_directory_gives_the_files_of_its_content(corpus):
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden" / "a.md").write_text("no")
    code = names(FilesSource(path=str(corpus), content="code"))
    assert code == ["copy.py", *(f"inner/{number:02d}.py" for number in range(24))]
    prose = names(FilesSource(path=str(corpus)))
    assert prose == [*(f"{number}.md" for number in range(6)), "empty.md", "latin.md"]
    assert names(FilesSource(path=str(corpus), extensions=(".py",))) == code


def test_a_file_and_a_glob(corpus):
    assert names(FilesSource(path=str(corpus / "3.md"))) == ["3.md"]
    assert names(FilesSource(path=f"{corpus}/**/0[12].py")) == ["inner/01.py", "inner/02.py"]
    assert names(FilesSource(path=f"{corpus}/inner/0[12].py")) == ["01.py", "02.py"]


def test_names_do_not_depend_on_where_a_source_lies(corpus, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere" / "deeper"
    moved.parent.mkdir()
    before = names(FilesSource(path=str(corpus)), FilesSource(path=f"{corpus}/*/*.py"))
    corpus.rename(moved)
    monkeypatch.chdir(moved.parent)
    assert names(FilesSource(path="deeper"), FilesSource(path="deeper/*/*.py")) == before


@pytest.mark.parametrize(
    ("path", "message"),
    [("none", "there is no file"), ("*.none", "matches no file"), ("inner", r"ends in \.markdown, \.md")],
)
def test_a_source_without_files_is_an_input_error(corpus, path, message):
    with pytest.raises(InputError, match=rf"data\.sources\.1\.path: .*{message}"):
        list_files([FilesSource(path=str(corpus)), FilesSource(path=str(corpus / path))])


def test_extensions_of_a_file_are_refused(corpus):
    with pytest.raises(InputError, match=r"data\.sources\.0\.extensions"):
        list_files([FilesSource(path=str(corpus / "3.md"), extensions=(".md",))])


def test_an_undecodable_file_is_skipped_and_named(corpus):
    found = texts(FilesSource(path=str(corpus)))
    skipped = [text for text in found if isinstance(text, SkippedInput)]
    assert [(skip.name, skip.reason[:9]) for skip in skipped] == [("latin.md", "not UTF-8")]
    assert len(found) == 8


def test_a_file_name_that_is_no_text_can_be_written_down(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb") as file:
        file.write(b"text")
    assert names(FilesSource(path=str(tmp_path))) == ["\\xff.txt"]
    assert texts(FilesSource(path=str(tmp_path))) == ["text"]


@pytest.mark.parametrize("document_bytes", [1, 5, 64, 1000])
def test_a_long_file_is_cut_at_ends_of_lines(tmp_path, monkeypatch, document_bytes):
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", document_bytes)
    text = "".join(f"line {number} é 日本 😀{'.' * (number % 13)}\n" for number in range(30)) + "no newline at the end"
    (tmp_path / "a.txt").write_text(text)
    found = texts(FilesSource(path=str(tmp_path)))
    assert "".join(found) == text
    assert all(part == "" or part.endswith(("\n", "end")) for part in found)
    assert (len([part for part in found if part]) == 31) == (document_bytes < 20)


@pytest.mark.parametrize("text", ["日本語" * 40, "😀" * 40, "é" * 40, "a日" * 40])
def test_a_line_that_does_not_end_is_cut_between_characters(tmp_path, monkeypatch, text):
    monkeypatch.setattr(text_files, "LINE_SEARCH_BYTES", 4)
    (tmp_path / "a.txt").write_text(text)
    for size in (1, 2, 3, 7, 20):
        monkeypatch.setattr(text_files, "DOCUMENT_BYTES", size)
        assert "".join(texts(FilesSource(path=str(tmp_path)))) == text


@pytest.mark.parametrize("jsonl_bytes", [1, 10, 50, 1 << 20])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_every_line_of_a_jsonl_file_is_read_once_however_it_is_cut(tmp_path, jsonl_bytes, end):
    lines = [json.dumps({"id": number, "body": f"text {number}\n" * (number % 5)}) for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + end)
    found = texts(JsonlSource(path=str(tmp_path), text_field="body"), jsonl_bytes)
    assert found == [json.loads(line)["body"] for line in lines]


def test_lines_that_hold_no_text_are_skipped_and_named(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"not json",
        b'{"body": "x"}',
        b'{"text": 3}',
        b"[1]",
        b'{"text": "\xff"}',
        b"",
        b"[" * 9999,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    good, *skipped = texts(JsonlSource(path=str(tmp_path / "a.jsonl")))
    assert good == "good"
    assert [skip.reason.split(" (")[0] for skip in skipped] == [
        "not JSON",
        "no object with the key 'text'",
        "the value of 'text' is not text",
        "no object with the key 'text'",
        "not UTF-8",
        "not JSON",
    ]
    assert skipped[0].name == "a.jsonl, line at byte 17"


def test_the_standard_library_is_there_without_its_tests():
    found = list_files([StdlibSource()])
    by_name = {file.name: file for file in found}
    assert by_name["json/decoder.py"].content == "code"
    assert {file.content for file in found if file.name.endswith(".txt")} <= {"prose"}
    directories = {part for name in by_name for part in name.split("/")[:-1]}
    assert not directories & {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    assert 8e6 < sum(file.size for file in found) < 30e6
