"""Falcon in its three layouts: 7B, 40B and 11B, and RW (transformers' FalconForCausalLM)."""

from typing import Any

from lmjax.convert.activations import read_activation, write_activation
from lmjax.convert.families.bloom import BRANCHES
from lmjax.convert.families.gpt2 import BIASES, PLAIN
from lmjax.convert.family import Family, Part, head_dim_of, norm, read_fields, write_fields
from lmjax.convert.rope import read_whole_rope, write_rope
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_epsilon": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
SIZES = {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71}
DEFAULTS = SIZES | {"max_position_embeddings": 2048, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}


def read_config(settings: Settings) -> dict[str, Any]:
    settings.rename({"n_embed": "hidden_size"})
    settings.fill(DEFAULTS)
    settings.expect("apply_residual_connection_post_layernorm", False, default=False)
    fields = read_fields(settings, FIELDS)
    return {
        **PLAIN,
        **fields,
        **dict.fromkeys((*BIASES, "mlp_bias"), settings.take("bias", False)),
        **_read_block(settings, fields["num_heads"]),
        **_read_position(settings, head_dim_of(fields)),
        "mlp_dim": settings.take("ffn_hidden_size", None) or 4 * fields["embed_dim"],
        "activation": read_activation(settings, "activation", "gelu"),
    }


def _read_block(settings: Settings, num_heads: int) -> dict[str, Any]:
    num_kv_heads, num_norms = (settings.take(key, None) for key in ("num_kv_heads", "num_ln_in_parallel_attn"))
    multi_query, is_parallel = (settings.take(key, True) for key in ("multi_query", "parallel_attn"))
    if settings.take("new_decoder_architecture", False):
        settings.expect("parallel_attn", True, default=True)
        settings.expect("num_ln_in_parallel_attn", None, 1, 2)
        return {"num_kv_heads": num_kv_heads, "residual": "parallel_shared_norm" if num_norms == 1 else "parallel"}
    if is_parallel:
        settings.expect("num_ln_in_parallel_attn", None, 1)
    residual = "parallel_shared_norm" if is_parallel else "sequential"
    return {"num_kv_heads": 1 if multi_query else num_heads, "residual": residual}


def _read_position(settings: Settings, head_dim: int) -> dict[str, Any]:
    if not settings.take("alibi", False):
        return read_whole_rope(settings)
    settings.ignore("rope_parameters", "rope_scaling", "rope_theta")
    return {"position": "alibi", "alibi_scale": head_dim**-0.5}  # the biases are added before the scores are scaled


def write_config(config: DecoderConfig) -> dict[str, Any]:
    is_parallel, shares_norm = config.residual != "sequential", config.residual == "parallel_shared_norm"
    fits_old = not is_parallel or (shares_norm and config.kv_heads in (1, config.num_heads))
    return {
        **write_fields(config, FIELDS),
        **({} if config.position == "alibi" else write_rope(config)),
        "alibi": config.position == "alibi",
        "ffn_hidden_size": config.mlp_dim,
        "activation": write_activation(config.activation),
        "bias": config.qkv_bias,
        "new_decoder_architecture": not fits_old,
        "num_kv_heads": config.kv_heads,
        "multi_query": config.kv_heads == 1,
        "parallel_attn": is_parallel,
        "num_ln_in_parallel_attn": (1 if shares_norm else 2) if is_parallel else None,
    }


def block(config: DecoderConfig) -> tuple[Part, ...]:
    names = ("ln_attn", "ln_mlp") if config.residual == "parallel" else ("input_layernorm", "post_attention_layernorm")
    return (norm("attention_norm", names[0]), norm("mlp_norm", names[1]), *BRANCHES)


FAMILY = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=block,
    layer="transformer.h.{}",
    embed="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    ignored=(r"transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq",),
)
