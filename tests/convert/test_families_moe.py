"""Families with experts, both ways, against transformers: each expert is tensors of its own in the files, or a part."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.convert.family_checks import check_family
from tests.models.families import moe

GRID = [
    pytest.param(twin, changes, id=f"{name}, {case}")
    for name, twin in moe.FAMILIES.items()
    for case, changes in twin.grid.items()
]


@pytest.mark.parametrize("name", moe.FAMILIES)
def test_a_family_goes_in_and_out(name, rng, tmp_path):
    check_family(moe.FAMILIES[name], {}, rng, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("twin", "changes"), GRID)
def test_a_family_goes_in_and_out_throughout_its_grid(twin, changes, rng, tmp_path):
    check_family(twin, changes, rng, tmp_path)
