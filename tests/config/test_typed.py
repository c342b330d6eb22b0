"""Reading into classes, and writing what reads back to an equal object."""

import dataclasses

import pytest

from lmjax.config.typed import dump, load_as, to_tree
from tests.config.toys import Ball, Blocks, Nursery, Shelf

pytestmark = pytest.mark.fast

FULL = Nursery(
    name="${shelf.width} and \\${x}: 'quoted', \u00e9, 3e-4, null",
    best=Ball(radius=3e-4),
    others=(Blocks(sizes=(1, 2)), Ball(radius=1e20, colour="green"), Blocks()),
    shelf=Shelf(label="3"),
    dust=1e-08,
    tidy=False,
)


def test_a_file_becomes_an_object(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("name: x\nbest: {kind: ball, radius: 3}\nothers: [{kind: blocks, sizes: [1]}]\nshelf: {depth: 5}")
    expected = Nursery(name="x", best=Ball(radius=3.0), others=(Blocks(sizes=(1,)),), shelf=Shelf(depth=5))
    assert load_as(Nursery, str(file)) == expected
    assert load_as(Nursery, str(file), ["tidy=false"]) == dataclasses.replace(expected, tidy=False)


@pytest.mark.parametrize("config", [FULL, dataclasses.replace(FULL, name="\x85 \u2028\n\\", others=())])
def test_what_is_dumped_loads_back_to_an_equal_object(tmp_path, config):
    file = tmp_path / "config.yaml"
    dump(config, str(file))
    assert load_as(Nursery, str(file)) == config
    assert load_as(Nursery, str(file), ["dust=1"]) != config


@pytest.mark.parametrize(
    "name", ["1e3", "1_000", "0x10", "null", "y", "on", "1:30", ".5", "~", "true", "", "2026-01-01"]
)
def test_text_that_others_take_for_something_else_is_quoted(tmp_path, name):
    config = dataclasses.replace(FULL, name=name)
    file = tmp_path / "config.yaml"
    dump(config, str(file))
    assert load_as(Nursery, str(file)) == config
    assert f"name: '{name}'" in file.read_text().splitlines()


def test_defaults_are_dumped_too():
    assert to_tree(Nursery(name="x", best=Ball(radius=1)))["shelf"] == {"width": 80, "depth": 30, "label": None}


def test_a_dump_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text("before")

    def die(*_paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", die)
    with pytest.raises(OSError, match="No space"):
        dump(FULL, str(file))
    assert file.read_text() == "before"
    monkeypatch.undo()
    dump(FULL, str(file))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
