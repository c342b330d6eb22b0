"""Composition of files, overrides, and who set what."""

import pytest

from lmjax.config.files import compose
from lmjax.errors import InputError

pytestmark = pytest.mark.fast


@pytest.fixture
def write(tmp_path):
    """Write the files given by name, and return the path of the last."""

    def write(**files: str) -> str:
        for name, text in files.items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(text)
        return str(path)

    return write


def refusal(file: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        compose(file, overrides)
    return str(caught.value)


def test_a_number_in_scientific_notation_is_a_number(write):
    assert compose(write(a="x: 3e-4\ny: 1E5"), ["z=2e-1"]).tree == {"x": 3e-4, "y": 1e5, "z": 0.2}


def test_later_wins_and_mappings_are_merged(write):
    file = write(
        one="s: {x: 1, y: 1, z: 1}\nlist: [1, 2]",
        two="s: {y: 2, z: 2}",
        top="base: [one.yaml, two.yaml]\ns: {z: 3}\nlist: [3]",
    )
    assert compose(file).tree == {"s": {"x": 1, "y": 2, "z": 3}, "list": [3]}
    assert compose(file, ["s.z=4"]).tree["s"] == {"x": 1, "y": 2, "z": 4}


def test_a_base_is_relative_to_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "inner.yaml").write_text("x: 1")
    (tmp_path / "models" / "outer.yaml").write_text("base: inner.yaml\ny: 2")
    (tmp_path / "top.yaml").write_text("base: models/outer.yaml\nz: 3")
    monkeypatch.chdir("/")
    assert compose(str(tmp_path / "top.yaml")).tree == {"x": 1, "y": 2, "z": 3}


def test_another_kind_replaces_the_section_and_the_same_kind_does_not(write):
    base = "t: {kind: trained, size: 3}"
    assert compose(write(b=base, a="base: b.yaml\nt: {kind: bytes}")).tree == {"t": {"kind": "bytes"}}
    merged = {"t": {"kind": "trained", "size": 3, "n": 1}}
    assert compose(write(b=base, a="base: b.yaml\nt: {kind: trained, n: 1}")).tree == merged


def test_an_override_reaches_into_lists_and_replaces_what_it_names(write):
    file = write(a="l: [{x: 1, y: 1}, {x: 2}]\ns: {x: 1, y: 1}")
    assert compose(file, ["l.1.x=5", "l[0].y=6"]).tree["l"] == [{"x": 1, "y": 6}, {"x": 5}]
    assert compose(file, ["s={y: 2}"]).tree["s"] == {"y": 2}
    assert compose(file, ["s.z.deep=[a, b]"]).tree["s"]["z"] == {"deep": ["a", "b"]}


@pytest.mark.parametrize(
    ("value", "read"),
    [("true", True), ("null", None), ("'3'", "3"), ("a=b", "a=b"), ("[1, x]", [1, "x"]), ("gs://b/c", "gs://b/c")],
)
def test_the_value_of_an_override_is_yaml(write, value, read):
    assert compose(write(a="x: 0"), [f"x={value}"]).tree == {"x": read}


def test_interpolations_see_overrides(write):
    file = write(b="size: 1", a="base: b.yaml\nname: runs/${size}\nescaped: \\${size}")
    assert compose(file, ["size=7"]).tree == {"size": 7, "name": "runs/7", "escaped": "${size}"}


def test_an_empty_file_sets_nothing(write):
    assert compose(write(a="# nothing\n")).tree == {}


def test_the_origin_is_the_strongest_place_that_sets_a_key(write, tmp_path):
    file = write(b="s: {x: 1, y: 1}\nl: [{z: 1}]", a="base: b.yaml\ns: {y: 2}")
    composed = compose(file, ["s.x=3", "l.0.z=4"])
    base, top = str(tmp_path / "b.yaml"), file
    assert composed.origin(("s", "y")) == top
    assert composed.origin(("s", "x")) == "override s.x=3"
    assert composed.origin(("l", 0, "z")) == "override l.0.z=4"
    assert composed.origin(("l", 0, "missing")) == base
    assert composed.origin(("s", "missing")) == top
    assert composed.origin(("missing",)) == top


def test_bases_in_a_circle_are_refused(write):
    message = refusal(write(a="base: b.yaml", b="base: a.yaml"))
    assert "circle" in message
    assert message.count("b.yaml ->") == 1
    assert compose(write(c="x: 1", a="base: c.yaml", b="base: [a.yaml, c.yaml]")).tree == {"x": 1}, "twice is no circle"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x: 1\nx: 2", ["a.yaml: line 2", "duplicate key x"]),
        ("x: [1", ["a.yaml: line"]),
        ("- 1", ["a.yaml: found '- 1'", "a mapping"]),
        ("word", ["a.yaml: found 'word'", "a mapping"]),
        ("base: none.yaml", ["a.yaml: base: there is no file", "none.yaml", "relative"]),
        ("base: 3", ["a.yaml: base: found 3", "path"]),
        ("x: ${y.z}", ["a.yaml: x", "y.z"]),
        ("x: ${oc.env:NO_SUCH_VARIABLE}", ["a.yaml: x", "NO_SUCH_VARIABLE"]),
        ("s:\n  x: ???", ["a.yaml: s.x"]),
    ],
)
def test_a_bad_file_is_refused_by_name(write, text, parts):
    message = refusal(write(a=text))
    assert all(part in message for part in parts), message


def test_what_is_no_text_file_is_refused(tmp_path):
    binary = tmp_path / "a.yaml"
    binary.write_bytes(b"x: \xff")
    assert "not UTF-8" in refusal(str(binary))
    assert "there is no config file" in refusal(str(tmp_path / "none.yaml"))
    assert "is a directory" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("steps", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("a..b=3", "not of the form key=value"),
        ("x=", "no value; write x=null"),
        ("x=[1", "line 1"),
        ("x=1\ny: 2", "not one YAML value"),
        ("l.7=1", "leads nowhere"),
        ("l.x=1", "leads nowhere"),
    ],
)
def test_a_bad_override_is_refused_by_name(write, override, part):
    message = refusal(write(a="x: 1\nl: [1]"), override)
    assert message.startswith(f"override {override}")
    assert part in message
