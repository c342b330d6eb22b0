"""An experiment in gin is the same experiment as in YAML, and what is wrong in it is told by file and line."""

from pathlib import Path

import pytest

from lmjax.config import load, load_as
from lmjax.config.files import compose
from lmjax.errors import InputError
from tests.config.toys import Ball, Blocks, Nursery, Shelf

pytestmark = pytest.mark.fast

CONFIGS = Path(__file__).parent.parent.parent / "configs"
KEYS = ("name", "best", "others", "shelf", "dust", "tidy")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the files given by name into the working directory, and return the path of the last."""
    monkeypatch.chdir(tmp_path)

    def write(**files: str) -> str:
        for name, text in files.items():
            Path(name.replace("_", ".")).write_text(text)
        return list(files)[-1].replace("_", ".")

    return write


def refusal(file: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_as(Nursery, file, overrides)
    return str(caught.value)


@pytest.mark.parametrize("overrides", [(), ("train.steps=7", "tokenizer={kind: bytes}", "data.sources.0.kind=stdlib")])
def test_the_quickstart_and_its_twin_resolve_to_the_same(overrides: tuple[str, ...]):
    twin = load(str(CONFIGS / "quickstart.gin"), overrides)
    assert twin == load(str(CONFIGS / "quickstart.yaml"), overrides)
    assert twin != load(str(CONFIGS / "quickstart.gin"), [*overrides, "train.steps=8"])


def test_values_blocks_macros_and_includes(write):
    file = write(
        base_gin="SIZE = 2\nname = 'base'\nshelf.width = 9\nbest = {'kind': 'ball', 'radius': %RADIUS}\nunused = 1\n",
        a_gin=(
            "# a comment\n\ndust = 3e-4\ninclude 'base.gin'\nRADIUS = 1.5\nname = 'a'  # wins\n"
            "shelf:\n  depth = %SIZE\n  label = 'x' \\\n    'y'\n"
            "others = [\n  {'kind': 'blocks', 'sizes': (1, %SIZE)},\n  %toy,\n]\n"
            "toy = %other\nother = {'kind': 'blocks'}\n"
            "tidy = False\n"
        ),
    )
    assert load_as(Nursery, file) == Nursery(
        name="a",
        best=Ball(radius=1.5),
        others=(Blocks(sizes=(1, 2)), Blocks()),
        shelf=Shelf(width=9, depth=2, label="xy"),
        dust=3e-4,
        tidy=False,
    )
    assert load_as(Nursery, file, ["shelf.depth=5"]).shelf.depth == 5


def test_what_stands_below_an_include_wins_and_what_stands_above_does_not(write):
    file = write(base_gin="dust = 1\nshelf.width = 1\n", a_gin="dust = 2\ninclude 'base.gin'\nshelf.width = 3\n")
    assert compose(file, keys=KEYS).tree == {"dust": 1, "shelf": {"width": 3}}


def test_another_kind_replaces_what_an_include_sets_whatever_the_order_of_the_lines(write):
    base = "best.kind = 'ball'\nbest.radius = 1\n"
    file = write(base_gin=base, a_gin="include 'base.gin'\nbest.sizes = [1]\nbest.kind = 'blocks'\n")
    assert compose(file, keys=KEYS).tree == {"best": {"sizes": [1], "kind": "blocks"}}


def test_gin_and_yaml_may_start_from_each_other(write):
    file = write(
        b_yaml="shelf: {width: 7}\ndust: 1\n", a_gin="include 'b.yaml'\ndust = 2\n", c_yaml="base: a.gin\ntidy: true"
    )
    assert compose(file, keys=KEYS).tree == {"shelf": {"width": 7}, "dust": 2, "tidy": True}


def test_a_macro_may_have_the_name_of_a_key(write):
    file = write(a_gin="name = 'x'\nshelf.label = %name\n")
    assert compose(file, keys=KEYS).tree == {"name": "x", "shelf": {"label": "x"}}


def test_nothing_is_bound_globally(write):
    gin = pytest.importorskip("gin")
    compose(write(a_gin="shelf.width = 9\nSIZE = 1\nshelf.depth = %SIZE\n"), keys=KEYS)
    assert gin.config_str() == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'x'\nshelf.widht = 3", "a.gin:2: shelf.widht: unknown key; did you mean shelf.width?"),
        ("shelf:\n  width = 9\n  depth = 'x'", "a.gin:3: shelf.depth: found 'x', allowed: a whole number"),
        ("others = [\n {'kind': 'bals'}]", "a.gin:1: others.0.kind: found 'bals', allowed: ball or blocks"),
        ("nmae = 'x'", "a.gin:1: nmae is no key of the config, which has name, best,"),
        ("shelf.width = 1\nshelf.width = 2", "a.gin:2: shelf.width is bound a second time"),
        ("shelf.width = 1\nshelf.width.x = 2", "a.gin:2: shelf.width.x has no place: shelf.width is 1"),
        ("\nshelf.width = %WIDTH", "a.gin:2: no line defines the macro %WIDTH"),
        ("a = %b\nb = %a\nshelf.width = %a", "macros form a circle: %a -> %b -> %a"),
        ("shelf.width = @width", "a.gin:1: shelf.width: found @width; there are no references"),
        ("dust = 1\nshelf.width = @width()", "a.gin:2: shelf.width: found @width; there are no references"),
        ("dust = 1\nimport os.path", "a.gin:2: import os.path: nothing can be imported"),
        ("train/shelf.width = 1", "a.gin:1: train/shelf.width: there are no scopes"),
        ("dust = b'x'", "a.gin:1: dust: found b'x'"),
        ("best = {1: 2}", "a.gin:1: best: found the key 1"),
        ("dust = 1\nbest = {[1]: 2}", "a.gin:2: "),
        ("dust = 1\nshelf.width 3", "a.gin:2: Couldn't parse statement"),
        ("dust = 1\nshelf.width =", "a.gin:2: "),
        ("dust = 1\nothers = [1,\n", "a.gin:"),
        ("dust = 1\nshelf:\nwidth = 2", "a.gin:"),
        ("dust = 'x", "a.gin:1: "),
        ("dust = 1\ninclude 'none.gin'", "a.gin:2: include: there is no file none.gin"),
        ("dust = 1\ninclude 3", "a.gin:2: "),
        ("include 'a.gin'", "circle: a.gin -> a.gin"),
    ],
)
def test_what_is_wrong_is_told_by_file_and_line(write, text, message):
    assert message in refusal(write(a_gin=text)), refusal(write(a_gin=text))


def test_a_wrong_value_of_an_included_file_is_told_by_that_file(write):
    file = write(b_gin="\n\nshelf.width = 'x'\n", a_gin="include 'b.gin'\nname = 'x'\n")
    assert "b.gin:3: shelf.width: found 'x'" in refusal(file)
    assert "override shelf.width=y: shelf.width: found 'y'" in refusal(file, "shelf.width=y")
