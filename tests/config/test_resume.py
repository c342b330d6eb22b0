"""What may differ on resume, and what is said about the rest."""

import dataclasses

import pytest

from lmjax.config.resume import check_resume, differences
from lmjax.errors import InputError
from lmjax.schema import config_class
from tests.config.toys import Ball, Blocks, Nursery

pytestmark = pytest.mark.fast

BEFORE = Nursery(name="x", best=Ball(radius=1.0))


@config_class
class Train:
    """Stands for the real one."""

    steps: int = 10
    """Updates."""
    seed: int = 0
    """Seed."""


@config_class
class Run:
    """Has the names of the sections of a run."""

    mesh: int = 1
    """A section that may change."""
    model: int = 1
    """A section that may not."""
    train: Train = Train()
    """A section of which one key may change."""


def test_differences_are_named_by_full_key():
    after = dataclasses.replace(
        BEFORE, best=Ball(radius=2.0), shelf=dataclasses.replace(BEFORE.shelf, label="y"), others=(Blocks(),)
    )
    assert differences(BEFORE, BEFORE) == []
    assert differences(BEFORE, after) == [
        ("best.radius", 1.0, 2.0),
        ("others", (), (Blocks(),)),
        ("shelf.label", None, "y"),
    ]


def test_another_kind_is_one_difference():
    after = dataclasses.replace(BEFORE, best=Blocks())
    assert differences(BEFORE, after) == [("best", Ball(radius=1.0), Blocks())]


def test_what_may_change_may():
    check_resume(Run(), Run(mesh=2, train=Train(steps=20)), "runs/x")


def test_what_may_not_change_is_refused_all_at_once():
    with pytest.raises(InputError) as caught:
        check_resume(Run(), Run(mesh=2, model=3, train=Train(seed=1)), "runs/x")
    message = str(caught.value)
    assert "runs/x" in message
    assert "model: the run has 1, the config 3" in message
    assert "train.seed: the run has 0, the config 1" in message
    assert "mesh: " not in message
