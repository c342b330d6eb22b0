"""Logits equal those of transformers for every family, with every parameter random: norms of ones hide mistakes."""

from typing import Any

import jax
import numpy as np
import pytest

from lmjax.models.block import whole_sequences
from lmjax.train.state import Blueprint
from tests import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.models.families import alibi, gemma, gpt, llama, moe  # noqa: E402
from tests.models.families.family import Family  # noqa: E402
from tests.models.families.names import state_dict  # noqa: E402

FAMILIES = llama.FAMILIES | gemma.FAMILIES | gpt.FAMILIES | alibi.FAMILIES | moe.FAMILIES
GRID = [
    pytest.param(name, changes, id=f"{name}, {case}")
    for name, family in FAMILIES.items()
    for case, changes in family.grid.items()
]
TOLERANCE = 1e-4
NOTICEABLE = 5 * TOLERANCE


def random_params(blueprint: Blueprint, rng: np.random.Generator):
    """Every norm, bias and offset random, and each parameter large enough for its effect to be seen."""
    params = tiny.random_params(blueprint, rng)
    if not blueprint.config.norm_unit_offset:
        return params

    def offset(path, leaf):
        return leaf - 1 if path[-1].key == "scale" else leaf

    return jax.tree_util.tree_map_with_path(offset, params)


def theirs(model, tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The logits of ``model`` with these tensors, which have to be all that it has."""
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, strict=True)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def drawn(family: Family, blueprint: Blueprint, rows: int, length: int, rng: np.random.Generator):
    """Parameters, tokens, transformers' tensors and its logits; where there are routers, such that no rounding changes
    what they choose."""
    config = blueprint.config
    for _ in range(5):
        params = random_params(blueprint, rng)
        tokens = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
        tensors = state_dict(config, params, family.names)
        model = family.model(config)
        expected = theirs(model, tensors, tokens)
        if config.moe is None or moe.is_separated(model, tokens, config.moe):
            return params, tokens, tensors, expected
    raise AssertionError("routers of all draws have two logits that are nearly equal")


def ours(blueprint: Blueprint, params, tokens: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    @jax.jit
    def logits(params, tokens, positions):
        decoder = blueprint.decoder(params)
        hidden = whole_sequences(decoder.hidden(tokens, positions, None, tiny.FLOAT32))
        return decoder.logits(hidden, jax.P(("data", "fsdp", "expert"), None, "tensor"))

    with jax.set_mesh(blueprint.mesh):
        placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, blueprint.state.params)
        found = logits(placed, *tiny.by_rows(blueprint.mesh, tokens, positions))
    return np.asarray(found)[..., : blueprint.config.vocab_size]


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def assert_equal_logits(family: Family, changes: dict[str, Any], rng: np.random.Generator) -> None:
    """Also that the comparison notices a tensor that is wrong, and a switch."""
    config = tiny.with_changes(family.config, **changes)
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    params, tokens, tensors, expected = drawn(family, blueprint, 2, family.length, rng)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours(blueprint, params, tokens), expected, rtol=0, atol=TOLERANCE)
    name = next(name for name in tensors if name.endswith(family.perturbed))
    other = theirs(family.model(config), tensors | {name: -tensors[name]}, tokens)
    assert difference(expected, other) > NOTICEABLE, name
    if not changes:
        other = theirs(family.model(tiny.with_changes(config, **family.wrong)), tensors, tokens)
        assert difference(expected, other) > NOTICEABLE, family.wrong


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name, rng):
    assert_equal_logits(FAMILIES[name], {}, rng)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), GRID)
def test_logits_equal_those_of_transformers_throughout_the_family(name, changes, rng):
    assert_equal_logits(FAMILIES[name], changes, rng)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_same_on_a_mesh(name, rng):
    """Heads, biases, slopes and norms of all heads are split over devices, and the sequence between the blocks."""
    family = FAMILIES[name]
    blueprint = tiny.blueprint_of(family.config, tiny.mesh_of(2, 2, 2))
    params, tokens, _, expected = drawn(family, blueprint, 4, 14, rng)
    found = ours(blueprint, params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert difference(found, expected[::-1]) > NOTICEABLE


def test_mixtral_with_one_expert_is_llama(rng):
    """The router has no say: its one expert has the weight 1, and is the MLP."""
    config = tiny.with_changes(llama.FAMILIES["llama"].config, num_kv_heads=2)
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    dense = random_params(blueprint, rng)
    tokens = rng.integers(0, config.vocab_size, (2, 13)).astype(np.int32)
    block = dict(dense["segments"][0]["blocks"][0])
    mlp = block.pop("mlp")
    block["moe"] = {name: {"kernel": part["kernel"][:, None]} for name, part in mlp.items()}
    router = rng.standard_normal((config.num_layers, config.embed_dim, 1)).astype(np.float32)
    block["moe"]["router"] = {"matrix": router}
    params = dense | {"segments": {0: {"blocks": {0: block}}}}
    config = tiny.with_changes(config, moe=moe.experts(1, 1))
    sparse = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    expected, found = ours(blueprint, dense, tokens), ours(sparse, params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    mixtral = moe.FAMILIES["mixtral"]
    their_logits = theirs(mixtral.model(config), state_dict(config, params, mixtral.names), tokens)
    np.testing.assert_allclose(their_logits, expected, rtol=0, atol=TOLERANCE)
    block["moe"]["up"]["kernel"] = 1.01 * block["moe"]["up"]["kernel"]
    assert difference(ours(sparse, params, tokens), expected) > NOTICEABLE


def test_two_experts_that_are_equally_good_are_noticed(rng):
    family = moe.FAMILIES["mixtral"]
    blueprint = tiny.blueprint_of(family.config, tiny.mesh_of(1, 1, 1))
    _, tokens, tensors, _ = drawn(family, blueprint, 1, 5, rng)
    model = family.model(family.config)
    theirs(model, tensors, tokens)
    assert moe.is_separated(model, tokens, family.config.moe)
    router = model.model.layers[1].mlp.gate.weight
    with torch.no_grad():
        router[1:] = router[0]
    assert not moe.is_separated(model, tokens, family.config.moe)
