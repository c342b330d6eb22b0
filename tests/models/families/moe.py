"""Families with experts. Their models have in memory what the files have expert by expert."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import transformers

from lmjax.models.decoder import DecoderConfig
from lmjax.nn.attention_latent import LatentConfig
from lmjax.nn.moe import MoEConfig
from lmjax.nn.rope_scaling import YarnScaling
from tests.models.families.family import ACTIVATIONS, Family, layer_types, rms_settings, rope_parameters, tiny_config
from tests.models.families.llama import PARTS
from tests.models.families.names import Names, Tensors

SEPARATED = 1e-4
"""Between the logit of the last expert that is chosen and that of the next one: many times what is rounded away."""


def fused(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Tensors:
    """(experts, out, in), the outputs of gate and up one after the other."""
    gate_up = np.concatenate([gate.swapaxes(1, 2), up.swapaxes(1, 2)], axis=1)
    return {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down.swapaxes(1, 2)}


def one_after_the_other(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Tensors:
    """(experts x hidden, embed)."""
    matrices = {"w1": gate.swapaxes(1, 2), "v1": up.swapaxes(1, 2), "w2": down}
    return {f"ffn.experts.mlp.{name}": matrix.reshape(-1, matrix.shape[2]) for name, matrix in matrices.items()}


NAMES = Names(
    embed="model.embed_tokens",
    final_norm="model.norm",
    layer="model.layers.{}",
    parts=PARTS
    | {
        "moe.router": "mlp.gate",
        "moe.shared.gate": "mlp.shared_expert.gate_proj",
        "moe.shared.up": "mlp.shared_expert.up_proj",
        "moe.shared.down": "mlp.shared_expert.down_proj",
        "moe.shared_gate": "mlp.shared_expert_gate",
    },
    experts=fused,
)
DBRX_NAMES = Names(
    embed="transformer.wte",
    final_norm="transformer.norm_f",
    layer="transformer.blocks.{}",
    parts={
        "attention_norm": "norm_attn_norm.norm_1",
        "mlp_norm": "norm_attn_norm.norm_2",
        "attention.query": "norm_attn_norm.attn.Wqkv",
        "attention.key": "norm_attn_norm.attn.Wqkv",
        "attention.value": "norm_attn_norm.attn.Wqkv",
        "attention.out": "norm_attn_norm.attn.out_proj",
        "moe.router": "ffn.router.layer",
    },
    experts=one_after_the_other,
)


DEEPSEEK_NAMES = Names(
    embed="model.embed_tokens",
    final_norm="model.norm",
    layer="model.layers.{}",
    parts=PARTS
    | {
        "attention.query_down": "self_attn.q_a_proj",
        "attention.query_norm": "self_attn.q_a_layernorm",
        "attention.query_up": "self_attn.q_b_proj",
        "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
        "attention.key_rope": "self_attn.kv_a_proj_with_mqa",
        "attention.kv_norm": "self_attn.kv_a_layernorm",
        "attention.key_up": "self_attn.kv_b_proj",
        "attention.value_up": "self_attn.kv_b_proj",
        "moe.router": "mlp.gate",
        "moe.shared.gate": "mlp.shared_experts.gate_proj",
        "moe.shared.up": "mlp.shared_experts.up_proj",
        "moe.shared.down": "mlp.shared_experts.down_proj",
    },
    fused="grouped",
    experts=fused,
)


def experts_of(config: DecoderConfig) -> MoEConfig:
    assert config.moe is not None
    return config.moe


def mixtral(config: DecoderConfig):
    moe = experts_of(config)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **rms_settings(config),
            head_dim=config.head_dim,
            sliding_window=config.sliding_window,
            num_local_experts=moe.num_experts,
            num_experts_per_tok=moe.experts_per_token,
        )
    )


def sparse_settings(config: DecoderConfig) -> dict[str, Any]:
    """Which layers of a Qwen model have experts, and how many: blocks before the pattern, and of one, are named."""
    moe, kinds = experts_of(config), [block.mlp for block in config.blocks]
    step = len(moe.pattern) if not moe.dense_first and moe.pattern.index("moe") == len(moe.pattern) - 1 else 1
    return {
        "decoder_sparse_step": step,
        "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == "dense"] if step == 1 else [],
        "moe_intermediate_size": config.expert_dim,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": moe.renormalize,
    }


def qwen2_moe(config: DecoderConfig):
    window = config.sliding_window
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **rms_settings(config),
            **sparse_settings(config),
            use_sliding_window=window is not None,
            sliding_window=window,
            layer_types=layer_types(config),
            shared_expert_intermediate_size=experts_of(config).shared_dim,
            qkv_bias=config.qkv_bias,
        )
    )


def qwen3_moe(config: DecoderConfig):
    window = config.sliding_window
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **rms_settings(config),
            **sparse_settings(config),
            use_sliding_window=window is not None,
            sliding_window=window,
            head_dim=config.head_width,
        )
    )


def olmoe(config: DecoderConfig):
    moe = experts_of(config)
    return transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(
            **rms_settings(config),
            num_experts=moe.num_experts,
            num_experts_per_tok=moe.experts_per_token,
            norm_topk_prob=moe.renormalize,
            clip_qkv=config.qkv_clip,
            eos_token_id=None,
        )
    )


def dbrx(config: DecoderConfig):
    """``rope_theta`` is told twice: attention has the first one, and what turns its heads the second one."""
    moe = experts_of(config)
    attention = {"clip_qkv": config.qkv_clip, "kv_n_heads": config.kv_heads, "rope_theta": config.rope_theta}
    experts = {
        "ffn_act_fn": {"name": ACTIVATIONS[config.activation]},
        "ffn_hidden_size": config.mlp_dim,
        "moe_num_experts": moe.num_experts,
        "moe_top_k": moe.experts_per_token,
        "moe_normalize_expert_weights": 1.0 if moe.renormalize else None,
    }
    return transformers.DbrxForCausalLM(
        transformers.DbrxConfig(
            vocab_size=config.vocab_size,
            max_seq_len=config.max_length,
            d_model=config.embed_dim,
            n_layers=config.num_layers,
            n_heads=config.num_heads,
            attn_config=attention,
            ffn_config=experts,
            rope_parameters=rope_parameters(config),
            attn_implementation="eager",
        )
    )


def deepseek_v3(config: DecoderConfig):
    moe, latent = experts_of(config), config.latent
    assert latent is not None
    rope = rope_parameters(config)
    if config.query_scale is not None:  # of its scale YaRN's files tell by a weight
        assert config.rope_scaling is not None
        temperature = math.sqrt(config.query_scale * math.sqrt(config.head_width))
        weight = round((temperature - 1) / (0.1 * math.log(config.rope_scaling.factor)), 6)
        rope = {key: value for key, value in rope.items() if key != "attention_factor"}
        rope |= {"mscale": weight, "mscale_all_dim": weight}
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **rms_settings(config) | {"rope_parameters": rope},
            rope_interleave=config.rope_interleaved,
            kv_lora_rank=latent.kv_rank,
            q_lora_rank=latent.query_rank,
            qk_rope_head_dim=latent.rope_dim,
            qk_nope_head_dim=config.head_width - latent.rope_dim,
            v_head_dim=latent.value_dim,
            moe_intermediate_size=config.expert_dim,
            n_routed_experts=moe.num_experts,
            n_shared_experts=(moe.shared_dim or 0) // config.expert_dim,
            num_experts_per_tok=moe.experts_per_token,
            norm_topk_prob=moe.renormalize,
            routed_scaling_factor=moe.weight_scale,
            n_group=moe.groups,
            topk_group=moe.top_groups,
            first_k_dense_replace=moe.dense_first,
            num_nextn_predict_layers=0,
        )
    )


def is_separated(model: Any, tokens: np.ndarray, moe: MoEConfig) -> bool:
    """Whether no rounding changes which experts any router of ``model`` chooses for any of the ``tokens``."""
    with torch.no_grad():
        found = model(torch.from_numpy(tokens).long(), use_cache=False, output_router_logits=True).router_logits
    if moe.choice_bias_rate is None:
        return _is_apart(torch.cat(found), moe.experts_per_token)
    biases = [bias for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")]
    preferences = torch.cat([logits.sigmoid() + bias for logits, bias in zip(found, biases, strict=True)])
    of_groups = preferences.reshape(len(preferences), moe.groups, -1)
    best = of_groups.topk(min(2, of_groups.shape[2])).values.sum(-1)
    chosen = (best >= best.topk(moe.top_groups).values[:, -1:])[:, :, None]
    within = torch.where(chosen, of_groups, -9.0).flatten(1)
    return _is_apart(best, moe.top_groups) and _is_apart(within, moe.experts_per_token)


def _is_apart(values: torch.Tensor, count: int) -> bool:
    """Whether in each row the ``count`` largest ones are well above the others."""
    ordered = values.sort(descending=True).values
    return bool((ordered[:, count - 1 : count] - ordered[:, count:] > SEPARATED).all())


def experts(num_experts: int, experts_per_token: int, **fields: Any) -> MoEConfig:
    return MoEConfig(num_experts=num_experts, experts_per_token=experts_per_token, **fields)


QWEN2 = experts(6, 3, renormalize=False, shared_dim=40, shared_gate=True)
QWEN3 = experts(8, 2)
ALTERNATING = {"expert_dim": 24, "pattern": ("dense", "moe")}
WINDOW = {"layer_pattern": ("sliding",), "sliding_window": 4}


def qwen2(**changes: Any) -> dict[str, Any]:
    return {"moe": dataclasses.replace(QWEN2, **changes)}


DEEPSEEK = experts(
    8,
    3,
    expert_dim=24,
    dense_first=1,
    shared_dim=24,
    scores="sigmoid",
    weight_scale=2.5,
    groups=4,
    top_groups=2,
    choice_bias_rate=0.0,
)
LATENT = LatentConfig(kv_rank=20, query_rank=28, rope_dim=6, value_dim=10)
HEAD = 14
"""Width of queries and keys of which LATENT's are rotated."""


def longer(weight: float) -> dict[str, Any]:
    """Rows eight times as long as the first ones, and the scale of the queries that goes with this weight."""
    scaling = YarnScaling(factor=8.0, original_length=8, beta_fast=4.0, attention_factor=1.0)
    return {"rope_scaling": scaling, "query_scale": HEAD**-0.5 * (0.1 * weight * math.log(8.0) + 1) ** 2}


FAMILIES = {
    "mixtral": Family(
        config=tiny_config(num_kv_heads=2, rope_theta=100.0, moe=experts(4, 2)),
        model=mixtral,
        names=NAMES,
        wrong={"moe": experts(4, 1, renormalize=False)},
        perturbed="1.post_attention_layernorm.weight",
        grid={
            "one expert": {"moe": experts(1, 1)},
            "all experts": {"moe": experts(3, 3)},
            "a softmax of the chosen": {"moe": experts(5, 2, softmax_over="chosen")},
            "windows": WINDOW,
        },
    ),
    "qwen2_moe": Family(
        config=tiny_config(num_kv_heads=2, qkv_bias=True, num_layers=4, **qwen2(**ALTERNATING)),
        model=qwen2_moe,
        names=NAMES,
        wrong=qwen2(renormalize=True, **ALTERNATING),
        perturbed="shared_expert_gate.weight",
        grid={
            "experts in every block": {"num_layers": 2, **qwen2(renormalize=True)},
            "dense first": {"num_layers": 3, **qwen2(expert_dim=24, dense_first=1)},
            "dense last": {"num_layers": 3, **qwen2(expert_dim=24, pattern=("moe", "moe", "dense"))},
            "windows in some layers": {"layer_pattern": ("sliding", "full"), "sliding_window": 4},
            "without biases, tied": {"qkv_bias": False, "tie_embeddings": True},
        },
    ),
    "qwen3_moe": Family(
        config=tiny_config(num_kv_heads=2, head_dim=12, qk_norm="head", norm_epsilon=1e-6, moe=QWEN3),
        model=qwen3_moe,
        names=NAMES,
        wrong={"norm_epsilon": 1e-2},
        perturbed="1.mlp.gate.weight",
        grid={
            "weights as they are": {"moe": experts(8, 2, renormalize=False)},
            "dense blocks between": {"num_layers": 5, "moe": dataclasses.replace(QWEN3, **ALTERNATING)},
            "windows": WINDOW,
        },
    ),
    "olmoe": Family(
        config=tiny_config(num_kv_heads=2, rope_theta=100.0, qk_norm="full", moe=experts(8, 4, renormalize=False)),
        model=olmoe,
        names=NAMES,
        wrong={"moe": experts(8, 4)},
        perturbed="self_attn.k_norm.weight",
        grid={
            "multi-head, weights of sum 1": {"num_kv_heads": None, "moe": experts(8, 1, renormalize=False)},
            "clipped after the norms": {"qkv_clip": 0.8},
        },
    ),
    "dbrx": Family(
        config=tiny_config(num_kv_heads=2, rope_theta=100.0, norm="layer", qkv_clip=1.5, moe=experts(6, 4)),
        model=dbrx,
        names=DBRX_NAMES,
        wrong={"rope_theta": 110.0},
        perturbed="ffn.experts.mlp.v1",
        grid={
            "weights as they are": {"moe": experts(6, 2, renormalize=False)},
            "gelu": {"activation": "gelu", "num_kv_heads": 1},
        },
    ),
    "deepseek_v3": Family(
        config=tiny_config(
            num_layers=3,
            head_dim=HEAD,
            latent=LATENT,
            rope_theta=100.0,
            rope_interleaved=True,
            norm_epsilon=1e-6,
            moe=DEEPSEEK,
        ),
        model=deepseek_v3,
        names=DEEPSEEK_NAMES,
        wrong={"rope_interleaved": False},
        perturbed="self_attn.kv_a_layernorm.weight",
        grid={
            "queries of the residual stream": {"latent": dataclasses.replace(LATENT, query_rank=None)},
            "halves turned": {"rope_interleaved": False},
            "yarn": longer(1.0),
            "yarn, another weight": longer(0.7),
            "no dense block": {
                "num_layers": 2,
                "mlp_dim": 24,
                "moe": dataclasses.replace(DEEPSEEK, dense_first=0, expert_dim=None, shared_dim=48),
            },
            "one group": {"moe": dataclasses.replace(DEEPSEEK, groups=1, top_groups=1, renormalize=False)},
        },
    ),
}
