"""DeepSeek-V3 and R1 (transformers' DeepseekV3ForCausalLM): latent attention, and experts chosen within groups."""

import dataclasses
from typing import Any

from lmjax.convert.activations import read_activation
from lmjax.convert.experts import expert_parts, mlp_kinds, moe_of, read_experts
from lmjax.convert.families import llama
from lmjax.convert.family import linear
from lmjax.convert.latent import PARTS, read_latent, write_latent
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

FIELDS = {
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "weight_scale": "routed_scaling_factor",
    "groups": "n_group",
    "top_groups": "topk_group",
}
DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}
ONLY = {"attention_bias": False, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def read_config(settings: Settings) -> dict[str, Any]:
    settings.rename({"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"})
    settings.ignore("num_nextn_predict_layers", "ep_size", "aux_loss_alpha", "seq_aux", "qk_head_dim")
    for key, only in ONLY.items():
        settings.expect(key, only, default=only)
    shared = llama.read_shared(settings, **DEFAULTS)
    num_dense = settings.take("first_k_dense_replace")
    experts = read_experts(
        settings,
        ["dense" if layer < num_dense else "moe" for layer in range(shared["num_layers"])],
        shared_dim=settings.take("n_shared_experts") * settings.take("moe_intermediate_size"),
        scores="sigmoid",
        choice_bias_rate=0.0,
        **{ours: settings.take(theirs) for ours, theirs in FIELDS.items()},
    )
    attention = read_latent(settings)  # whose head_dim is not the file's: that is the rotated part of it
    return {**shared, **experts, **attention, "activation": read_activation(settings, "hidden_act", "silu")}


def write_config(config: DecoderConfig) -> dict[str, Any]:
    moe, kinds = moe_of(config), mlp_kinds(config)
    width = config.mlp_dim if moe.expert_dim is None else moe.expert_dim
    keys = {**llama.write_shared(config), **write_latent(config)}
    return {
        **{key: value for key, value in keys.items() if key != "head_dim"},
        **{theirs: getattr(moe, ours) for ours, theirs in FIELDS.items()},
        "moe_intermediate_size": width,
        "n_shared_experts": (moe.shared_dim or 0) // width,
        "norm_topk_prob": moe.renormalize,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": kinds.index("moe") if "moe" in kinds else len(kinds),
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(
        *(part for part in llama.BLOCK if not part.ours[0].startswith("attention/")),
        *PARTS,
        *expert_parts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        *(linear(f"moe/shared/{name}", f"mlp.shared_experts.{name}_proj") for name in ("gate", "up", "down")),
    ),
    further_layers="num_nextn_predict_layers",
)
