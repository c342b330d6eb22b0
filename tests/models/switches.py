"""Configs in which as many switches are on at once as go together; between them they have every one."""

from typing import Any

from lmjax.nn.attention_latent import LatentConfig
from lmjax.nn.moe import MoEConfig
from lmjax.nn.rope_scaling import DynamicScaling
from tests.tiny import CONFIG, with_changes

SWITCHES: dict[str, dict[str, Any]] = {
    "rope": {
        "num_layers": 5,
        "num_kv_heads": 2,
        "layer_pattern": ("sliding", "full"),
        "sliding_window": 4,
        "norm_unit_offset": True,
        "norm_placement": "sandwich",
        "embed_norm": True,
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "rope_theta_sliding": 50.0,
        "rope_fraction": 0.5,
        "rope_interleaved": True,
        "rope_scaling": DynamicScaling(factor=2.0, original_length=8),
        "head_dim": 8,
        "qk_norm": "head",
        "query_scale": 0.7,
        "attention_softcap": 2.0,
        "attention_sinks": True,
        "qkv_clip": 1.5,
        "tie_embeddings": True,
        "logit_softcap": 3.0,
        "embed_multiplier": 4.0,
        "residual_multiplier": 0.7,
        "logit_multiplier": 1.5,
        "dropout": 0.2,
    },
    "alibi": {
        "num_heads": 6,
        "num_kv_heads": 3,  # which two devices do not divide
        "norm": "layer",
        "norm_bias": True,
        "residual": "parallel_shared_norm",
        "activation": "relu",
        "mlp_gated": False,
        "head_bias": True,
        "position": "alibi",
        "alibi_max": 6.0,
        "alibi_scale": 0.5,
        "qk_norm": "full",
        "attention_sinks": True,
        "dropout": 0.2,
    },
    "learned": {
        "num_kv_heads": 1,
        "norm": "layer",
        "residual": "parallel",
        "activation": "gelu",
        "mlp_bias": True,
        "head_bias": True,
        "tie_embeddings": True,
        "position": "learned",
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "init": "olmo2",
    },
    "sinusoidal": {"norm_placement": "post", "qk_norm": "full", "mlp_gated": False, "position": "sinusoidal"},
    "moe": {
        "num_layers": 5,
        "layer_pattern": ("sliding", "full"),
        "sliding_window": 4,
        "moe": MoEConfig(
            num_experts=4,
            experts_per_token=2,
            pattern=("dense", "moe"),
            dense_first=1,
            expert_dim=24,
            shared_dim=16,
            shared_gate=True,
            choice_bias_rate=0.001,
        ),
    },
    "latent": {
        "head_dim": 10,
        "latent": LatentConfig(kv_rank=8, query_rank=4, rope_dim=4, value_dim=6),
        "layer_pattern": ("sliding", "full"),
        "sliding_window": 4,
        "rope_interleaved": True,
        "attention_out_bias": True,
        "attention_softcap": 2.0,
        "attention_sinks": True,
    },
    "none": {
        "norm": "layer",
        "norm_bias": True,
        "position": "none",
        "qk_norm": "head",  # else a bias of keys would change nothing
        "qkv_bias": True,
        "attention_out_bias": True,
    },
}

CONFIGS = {name: with_changes(CONFIG, **({"rope_theta": 10_000.0} | changes)) for name, changes in SWITCHES.items()}
