"""Files as they are held: what comes out is what went in, and little memory is taken for each."""

import tracemalloc

import numpy as np
import pytest

from lmjax.data.config import DataConfig, FilesSource
from lmjax.data.input_files import InputFile, InputFiles
from lmjax.data.parts import Parts, Recipe
from lmjax.data.prepare import prepare
from lmjax.data.tokenizer import BytesTokenizer

pytestmark = pytest.mark.fast

FILES = [
    InputFile("/corpus/a/b.py", "a/b.py", 0, 7, 1_700_000_000_000_000_001, "code"),
    InputFile("/corpus/\udcff.md", "\\xff.md", 0, 0, -1, "prose"),  # a name on the disk that is no UTF-8
    InputFile("s3://bucket/é.jsonl", "é.jsonl", 1, 2**40, 2**62, "prose", "jsonl", "text.0"),
    InputFile("t.csv", "t.csv", 2, 1, 0, "prose", "csv", "{a}: {b}", "\t"),
    InputFile("/elsewhere/u.csv", "../elsewhere/u.csv", 2, 1, 0, "prose", "csv", "{a}: {b}", "\t"),
]


def test_files_come_out_as_they_went_in():
    files = InputFiles(FILES[:2])
    files.extend(FILES[2:])
    assert len(files) == len(FILES)
    assert list(files) == FILES
    assert [files[number] for number in range(-len(FILES), 0)] == FILES
    assert files[1:4] == FILES[1:4]
    with pytest.raises(IndexError):
        files[len(FILES)]


def test_they_are_sorted_by_name_and_then_by_path():
    named_alike = [FILES[0]._replace(path=path, name=name) for path, name in (("/b/x", "x"), ("/a/x", "x"), ("/z", "w"))]
    files = InputFiles(FILES[2:3])
    files.extend_sorted(InputFiles([*named_alike, FILES[1]]))
    assert list(files) == [FILES[2], FILES[1], named_alike[2], named_alike[1], named_alike[0]]


def test_a_stamp_of_64_bits_without_a_sign_stays_a_number_of_its_own():
    stamps = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
    assert len({file.mtime_ns for file in InputFiles(FILES[0]._replace(mtime_ns=stamp) for stamp in stamps)}) == 5


def held(make):
    """What ``make`` returns, and the bytes that it holds in memory."""
    tracemalloc.start()
    try:
        found = make()
        return found, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def named(number):
    return FILES[0]._replace(path=f"/corpus/{number:09d}.py", name=f"{number:09d}.py", size=1000, mtime_ns=number)


def test_a_million_files_take_the_memory_of_their_paths_and_of_a_few_numbers(tmp_path):
    count = 20_000
    files, taken = held(lambda: InputFiles(named(number) for number in range(count)))
    assert taken < count * (len(named(0).path) + 50), "a path, five numbers, and room to grow"
    recipe = Recipe("NFC", False, 0.1, "tokenizer", "fingerprint", "uint16")
    parts, taken = held(lambda: Parts(files, recipe, tmp_path))
    assert len(parts.parts) < 100
    assert taken < 30 * count
    _, taken = held(lambda: [named(number) for number in range(count)])
    assert taken > 200 * count, "what the same files take as objects"


def test_preparing_takes_little_memory_for_every_further_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lmjax.data.parts.MAX_PIECES", 50)

    def peak(count):
        corpus = tmp_path / f"corpus-{count}"
        corpus.mkdir()
        for number in range(count):
            (corpus / f"{number}.txt").write_text(f"text {number}")
        data = DataConfig(
            path=str(tmp_path / f"dataset-{count}"),
            sources=(FilesSource(path=str(corpus)),),
            sequence_length=32,
            num_workers=1,
        )
        tracemalloc.start()
        try:
            index = prepare(data, BytesTokenizer(), announce=lambda _: None)
            return index, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is imported and cached once
    few, many = peak(200), peak(2200)
    assert [sum(shard.documents for shard in index.shards) for index, _ in (few, many)] == [200, 2200]
    assert np.diff([few[1], many[1]])[0] < 600 * 2000  # a path, of a length that differs by machine, in some places
