"""Each kind of wrong config gets a line that says who set what, and what would be right."""

from pathlib import Path

import pytest

from lmjax.config import load_model
from lmjax.config.typed import load_as
from lmjax.errors import InputError
from tests.config.toys import Nursery

pytestmark = pytest.mark.fast

GOOD = "name: ours\nbest: {kind: ball, radius: 3}\n"


@pytest.fixture
def complain(tmp_path):
    """The message for a config, with the directory taken out of it."""

    def complain(text: str, *overrides: str, base: str = "") -> str:
        (tmp_path / "base.yaml").write_text(base)
        (tmp_path / "a.yaml").write_text(("base: base.yaml\n" if base else "") + text)
        with pytest.raises(InputError) as caught:
            load_as(Nursery, str(tmp_path / "a.yaml"), overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return complain


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "shelf: {widht: 3}",
            "a.yaml: shelf.widht: unknown key; did you mean shelf.width? shelf has width, depth and label",
        ),
        (
            "radius: 3",
            "a.yaml: radius: unknown key; did you mean best.radius? a config has name, best, others, shelf, dust",
        ),
        ("zzz: 3", "a.yaml: zzz: unknown key; a config has name, best"),
        (
            "others: [{kind: ball, size: 3, radius: 1}]",
            "a.yaml: others.0.size: unknown key; others.0 of kind ball has kind",
        ),
        (
            "others: [{kind: bal, radius: 3}]",
            "a.yaml: others.0.kind: found 'bal', allowed: ball or blocks; did you mean ball?",
        ),
        ("others: [{radius: 3}]", "a.yaml: others.0.kind is missing, allowed: ball or blocks"),
        ("others: [{kind: ball}]", "a.yaml: others.0.radius is missing, allowed: a number"),
        ("others: 3", "a.yaml: others: found 3, allowed: a list, each entry a mapping with a kind: ball or blocks"),
        ("others: [{kind: blocks, sizes: [1, '2']}]", "a.yaml: others.0.sizes.1: found '2', allowed: a whole number"),
        (
            "others: [{kind: ball, radius: 1, colour: gren}]",
            "found 'gren', allowed: 'red' or 'green'; did you mean green?",
        ),
        ("shelf: 3", "a.yaml: shelf: found 3, allowed: a mapping with the keys width, depth and label"),
        ("shelf: {width: 3.5}", "a.yaml: shelf.width: found 3.5, allowed: a whole number"),
        ("shelf: {width: true}", "a.yaml: shelf.width: found true, allowed: a whole number"),
        ("shelf: {label: 3}", "a.yaml: shelf.label: found 3, allowed: text or null"),
        ("dust: true", "a.yaml: dust: found true, allowed: a number"),
        ("dust: '3'", "a.yaml: dust: found '3', allowed: a number"),
        ("dust: .nan", "a.yaml: dust: found nan, allowed: a finite number"),
        ("dust: .inf", "a.yaml: dust: found inf, allowed: a finite number"),
        ("tidy: 1", "a.yaml: tidy: found 1, allowed: true or false"),
        ("tidy: null", "a.yaml: tidy: found null, allowed: true or false"),
        ("shelf: {width: 0}", "a.yaml: shelf.width is 0; it has to be 1 or more"),
        ("shelf: {depth: 99}", "a.yaml: shelf: a depth of 99 does not go with a width of 80"),
    ],
)
def test_a_wrong_value_is_explained(complain, text, line):
    message = complain(GOOD + text)
    assert line in message
    assert "\n" not in message


def test_a_missing_key_is_named(complain):
    assert complain("name: x") == "a.yaml: best is missing, allowed: a mapping with a kind: ball or blocks"


def test_the_file_that_set_the_value_is_named(complain):
    assert complain("dust: 1", base=GOOD + "tidy: 3").startswith("base.yaml: tidy: found 3")
    assert complain("tidy: 4", base=GOOD + "tidy: 3").startswith("a.yaml: tidy: found 4")
    assert complain("tidy: 4", "tidy=5", base=GOOD + "tidy: 3").startswith("override tidy=5: tidy: found 5")
    assert complain("shelf: {width: 0}", base=GOOD + "shelf: {depth: 1}").startswith("a.yaml: shelf.width is 0")
    assert complain("shelf: {depth: 1}", base=GOOD + "shelf: {width: 0}").startswith("base.yaml: shelf.width is 0")


def test_everything_wrong_is_told_at_once(complain):
    lines = complain(GOOD + "tidy: 3\nshelf: {widht: 1}", "dust=x", "nam=y").splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["a.yaml", "a.yaml", "override dust=x", "override nam=y"]


def test_a_kind_changed_alone_says_how_to_give_the_section_whole(complain):
    message = complain(GOOD, "best.kind=blocks")
    assert message.startswith("a.yaml: best.radius: unknown key; best of kind blocks has kind and sizes")
    assert message.endswith(
        "override best.kind=blocks changes the kind alone: give the section whole, as 'best={kind: blocks}'"
    )


def test_a_section_that_may_be_absent_needs_its_kind_too(tmp_path):
    """As rope_scaling: null is one of the choices, and has no kind."""
    text = (Path("configs/models/llama3_1_8b.yaml")).read_text().replace("    kind: llama3\n", "")
    assert "kind" not in text
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=r"rope_scaling\.kind is missing, allowed: linear, dynamic, yarn, longrope or"):
        load_model(str(tmp_path / "a.yaml"))
