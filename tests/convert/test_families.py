"""Llama and its relatives, both ways, against transformers, and gradients: tiny models with every tensor random."""

import dataclasses
import math
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.convert.family_checks import check_family, check_gradients, make_example
from tests.models.families import gemma, gpt, llama, moe
from tests.models.families.family import Family as Twin

TWINS = {name: twin for name, twin in (llama.FAMILIES | gemma.FAMILIES).items() if name != "granite"}
BIASES = {"qkv_bias": True, "attention_out_bias": True}


def heads(twin: Twin, num_heads: int, num_kv_heads: int | None) -> dict[str, Any]:
    """Changes to heads of 8 dimensions, unless the family's have a width of their own."""
    embed_dim = 8 * num_heads
    scaled = {"embed_multiplier": math.sqrt(embed_dim)} if twin.config.embed_multiplier != 1 else {}
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "embed_dim": embed_dim, **scaled}


def with_settings(twin: Twin, **settings: Any) -> Twin:
    """The family with keys in config.json that the builder of its twin does not set."""

    def model(config):
        found = twin.model(config)
        for key, value in settings.items():
            setattr(found.config, key, value)
        return type(found)(found.config)

    return dataclasses.replace(twin, model=model)


GRID = [
    *(
        pytest.param(twin, changes, id=f"{name}, {case}")
        for name, twin in TWINS.items()
        for case, changes in twin.grid.items()
    ),
    *(pytest.param(twin, heads(twin, 3, 1), id=f"{name}, three heads on one of keys") for name, twin in TWINS.items()),
    *(
        pytest.param(
            twin,
            heads(twin, 5, None) | {"tie_embeddings": not twin.config.tie_embeddings},
            id=f"{name}, five heads, tied if it was not",
        )
        for name, twin in TWINS.items()
    ),
    *(
        pytest.param(with_settings(TWINS[name], attention_bias=True), BIASES, id=f"{name}, biases of attention")
        for name in ("qwen3", "gemma", "gemma2", "gemma3", "olmo2")
    ),
    *(
        pytest.param(with_settings(TWINS[name], hidden_act="gelu"), {"activation": "gelu"}, id=f"{name}, gelu")
        for name in ("llama", "phi3 4k")
    ),
]


@pytest.mark.parametrize("name", TWINS)
def test_a_family_goes_in_and_out(name, rng, tmp_path):
    check_family(TWINS[name], {}, rng, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("twin", "changes"), GRID)
def test_a_family_goes_in_and_out_throughout_its_grid(twin, changes, rng, tmp_path):
    check_family(twin, changes, rng, tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"), [("llama", {}), ("gemma2", {"num_layers": 2}), ("gpt2", {}), ("dbrx", {})]
)
def test_gradients_of_the_loss_equal_those_of_transformers(name, changes, rng, tmp_path):
    twin = (TWINS | gpt.FAMILIES | moe.FAMILIES)[name]
    check_gradients(make_example(twin, changes, rng, tmp_path))
