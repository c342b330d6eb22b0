"""config.json of GPT-2's relatives and of the families with ALiBi: as published, written again, and refused."""

import dataclasses
from typing import Any

import pytest

from lmjax.config import load_model
from lmjax.convert.families import FAMILIES
from lmjax.convert.family import Family
from lmjax.convert.layouts import Table
from lmjax.convert.pieces import pieces
from lmjax.convert.resemblance import differences, resolved
from lmjax.convert.source import read_model
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from tests.convert.published_gpt import PUBLISHED

pytestmark = pytest.mark.fast


def read(values: dict[str, Any]) -> tuple[Family, DecoderConfig]:
    family = FAMILIES[values["model_type"]]
    return family, read_model(family, values, "config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_those_of_our_files(name):
    assert resolved(read(PUBLISHED[name])[1]) == resolved(load_model(f"configs/models/{name}.yaml"))


def test_every_spelling_of_neox_rotary_positions_is_read():
    values = PUBLISHED["gpt_neox_20b"] | {"rotary_pct": 0.5, "rotary_emb_base": 500}
    other = {key: value for key, value in values.items() if not key.startswith("rotary")}
    spellings = [
        values,
        values | {"partial_rotary_factor": 0.5, "rope_theta": 500.0},
        other | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 500.0}},
    ]
    for spelling in spellings:
        config = read(spelling)[1]
        assert (config.rope_fraction, config.rope_theta, config.rope_scaling) == (0.5, 500.0, None)
    assert read(other)[1].rope_fraction == 0.25


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_written_as_they_were_read(name):
    family, config = read(PUBLISHED[name])
    assert differences(family, config) == []


@pytest.mark.parametrize(
    ("name", "changes", "differing"),
    [
        ("gpt_neox_20b", {"mlp_bias": False}, "mlp_bias"),
        ("opt_125m", {"norm_epsilon": 1e-6}, "norm_epsilon"),
        ("falcon_40b", {"residual": "sequential"}, "num_kv_heads"),
        ("falcon_rw_1b", {"alibi_scale": 1.0}, "alibi_scale"),
        ("mpt_7b", {"alibi_max": 16.0}, "alibi_max"),
        ("mpt_7b", {"mlp_dim": 4096}, "mlp_dim"),
        ("bloom_560m", {"activation": "gelu"}, "activation"),
        ("phi2", {"head_dim": 120}, "head_dim"),
    ],
)
def test_a_decoder_that_a_family_does_not_have_is_not_written_as_it(name, changes, differing):
    family, config = read(PUBLISHED[name])
    lines = differences(family, dataclasses.replace(config, **changes))
    assert lines is not None
    assert differing in [line.split(":")[0] for line in lines]


def test_rows_of_positions_that_are_never_read_are_counted_in_the_table():
    (table,) = [piece for piece in pieces(*read(PUBLISHED["opt_125m"])) if piece.name.endswith("positions.weight")]
    assert table.shape == (2050, 768)
    assert table.layout == Table(num_rows=2048, before=2)
    assert [part.path for part in table.parts] == ["position/table"]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt2", {"activation_function": "tanh"}),
    ("gpt2", {"hidden_size": 769}),
    ("starcoder", {"add_cross_attention": True}),
    ("gptj_6b", {"rotary": False}),
    ("gptj_6b", {"rotary_dim": None}),
    ("gptj_6b", {"scale_attn_weights": False}),
    ("gpt_neox_20b", {"hidden_act": "gelu_10"}),
    ("gpt_neox_20b", {"rope_theta": 500.0}),
    ("gpt_neox_20b", {"partial_rotary_factor": 0.5}),
    ("opt_125m", {"do_layer_norm_before": False}),
    ("opt_125m", {"_remove_final_layer_norm": True}),
    ("opt_125m", {"layer_norm_elementwise_affine": False}),
    ("opt_125m", {"word_embed_proj_dim": 512}),
    ("falcon_7b", {"num_ln_in_parallel_attn": 2}),
    ("falcon_7b", {"partial_rotary_factor": 0.5}),
    ("falcon_40b", {"num_ln_in_parallel_attn": 3}),
    ("falcon_40b", {"parallel_attn": False}),
    ("falcon_rw_1b", {"apply_residual_connection_post_layernorm": True}),
    ("mpt_7b", {"no_bias": False}),
    ("mpt_7b", {"logit_scale": 0.5}),
    ("mpt_7b", {"expansion_ratio": 2}),
    ("mpt_7b", {"norm_type": "rmsnorm"}),
    ("mpt_7b", {"embedding_fraction": 0.5}),
    ("bloom_560m", {"apply_residual_connection_post_layernorm": True}),
    ("bloom_560m", {"slow_but_exact": True}),
    ("phi2", {"qk_layernorm": True}),
]
REFUSED_OF_ATTENTION = {
    "attn_type": "multiquery_attention",
    "alibi": False,
    "alibi_bias_max": 16,
    "attn_uses_sequence_id": True,
    "prefix_lm": True,
    "qk_ln": True,
    "rope": True,
}


@pytest.mark.parametrize(("name", "changes"), REFUSED)
def test_what_the_decoder_lacks_is_refused_by_name(name, changes):
    with pytest.raises(InputError, match=rf"config.json: .*{next(iter(changes))}"):
        read(PUBLISHED[name] | changes)


@pytest.mark.parametrize("option", REFUSED_OF_ATTENTION)
def test_what_the_decoder_lacks_of_mpts_attention_is_refused_by_name(option):
    values = PUBLISHED["mpt_7b"]
    attention = values["attn_config"] | {option: REFUSED_OF_ATTENTION[option]}
    with pytest.raises(InputError, match=rf"(?s)config.json: attn_config: .*{option}"):
        read(values | {"attn_config": attention})
