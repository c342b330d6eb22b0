"""Stored plans: the same from every process, verified when read, and never taken for another dataset's."""

import json
import shutil

import numpy as np
import pytest

from lmjax.data.plans import build_plan, ensure_plan
from lmjax.errors import InputError

pytestmark = pytest.mark.fast
OPTIONS = {"split": "train", "sequence_length": 16, "packing": "best_fit"}
STEM = "plan-train-best_fit-16"


@pytest.fixture
def documents(rng):
    return [rng.integers(3, 250, length) for length in rng.integers(2, 50, 40)]


def test_a_missing_plan_is_built_once_and_announced(make_dataset, documents):
    directory, index = make_dataset(train=documents)
    said: list[str] = []
    built = ensure_plan(directory, index, **OPTIONS, announce=said.append)
    assert len(said) == 1
    assert STEM in said[0]
    again = ensure_plan(directory, index, **OPTIONS, announce=said.append)
    assert len(said) == 1
    pure = build_plan(index, np.array([len(document) for document in documents]), **OPTIONS)
    for plan in (built, again):
        assert np.array_equal(plan.layout.pieces, pure.layout.pieces)
        assert np.array_equal(plan.layout.row_starts, pure.layout.row_starts)
        assert (plan.padding, plan.documents_cut, plan.lost_targets) == (
            pure.padding,
            pure.documents_cut,
            pure.lost_targets,
        )
    ensure_plan(directory, index, **{**OPTIONS, "packing": "concat"}, announce=said.append)
    ensure_plan(directory, index, **{**OPTIONS, "sequence_length": 8}, announce=said.append)
    assert len(said) == 3, "another length or method is another plan"


def test_a_plan_is_the_same_bytes_wherever_it_is_built(make_dataset, documents, tmp_path):
    directory, index = make_dataset(train=documents)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    for place in (directory, str(copy)):
        ensure_plan(place, index, **OPTIONS)
    names = sorted(file.name for file in copy.glob("plan-*"))
    assert len(names) == 3
    for name in names:
        assert (copy / name).read_bytes() == (tmp_path / "dataset" / name).read_bytes()


@pytest.mark.parametrize("suffix", [".pieces.npy", ".rows.npy"])
def test_one_flipped_bit_is_an_error_that_names_the_file_and_the_fix(make_dataset, documents, tmp_path, suffix):
    directory, index = make_dataset(train=documents)
    ensure_plan(directory, index, **OPTIONS)
    file = tmp_path / "dataset" / f"{STEM}{suffix}"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"{STEM}{suffix}: .*SHA-256.*delete"):
        ensure_plan(directory, index, **OPTIONS)
    content[-3] ^= 4
    file.write_bytes(content)
    ensure_plan(directory, index, **OPTIONS)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\xfe", b'{"format_version": 1'])
def test_a_broken_sidecar_is_an_error(make_dataset, documents, tmp_path, content):
    directory, index = make_dataset(train=documents)
    ensure_plan(directory, index, **OPTIONS)
    (tmp_path / "dataset" / f"{STEM}.json").write_bytes(content)
    with pytest.raises(InputError, match="not a pack plan"):
        ensure_plan(directory, index, **OPTIONS)


def test_the_plan_of_another_dataset_is_refused(make_dataset, documents, tmp_path):
    directory, index = make_dataset(train=documents)
    ensure_plan(directory, index, **OPTIONS)
    other, other_index = make_dataset(name="other", train=documents[1:])
    for file in (tmp_path / "dataset").glob("plan-*"):
        shutil.copy(file, other)
    with pytest.raises(InputError, match="is needed"):
        ensure_plan(other, other_index, **OPTIONS)


@pytest.mark.parametrize("suffix", [".json", ".pieces.npy", ".rows.npy"])
def test_a_plan_with_a_part_missing_is_rebuilt_and_announced(make_dataset, documents, tmp_path, suffix):
    directory, index = make_dataset(train=documents)
    ensure_plan(directory, index, **OPTIONS)
    file = tmp_path / "dataset" / f"{STEM}{suffix}"
    before = file.read_bytes()
    file.unlink()
    said: list[str] = []
    ensure_plan(directory, index, **OPTIONS, announce=said.append)
    assert len(said) == 1
    assert file.read_bytes() == before


class KilledError(BaseException):
    """Stands for a kill at a chosen point."""


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_kill_while_writing_leaves_the_plan_missing_and_the_next_try_whole(
    make_dataset, documents, tmp_path, monkeypatch, moment
):
    directory, index = make_dataset(train=documents)
    before = sorted(file.name for file in (tmp_path / "dataset").iterdir())
    moves = 0

    def killed(self, target):
        nonlocal moves
        if moves == moment:
            raise KilledError
        moves += 1
        return real(self, target)

    real = type(tmp_path).replace
    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "replace", killed)
        with pytest.raises(KilledError):
            ensure_plan(directory, index, **OPTIONS)
    assert not (tmp_path / "dataset" / f"{STEM}.json").exists()
    said: list[str] = []
    ensure_plan(directory, index, **OPTIONS, announce=said.append)
    assert len(said) == 1
    after = sorted(file.name for file in (tmp_path / "dataset").iterdir())
    assert after == sorted([*before, *(f"{STEM}{suffix}" for suffix in (".json", ".pieces.npy", ".rows.npy"))])


def test_options_that_mean_nothing_are_refused(make_dataset, documents):
    directory, index = make_dataset(train=documents)
    with pytest.raises(InputError, match="best_fit, concat"):
        ensure_plan(directory, index, **{**OPTIONS, "packing": "bestfit"})
    with pytest.raises(InputError, match="at least 2"):
        ensure_plan(directory, index, **{**OPTIONS, "sequence_length": 1})


def test_the_sidecar_tells_what_packing_costs(make_dataset, tmp_path):
    directory, index = make_dataset(train=[np.arange(3, 3 + length) for length in (40, 10, 10)])
    ensure_plan(directory, index, **OPTIONS)
    record = json.loads((tmp_path / "dataset" / f"{STEM}.json").read_text())
    # 40 = 16 + 16 + 8; the rest of 8 and the two tens fit in no common row of 16.
    counts = {key: record[key] for key in ("rows", "pieces", "tokens", "padding", "documents_cut", "lost_targets")}
    assert counts == {"rows": 5, "pieces": 5, "tokens": 60, "padding": 20, "documents_cut": 1, "lost_targets": 2}
