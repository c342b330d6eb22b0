"""A table that is wrong is noticed: by the list of pieces itself, or by the checks that each family passes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from lmjax.convert.families import FAMILIES, dbrx, llama, mixtral, qwen3
from lmjax.convert.family import CONV1D, Family, Part, linear, norm
from lmjax.convert.layouts import Experts, Rows
from lmjax.convert.pieces import is_ignored, pieces
from lmjax.errors import InputError
from tests import tiny
from tests.convert import family_checks as checks
from tests.models.families import llama as twins
from tests.models.families import moe

TWIN = twins.FAMILIES["llama"]
"""Its queries and keys have one shape, which is square."""


@pytest.fixture(scope="module")
def example(request, tmp_path_factory) -> checks.Example:
    return checks.make_example(TWIN, {}, tiny.generator(request), tmp_path_factory.mktemp("llama"))


def with_parts(**changed: Part) -> Family:
    """Llama, with other parts for those of these paths."""
    block = [changed.get(part.ours[0].replace("/", "_"), part) for part in llama.BLOCK]
    return dataclasses.replace(llama.FAMILY, block=tuple(block))


WRONG = {
    "a square tensor transposed": with_parts(attention_query=Part("self_attn.q_proj", ("attention/query",), CONV1D)),
    "queries and keys swapped": with_parts(
        attention_query=linear("attention/query", "self_attn.k_proj"),
        attention_key=linear("attention/key", "self_attn.q_proj"),
    ),
    "keys and values swapped": with_parts(
        attention_key=linear("attention/key", "self_attn.v_proj"),
        attention_value=linear("attention/value", "self_attn.k_proj"),
    ),
    "gate and up swapped": with_parts(
        mlp_gate=linear("mlp/gate", "mlp.up_proj"), mlp_up=linear("mlp/up", "mlp.gate_proj")
    ),
    "norms swapped": with_parts(
        attention_norm=norm("attention_norm", "post_attention_layernorm"),
        mlp_norm=norm("mlp_norm", "input_layernorm"),
    ),
}
"""Tables whose names and shapes are those of the files."""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_of_the_right_names_and_shapes_changes_the_logits(name, example):
    reading = checks.read(example.directory, WRONG[name])
    checks.check_names(reading)
    checks.check_bits(reading)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        checks.check_logits(reading, example)


def test_a_tensor_of_the_last_layer_with_its_signs_turned_changes_the_logits(example):
    reading = checks.read(example.directory)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = reading.tensors | {name: -reading.tensors[name]}
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        checks.check_logits(dataclasses.replace(reading, tensors=tensors), example)


def changed(family: Family, parts: dict[str, dict[str, Any]]) -> Family:
    """The family with changes to modules of a block, by their names."""
    assert not callable(family.block)
    assert parts.keys() <= {part.theirs for part in family.block}
    block = [dataclasses.replace(part, **parts.get(part.theirs, {})) for part in family.block]
    return dataclasses.replace(family, block=tuple(block))


def swapped(family: Family, one: str, other: str) -> Family:
    return changed(family, {one: {"theirs": other}, other: {"theirs": one}})


EXPERT = "block_sparse_moe.experts.{}"
WRONG_EXPERTS = {
    "gates and ups swapped": ("mixtral", {}, swapped(mixtral.FAMILY, f"{EXPERT}.w1", f"{EXPERT}.w3")),
    "w1 and v1 swapped": ("dbrx", {}, swapped(dbrx.FAMILY, "ffn.experts.mlp.w1", "ffn.experts.mlp.v1")),
    "a square w2 transposed": (
        "dbrx",
        {"mlp_dim": 32},
        changed(dbrx.FAMILY, {"ffn.experts.mlp.w2": {"layout": Experts(output_first=True)}}),
    ),
}


@pytest.mark.parametrize("case", WRONG_EXPERTS)
def test_a_wrong_table_of_experts_changes_the_logits(case, rng, tmp_path):
    name, changes, wrong = WRONG_EXPERTS[case]
    example = checks.make_example(moe.FAMILIES[name], changes, rng, tmp_path)
    reading = checks.read(example.directory, wrong)
    checks.check_names(reading)
    checks.check_bits(reading)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        checks.check_logits(reading, example)


def test_tensors_of_two_experts_swapped_change_the_logits_unless_their_routers_are_too(rng, tmp_path):
    example = checks.make_example(moe.FAMILIES["mixtral"], {}, rng, tmp_path)
    reading = checks.read(example.directory)
    layer = "model.layers.1.block_sparse_moe"

    def other(name: str) -> str:
        return name.replace("experts.0.", "experts.x.").replace("experts.1.", "experts.0.").replace(".x.", ".1.")

    tensors = {other(name) if name.startswith(layer) else name: tensor for name, tensor in reading.tensors.items()}
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        checks.check_logits(dataclasses.replace(reading, tensors=tensors), example)
    router = reading.tensors[f"{layer}.gate.weight"]
    tensors |= {f"{layer}.gate.weight": router[[1, 0, *range(2, len(router))]]}
    checks.check_logits(dataclasses.replace(reading, tensors=tensors), example)


def test_a_slice_that_is_not_filled_changes_the_logits(example):
    reading = checks.read(example.directory)
    with pytest.raises(AssertionError, match="nan location mismatch|Not equal"):
        checks.check_logits(dataclasses.replace(reading, pieces=reading.pieces[:-1]), example)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"model.layers.1.self_attn.q_proj.bias": np.zeros(32, np.float32)},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"},
        lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"][:-1]},
    ],
    ids=["one more", "one less", "another shape"],
)
def test_files_with_other_tensors_are_noticed(change: Callable[[Any], Any], example):
    reading = checks.read(example.directory)
    checks.check_names(reading)
    with pytest.raises(AssertionError):
        checks.check_names(dataclasses.replace(reading, tensors=change(reading.tensors)))


@pytest.mark.parametrize("change", [{"norm_epsilon": 1e-5}, {"num_kv_heads": 2}, {"tie_embeddings": True}])
def test_another_config_than_the_files_say_is_noticed(change, example):
    reading = checks.read(example.directory)
    checks.check_config(reading, example)
    with pytest.raises(AssertionError):
        checks.check_config(reading, dataclasses.replace(example, config=tiny.with_changes(example.config, **change)))


def test_a_layout_that_is_written_otherwise_than_it_is_read_is_noticed(example):
    class Shifted(Rows):
        def write(self, parts):
            return np.roll(super().write(parts), 1, axis=0)

    other = with_parts(attention_query=Part("self_attn.q_proj", ("attention/query",), Shifted(num_inputs=1)))
    with pytest.raises(AssertionError, match="q_proj"):
        checks.check_bits(checks.read(example.directory, other))


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        ({"write_config": lambda config: llama.write_config(config) | {"rope_theta": 110.0}}, "rope_parameters"),
        ({"write_config": lambda config: llama.write_config(config) | {"own_key": 1}}, "own_key"),
        ({"head": "lm_heads"}, "unexpected_keys"),
    ],
    ids=["another theta", "a key more", "another name"],
)
def test_an_export_that_transformers_reads_otherwise_is_noticed(change, noticed, example, tmp_path):
    reading = checks.read(example.directory)
    logits = checks.their_logits(example.model, example.rows)
    written = {"lm_heads.weight": reading.tensors["lm_head.weight"]}
    reading = dataclasses.replace(
        reading, family=dataclasses.replace(reading.family, **change), tensors=reading.tensors | written
    )
    reading = dataclasses.replace(reading, pieces=pieces(reading.family, reading.config))
    with pytest.raises(AssertionError, match=noticed):
        checks.check_export(reading, example, logits, tmp_path / "exported")


def test_files_of_another_family_are_not_read_as_this_one(example):
    values = checks.read_config_file(example.directory)
    with pytest.raises(InputError, match="sliding_window"):
        checks.read_values(values | {"sliding_window": 4})
    with pytest.raises(InputError, match="mlp_bias"):
        checks.read_values(values | {"model_type": "qwen2"})
    own = {"attention_bias", "mlp_bias"}
    as_qwen2 = checks.read_values({key: values[key] for key in values.keys() - own} | {"model_type": "qwen2"})
    names = {piece.name for piece in pieces(*as_qwen2)}
    assert "model.layers.0.self_attn.q_proj.bias" in names - checks.read(example.directory).tensors.keys()


@pytest.mark.fast
def test_a_family_without_a_name_for_a_part_is_an_error_of_the_table():
    config = dataclasses.replace(TWIN.config, qk_norm="head")
    with pytest.raises(AssertionError, match="no tensor holds.*query_norm"):
        pieces(llama.FAMILY, config)
    assert len(pieces(qwen3.FAMILY, config)) == len(pieces(llama.FAMILY, TWIN.config)) + 2 * config.num_layers
    with pytest.raises(AssertionError, match="no name for position"):
        pieces(llama.FAMILY, dataclasses.replace(TWIN.config, position="learned", rope_theta=10_000.0))


@pytest.mark.fast
def test_layers_are_counted_through_patterns_repeats_and_what_is_left_of_them():
    config = dataclasses.replace(
        TWIN.config, num_layers=5, layer_pattern=("sliding", "full"), sliding_window=4, qk_norm="head"
    )
    found = {piece.name: piece.parts[0] for piece in pieces(qwen3.FAMILY, config) if "up_proj" in piece.name}
    assert [(part.path, part.index) for part in found.values()] == [
        ("segments/0/blocks/0/mlp/up/kernel", (0,)),
        ("segments/0/blocks/1/mlp/up/kernel", (0,)),
        ("segments/0/blocks/0/mlp/up/kernel", (1,)),
        ("segments/0/blocks/1/mlp/up/kernel", (1,)),
        ("segments/1/blocks/0/mlp/up/kernel", (0,)),
    ]
    assert list(found) == [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(5)]


@pytest.mark.fast
def test_tensors_that_hold_nothing_are_ignored_and_no_others():
    family = FAMILIES["llama"]
    assert is_ignored(family, "model.layers.11.self_attn.rotary_emb.inv_freq")
    assert not is_ignored(family, "model.layers.11.self_attn.q_proj.bias")
    assert not is_ignored(family, "xmodel.layers.11.self_attn.rotary_emb.inv_freq")
