"""GPT-NeoX and Pythia (transformers' GPTNeoXForCausalLM)."""

from typing import Any

from lmjax.convert.activations import read_activation, write_activation
from lmjax.convert.families.gpt2 import BIASES, PLAIN
from lmjax.convert.family import GROUPED, QKV, Family, Part, linear, norm, read_fields, write_fields
from lmjax.convert.rope import read_rope, write_rope
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_epsilon": "layer_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {
    "vocab_size": 50432,
    "max_position_embeddings": 2048,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def read_config(settings: Settings) -> dict[str, Any]:
    settings.ignore("attention_probs_dropout_prob")
    settings.rename({"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"})
    settings.fill(DEFAULTS)
    bias = settings.take("attention_bias", True)
    return {
        **PLAIN,
        **dict.fromkeys(BIASES, bias),
        **read_fields(settings, FIELDS),
        **read_rope(settings, fraction=0.25),
        "residual": "parallel" if settings.take("use_parallel_residual", True) else "sequential",
        "activation": read_activation(settings, "hidden_act", "gelu"),
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_fields(config, FIELDS),
        # The only names that transformers reads outside of rope_parameters.
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rope_fraction,
        "rope_scaling": write_rope(config)["rope_scaling"],
        "use_parallel_residual": config.residual == "parallel",
        "hidden_act": write_activation(config.activation, "gelu_fast"),
        "attention_bias": config.qkv_bias,
    }


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(
        norm("attention_norm", "input_layernorm"),
        norm("mlp_norm", "post_attention_layernorm"),
        Part("attention.query_key_value", QKV, GROUPED),
        linear("attention/out", "attention.dense"),
        linear("mlp/up", "mlp.dense_h_to_4h"),
        linear("mlp/down", "mlp.dense_4h_to_h"),
    ),
    layer="gpt_neox.layers.{}",
    embed="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
