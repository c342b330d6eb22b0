"""Preparation: text to a dataset, the same bytes after any kill and with any number of workers, and clear refusals."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lmjax.data import parts
from lmjax.data import prepare as preparation
from lmjax.data.config import DataConfig, FilesSource, JsonlSource
from lmjax.data.index import fingerprint, read_index
from lmjax.data.prepare import check_options, prepare
from lmjax.data.shards import read_documents, verify_shards
from lmjax.data.tokenizer import BytesTokenizer, SentencePieceFile, SentencePieceTrained, load_tokenizer
from lmjax.errors import InputError

BYTES = BytesTokenizer()
TRAINED = SentencePieceTrained(vocab_size=320)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "MIN_PART_BYTES", 1500)
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1500)


@pytest.fixture
def config(corpus, tmp_path):
    return DataConfig(
        path=str(tmp_path / "dataset"),
        sources=(FilesSource(path=str(corpus), content="code"), FilesSource(path=str(corpus))),
        sequence_length=32,
        validation_fraction=0.25,
        shard_bytes=3000,
        num_workers=1,
    )


def run(config, tokenizer=BYTES, **changes):
    """The index, and what was announced."""
    said = []
    index = prepare(dataclasses.replace(config, **changes), tokenizer, announce=said.append)
    return index, "\n".join(said)


def content(directory):
    """Every file of a directory, hidden ones included, with its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()
    }


@pytest.mark.fast
@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED])
def test_a_dataset_holds_every_text_once_cleaned_and_framed(config, corpus, tokenizer):
    index, said = run(config, tokenizer)
    assert read_index(config.path) == index
    runtime = load_tokenizer(config.path)
    texts = []
    for split in ("train", "validation"):
        verify_shards(config.path, index, split)
        documents = read_documents(config.path, index, split)
        assert len(documents) == sum(shard.documents for shard in index.shards if shard.split == split) > 0
        for number in range(len(documents)):
            tokens = documents[number].tolist()
            assert (tokens[0], tokens[-1]) == (runtime.bos_id, runtime.eos_id)
            texts.append(runtime.decode(tokens[1:-1]))
    names = [*(f"inner/{number:02d}.py" for number in range(24)), *(f"{number}.md" for number in range(6))]
    assert sorted(texts) == sorted((corpus / name).read_text() for name in names)
    assert (index.duplicate_documents, index.empty_documents, index.num_skipped) == (1, 1, 1)
    assert "skipped latin.md: not UTF-8" in said
    assert sum(shard.split == "train" for shard in index.shards) > 1


@pytest.mark.fast
def test_the_token_counts_are_those_of_the_training_targets(config):
    index, _ = run(config, TRAINED)
    documents = read_documents(config.path, index, "train")
    targets = np.concatenate([documents[number][1:] for number in range(len(documents))])
    assert np.array_equal(index.token_counts, np.bincount(targets, minlength=320))


@pytest.mark.fast
def test_a_split_keeps_the_order_of_the_sources(config):
    index, _ = run(config, validation_fraction=0.0)
    documents = read_documents(config.path, index, "train")
    tokenizer = load_tokenizer(config.path)
    texts = [tokenizer.decode(documents[number]) for number in range(len(documents))]
    numbers = [int(text.split("_")[1].split("(")[0]) for text in texts if text.startswith("def")]
    assert numbers == [7, *(number for number in range(24) if number != 7)], "the copy of 7 comes first by its name"


@pytest.mark.fast
def test_a_finished_dataset_is_found_and_left_as_it_is(config, monkeypatch):
    index, _ = run(config)
    before = content(config.path)
    monkeypatch.setattr(preparation, "_make", None)
    again, said = run(config, num_workers=2)
    assert again == index
    assert "already prepared (train: " in said
    assert "not what they were" not in said
    assert content(config.path) == before


@pytest.mark.fast
def test_another_sequence_length_adds_a_plan_and_nothing_else(config):
    run(config)
    before = content(config.path)
    run(config, sequence_length=16, packing="concat")
    after = content(config.path)
    assert {name: after[name] for name in before} == before
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {
        "plan-train-concat-16",
        "plan-validation-concat-16",
    }


@pytest.mark.fast
def test_changed_sources_are_announced_and_absent_ones_are_no_error(config, corpus):
    run(config)
    (corpus / "new.md").write_text("new")
    _, said = run(config)
    assert "the sources are not what they were" in said
    shutil.rmtree(corpus)
    _, said = run(config)
    assert "already prepared" in said
    assert "not what they were" not in said


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "tokenizer", "message"),
    [
        (
            {"validation_fraction": 0.5},
            BYTES,
            r"data\.validation_fraction: prepared with 0\.25, the config has 0\.5",
        ),
        ({"normalize": None}, BYTES, r'data\.normalize: prepared with "NFC", the config has null'),
        ({"sources": (FilesSource(path="else"),)}, BYTES, r"data\.sources: prepared with \[\{"),
        ({}, TRAINED, r'tokenizer\.kind: prepared with "bytes", the config has "sentencepiece"'),
    ],
)
def test_a_dataset_with_other_options_is_refused_and_kept(config, changes, tokenizer, message):
    index, _ = run(config)
    before = content(config.path)
    with pytest.raises(InputError, match=rf"prepared with other options:\n  {message}"):
        run(config, tokenizer, **changes)
    with pytest.raises(InputError, match=message):
        check_options(config.path, index, dataclasses.replace(config, **changes), tokenizer)
    check_options(config.path, index, dataclasses.replace(config, sequence_length=8), BYTES)
    assert content(config.path) == before


@pytest.mark.fast
def test_a_tokenizer_file_is_known_by_its_content_and_not_its_path(config, tmp_path, model_bytes):
    for name in ("a", "b"):
        (tmp_path / f"{name}.model").write_bytes(model_bytes)
    (tmp_path / "c.model").write_bytes(model_bytes.replace(b"total", b"tital", 1))
    run(config, SentencePieceFile(path=str(tmp_path / "a.model")))
    _, said = run(config, SentencePieceFile(path=str(tmp_path / "b.model")))
    assert "already prepared" in said
    with pytest.raises(InputError, match=r"tokenizer\.path: prepared with"):
        run(config, SentencePieceFile(path=str(tmp_path / "c.model")))


@pytest.mark.fast
def test_a_directory_with_something_else_in_it_is_refused_and_kept(config):
    directory = Path(config.path)
    directory.mkdir()
    (directory / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"neither empty nor a dataset \(there is thesis\.txt"):
        run(config)
    assert content(directory) == {"thesis.txt": b"precious"}


@pytest.mark.fast
def test_an_empty_corpus_is_an_input_error_that_counts(config, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    sources = (FilesSource(path=str(empty)),)
    with pytest.raises(InputError, match=r"data\.sources\.0\.path: no file in the directory"):
        run(config, sources=sources)
    assert not Path(config.path).exists()
    (empty / "a.txt").write_text("\n")
    (empty / "b.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="in 2 files: 1 documents are empty, 1 could not be read, 0 fell in"):
        run(config, sources=sources)
    with pytest.raises(InputError, match="no text to train a tokenizer on"):
        run(config, TRAINED, sources=sources)
    (empty / "c.txt").write_text("Now there is text.")
    index, said = run(config, sources=sources, validation_fraction=0.01)
    assert sum(shard.documents for shard in index.shards) == 1
    assert "no document fell in the validation split" in said


@pytest.mark.fast
@pytest.mark.parametrize("inner", ["", "below", "below/deeper"])
def test_a_path_that_cannot_be_written_is_an_input_error(config, tmp_path, inner):
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    with pytest.raises(InputError, match="cannot be written"):
        run(config, path=str(file / inner))
    assert file.read_bytes() == b"mine"


@pytest.mark.parametrize(("num_bytes", "num_workers"), [(100, 1), (2500, 1), (2500, 2), (20_000, 1)])
def test_a_full_disk_is_an_input_error_and_with_room_it_goes_on(
    config, tmp_path, num_bytes, num_workers, file_size_limit
):
    with file_size_limit(num_bytes), pytest.raises(InputError, match=r"cannot be written \(File too large\).*goes on"):
        run(config, num_workers=num_workers)
    assert not (Path(config.path) / "index.json").exists()
    run(config)
    run(config, path=str(tmp_path / "undisturbed"))
    assert content(config.path) == content(tmp_path / "undisturbed")


class Killed(BaseException):
    """What a kill is to the code that it ends, but for what ``finally`` would tidy up."""


@contextmanager
def killed_at(monkeypatch, number, moment):
    """End at the ``number``-th file that is put in its place, before or after; nothing is tidied up from then on."""
    calls = 0
    replace, unlink = Path.replace, Path.unlink

    def counted(self, target):
        nonlocal calls
        calls += 1
        if calls == number and moment == "before":
            raise Killed
        replace(self, target)
        if calls == number:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counted)
        patch.setattr(Path, "unlink", lambda *args, **kw: None if calls >= number else unlink(*args, **kw))
        yield


@pytest.mark.parametrize(("tokenizer", "moment"), [(BYTES, "before"), (TRAINED, "after")])
def test_killed_at_any_file_it_goes_on_and_ends_with_the_same_bytes(config, tmp_path, monkeypatch, tokenizer, moment):
    run(config, tokenizer)
    whole = content(config.path)
    kills = 0
    for number in range(1, 100):
        directory = tmp_path / f"killed-{number}"
        try:
            with killed_at(monkeypatch, number, moment):
                run(config, tokenizer, path=str(directory))
            break
        except Killed:
            kills += 1
            index, _ = run(config, tokenizer, path=str(directory))
            found = content(directory)
            leftover = [name for name in found if name not in whole]
            assert all(name.startswith(".plan-") for name in leftover)
            assert {name: found[name] for name in whole} == whole
            assert fingerprint(index) == fingerprint(read_index(config.path))
    assert content(directory) == whole, "without a kill"
    assert kills > 20


@pytest.mark.fast
def test_what_was_made_before_a_kill_is_not_made_again(config, monkeypatch):
    made = []
    make_part, train_model = preparation.make_part, preparation.train_model
    monkeypatch.setattr(preparation, "make_part", lambda job: made.append(job.key) or make_part(job))
    monkeypatch.setattr(preparation, "train_model", lambda *args: made.append("tokenizer") or train_model(*args))
    with pytest.raises(Killed), killed_at(monkeypatch, 5, "after"):
        run(config, TRAINED)
    assert len(made) == 4, "the tokenizer takes two files, the model as trained and as the dataset's"
    run(config, TRAINED)
    assert len(made) == len(set(made))
    assert made[0] == "tokenizer"


@pytest.mark.fast
def test_sources_that_change_between_kill_and_resume_are_read_anew(config, corpus, tmp_path, monkeypatch):
    with pytest.raises(Killed), killed_at(monkeypatch, 6, "after"):
        run(config, TRAINED)
    (corpus / "inner" / "03.py").write_text("def changed():\n    return 'entirely'\n")
    run(config, TRAINED)
    run(config, TRAINED, path=str(tmp_path / "fresh"))
    assert content(config.path) == content(tmp_path / "fresh")


@pytest.mark.fast
def test_a_dataset_that_waits_for_its_move_is_not_given_for_other_options(config, tmp_path, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_publish", killed)
        with pytest.raises(Killed):
            run(config)
    with pytest.raises(InputError, match=r"data\.normalize: prepared with"):
        run(config, normalize="NFKC")
    run(config)
    run(config, path=str(tmp_path / "undisturbed"))
    assert content(config.path) == content(tmp_path / "undisturbed")


@pytest.mark.fast
def test_all_that_is_skipped_is_counted_and_the_first_are_named(config, tmp_path):
    lines = ['{"text": "good"}', *["bad"] * 150]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    index, said = run(config, sources=(JsonlSource(path=str(tmp_path / "a.jsonl")),), validation_fraction=0.0)
    assert (index.num_skipped, len(index.skipped)) == (150, 100)
    assert index.skipped[0].name == "a.jsonl, line at byte 17"
    assert said.count("not JSON") == 100
    assert "skipped 50 more" in said


def test_the_dataset_does_not_depend_on_the_number_of_workers(config, tmp_path):
    for number in (1, 2):
        run(config, TRAINED, path=str(tmp_path / f"by-{number}"), num_workers=number)
    one, two = content(tmp_path / "by-1"), content(tmp_path / "by-2")
    assert one == two
    run(config, TRAINED, path=str(tmp_path / "other"), validation_fraction=0.3)
    assert content(tmp_path / "other") != one


def test_a_process_that_is_gone_while_its_workers_work_is_gone_on_from(config, tmp_path):
    """The first process ends at its third finished part, as kill -9 would end it, with two workers at work."""
    script = textwrap.dedent("""
        import json, os, sys
        import pydantic
        from lmjax.data import parts
        from lmjax.data.config import DataConfig
        from lmjax.data.prepare import prepare
        from lmjax.data.tokenizer import BytesTokenizer

        parts.MAX_PART_BYTES = 1500

        if __name__ == "__main__":
            finished = 0

            def progress(state):
                global finished
                finished += state.stage == "tokenize" and state.done > 0
                if finished == 3:
                    os._exit(9)

            prepare(pydantic.TypeAdapter(DataConfig).validate_json(sys.argv[1]), BytesTokenizer(), progress)
    """)
    tree = dataclasses.asdict(dataclasses.replace(config, num_workers=2))
    (tmp_path / "script.py").write_text(script)
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), json.dumps(tree)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,  # waits for the workers too, which hold the other end
        timeout=300,
    )
    assert ended.returncode == 9, ended.stderr.decode()
    assert len(list(Path(config.path).rglob("*.npz"))) >= 3
    run(config)
    run(config, path=str(tmp_path / "undisturbed"))
    assert content(config.path) == content(tmp_path / "undisturbed")


@pytest.mark.fast
def test_a_second_preparation_of_the_same_directory_is_refused(config):
    def at_work(state):
        with pytest.raises(InputError, match="another process is preparing it"):
            run(config)

    prepare(config, BYTES, at_work, announce=lambda _: None)


@pytest.mark.fast
def test_progress_grows_to_its_total(config):
    seen = []
    prepare(config, TRAINED, seen.append, announce=lambda _: None)
    assert list(dict.fromkeys(state.stage for state in seen)) == ["train tokenizer", "tokenize", "write shards"]
    for stage in ("train tokenizer", "tokenize", "write shards"):
        states = [state for state in seen if state.stage == stage]
        assert [state.done for state in states] == sorted(state.done for state in states)
        assert states[-1].done == states[-1].total > 0
    assert seen[-1].documents == 31
