"""config.json of families with experts: as published, as transformers reads it, written again, and refused."""

import copy
import dataclasses
import math
from typing import Any

import pytest

from lmjax.config import load_model
from lmjax.convert.families import FAMILIES
from lmjax.convert.family import Family
from lmjax.convert.pieces import pieces
from lmjax.convert.resemblance import choose_family, differences, differing_fields, is_unchanged, resolved
from lmjax.convert.source import read_model
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.models.counts import parameter_count
from lmjax.nn.moe import MoEConfig
from tests.convert.published_moe import DBRX, DEEPSEEK_V3, MIXTRAL, PUBLISHED, QWEN2_MOE, QWEN3_MOE

pytestmark = pytest.mark.fast


def read(values: dict[str, Any]) -> tuple[Family, DecoderConfig]:
    family = FAMILIES[values["model_type"]]
    return family, read_model(family, values, "config.json")


def their_config(values: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = copy.deepcopy(values)  # which transformers changes
    return transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)


def with_experts(config: DecoderConfig, **changes: Any) -> DecoderConfig:
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_those_of_our_files(name):
    ours = load_model(f"configs/models/{name}.yaml")
    assert resolved(read(PUBLISHED[name])[1]) == resolved(ours)
    assert resolved(read(PUBLISHED[name])[1]) != resolved(dataclasses.replace(ours, mlp_dim=ours.mlp_dim + 1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_written_as_they_were_read(name):
    family, config = read(PUBLISHED[name])
    assert differences(family, config) == []
    assert is_unchanged(family, PUBLISHED[name], config)
    assert choose_family(config) is family


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "dbrx"])
def test_published_configs_mean_the_same_once_transformers_has_read_them(name):
    assert resolved(read(their_config(PUBLISHED[name]).to_dict())[1]) == resolved(read(PUBLISHED[name])[1])


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_keys_that_are_absent_mean_what_they_mean_in_transformers(name):
    values = {"model_type": name}
    assert resolved(read(values)[1]) == resolved(read(their_config(values).to_dict())[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_in_transformers(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(their_config(PUBLISHED[name]))
    biases = [bias for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")]
    count = sum(tensor.numel() for tensor in (*model.parameters(), *biases))
    family, config = read(PUBLISHED[name])
    assert parameter_count(config) == count
    names = [piece.name for piece in pieces(family, config)]
    assert len(set(names)) == len(names)


def test_each_expert_has_tensors_of_its_own_under_the_names_of_the_files():
    family, config = read(MIXTRAL)
    found = {piece.name: piece for piece in pieces(family, config)}
    tensor = found["model.layers.31.block_sparse_moe.experts.7.w2.weight"]
    assert tensor.shape == (4096, 14336)
    (part,) = tensor.parts
    assert part == ("segments/0/blocks/0/moe/down/kernel", (31, 7), (14336, 4096))
    assert found["model.layers.0.block_sparse_moe.gate.weight"].shape == (8, 4096)
    assert "model.layers.31.block_sparse_moe.experts.8.w2.weight" not in found
    assert not any(".mlp." in name for name in found)


def test_all_experts_of_dbrx_are_in_one_tensor():
    found = {piece.name: piece for piece in pieces(*read(DBRX))}
    tensor = found["transformer.blocks.39.ffn.experts.mlp.w2"]
    assert tensor.shape == (16 * 10752, 6144)
    assert [part[:2] for part in tensor.parts] == [("segments/0/blocks/0/moe/down/kernel", (39,))]


def test_dbrx_has_its_theta_where_published_files_have_it():
    assert read(DBRX)[1].rope_theta == 500_000
    ignored = their_config(DBRX).to_dict()
    assert ignored["rope_parameters"]["rope_theta"] == 10_000, "transformers looks into attn_config, and this can go"
    with pytest.raises(InputError, match=r"rope_theta is 10000\.0 and that of attn_config 500000"):
        read(ignored)
    family, config = read(DBRX)
    written = {"model_type": "dbrx", **family.write_config(config)}
    assert their_config(written).rope_parameters["rope_theta"] == 500_000
    assert their_config(written).attn_config.rope_theta == 500_000


def test_keys_and_values_of_latent_attention_lie_head_by_head_in_one_tensor():
    found = {piece.name: piece for piece in pieces(*read(DEEPSEEK_V3))}
    fused = found["model.layers.60.self_attn.kv_b_proj.weight"]
    assert fused.shape == (128 * (128 + 128), 512)
    assert [part.path.rpartition("attention/")[2] for part in fused.parts] == ["key_up/kernel", "value_up/kernel"]
    assert found["model.layers.60.self_attn.kv_a_proj_with_mqa.weight"].shape == (512 + 64, 7168)
    assert found["model.layers.0.self_attn.q_b_proj.weight"].shape == (128 * 192, 1536)
    assert found["model.layers.3.mlp.gate.e_score_correction_bias"].shape == (256,)
    assert found["model.layers.60.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert "model.layers.2.mlp.gate.weight" not in found


@pytest.mark.parametrize("weight", [1.0, 0.707, 0.25])
def test_the_weight_of_yarn_in_the_scale_of_latent_attention_goes_in_and_out(weight):
    scaling = DEEPSEEK_V3["rope_scaling"] | {"mscale": weight, "mscale_all_dim": weight}
    family, config = read(DEEPSEEK_V3 | {"rope_scaling": scaling})
    assert config.query_scale == pytest.approx(192**-0.5 * (0.1 * weight * math.log(40) + 1) ** 2, rel=1e-12)
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == 1
    assert differences(family, config) == []
    written = family.write_config(config)["rope_scaling"]
    assert (written["mscale"], written["mscale_all_dim"]) == (weight, weight)
    lines = differences(family, dataclasses.replace(config, rope_scaling=None))
    assert lines is not None
    assert [line.split(":")[0] for line in lines] == ["query_scale"]


def test_weights_of_yarn_that_differ_scale_what_is_rotated():
    scaling = DEEPSEEK_V3["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 0.5}
    family, config = read(DEEPSEEK_V3 | {"rope_scaling": scaling})
    mscale = [0.1 * weight * math.log(40) + 1 for weight in (1.0, 0.5)]
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(mscale[0] / mscale[1], rel=1e-12)
    assert config.query_scale == pytest.approx(192**-0.5 * mscale[1] ** 2, rel=1e-12)
    assert differences(family, config) == []


LAYERS = {
    "every second": ({"decoder_sparse_step": 2}, 0, ("dense", "moe")),
    "but the first": ({"mlp_only_layers": [0]}, 1, ("moe",)),
    "but the first two": ({"mlp_only_layers": [0, 1]}, 2, ("moe",)),
    "every second but the second": ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, 2, ("dense", "moe")),
    "but the last": ({"mlp_only_layers": [23]}, 0, ("moe",) * 23 + ("dense",)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_experts_are_a_pattern(name):
    changes, dense_first, pattern = LAYERS[name]
    family, config = read(QWEN2_MOE | changes)
    assert config.moe is not None
    assert (config.moe.dense_first, config.moe.pattern) == (dense_first, pattern)
    assert (config.mlp_dim, config.expert_dim) == (5632, 1408)
    assert differences(family, config) == []
    theirs = their_config(QWEN2_MOE | changes)
    dense = [
        layer in theirs.mlp_only_layers or (layer + 1) % theirs.decoder_sparse_step > 0
        for layer in range(theirs.num_hidden_layers)
    ]
    assert [block.mlp == "dense" for block in config.blocks] == dense


def test_windows_of_qwen_2_are_in_every_second_layer():
    values = QWEN2_MOE | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 4}
    config = read(values)[1]
    assert [block.attention for block in config.blocks][:6] == ["sliding", "full", "sliding", "full", "full", "full"]
    assert resolved(read(their_config(values).to_dict())[1]) == resolved(config)


def test_what_is_of_training_makes_no_other_model():
    family, config = read(MIXTRAL)
    trained = with_experts(
        config, capacity_factor=1.25, jitter=0.01, balance_weight=0.5, balance_over="batch", z_weight=0.1
    )
    assert is_unchanged(family, MIXTRAL, trained)
    assert differing_fields(config, trained) == []
    chosen = with_experts(config, softmax_over="chosen")
    assert is_unchanged(family, MIXTRAL, chosen)
    assert not is_unchanged(family, MIXTRAL, with_experts(config, weight_scale=2.0))


@pytest.mark.parametrize(
    ("name", "changes", "differing"),
    [
        ("mixtral_8x7b", {"renormalize": False}, "moe.renormalize"),
        ("mixtral_8x7b", {"scores": "sigmoid"}, "moe.scores"),
        ("mixtral_8x7b", {"shared_dim": 64}, "moe.shared_dim"),
        ("mixtral_8x7b", {"choice_bias_rate": 0.001}, "moe.choice_bias_rate"),
        ("qwen2_moe_a2_7b", {"shared_gate": False}, "moe.shared_gate"),
        ("qwen3_30b_a3b", {"groups": 8, "top_groups": 4}, "moe.groups"),
        ("olmoe_1b_7b", {"weight_scale": 2.0}, "moe.weight_scale"),
        ("dbrx", {"pattern": ("dense", "moe")}, "moe.pattern"),
    ],
)
def test_experts_that_a_family_does_not_have_are_not_written_as_it(name, changes, differing):
    family, config = read(PUBLISHED[name])
    lines = differences(family, with_experts(config, **changes))
    assert lines is not None
    assert differing in [line.split(":")[0] for line in lines]


def test_a_decoder_with_experts_is_not_written_without_them_nor_the_other_way():
    dense = dataclasses.replace(read(MIXTRAL)[1], moe=None)
    assert choose_family(dense).model_type == "llama"
    for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dbrx", "deepseek_v3"):
        assert differences(FAMILIES[name], dense) != []
    assert differences(FAMILIES["llama"], read(MIXTRAL)[1]) != []
    switch = load_model("configs/models/switch_base_decoder.yaml")
    with pytest.raises(InputError, match="no Hugging Face family has such a model"):
        choose_family(switch)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral_8x7b", {"num_experts_per_tok": 9}, "experts_per_token is 9"),
    ("mixtral_8x7b", {"num_experts_per_tok": 1}, "experts_per_token is 1"),
    ("mixtral_8x7b", {"num_experts": 4}, "num_experts is 4 and num_local_experts is 8"),
    ("mixtral_8x7b", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    ("qwen2_moe_a2_7b", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("qwen2_moe_a2_7b", {"decoder_sparse_step": 25}, "it has to name a moe block"),
    ("qwen2_moe_a2_7b", {"num_experts": 0}, "num_experts is 0"),
    ("olmoe_1b_7b", {"clip_qkv": -8.0}, "qkv_clip is -8.0"),
    ("olmoe_1b_7b", {"head_dim": 64}, "head_dim is 64"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias is true"),
    ("deepseek_v3", {"num_key_value_heads": 8}, "num_kv_heads is 8 and latent is given"),
    ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method is "greedy"'),
    ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func is "softmax"'),
    ("deepseek_v3", {"n_group": 7}, "num_experts 256 does not divide into groups 7"),
    ("deepseek_v3", {"first_k_dense_replace": 61}, "it has to name a moe block"),
    ("deepseek_v3", {"kv_lora_rank": 0}, "kv_rank is 0"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, r"the weights are quantized \(fp8\)"),
    ("dbrx", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ("dbrx", {"ffn_config": DBRX["ffn_config"] | {"moe_normalize_expert_weights": 2}}, "ffn_config: moe_normalize"),
    ("dbrx", {"ffn_config": DBRX["ffn_config"] | {"moe_top_k": 1}}, "ffn_config: .*experts_per_token is 1"),
    ("dbrx", {"ffn_config": DBRX["ffn_config"] | {"ffn_act_fn": {"name": "quick_gelu"}}}, "ffn_act_fn: name"),
    ("dbrx", {"ffn_config": DBRX["ffn_config"] | {"uniform_expert_assignment": True}}, "uniform_expert_assignment"),
    ("dbrx", {"attn_config": DBRX["attn_config"] | {"clip_qkv": None}}, "attn_config: clip_qkv is null"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_the_decoder_lacks_is_refused_by_name(name, changes, message):
    with pytest.raises(InputError, match=rf"(?s)config\.json: .*{message}"):
        read(PUBLISHED[name] | changes)


def test_the_fewest_blocks_spell_a_model():
    family, config = read(QWEN3_MOE | {"mlp_only_layers": [0], "num_hidden_layers": 4})
    longer = with_experts(config, dense_first=0, pattern=("dense", "moe", "moe", "moe"))
    assert longer.blocks == config.blocks
    assert resolved(longer) == resolved(config)
    assert resolved(longer) != resolved(with_experts(config, dense_first=2))
    assert differences(family, longer) == []
    assert isinstance(config.moe, MoEConfig)
