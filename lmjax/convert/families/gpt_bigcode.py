"""StarCoder and SantaCoder (transformers' GPTBigCodeForCausalLM)."""

from typing import Any

from lmjax.convert.families.gpt2 import BIASES, read_scale, read_shared, write_scale, write_shared
from lmjax.convert.family import GROUPED, QKV, Family, Part, linear, norm
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

UNUSED = (
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
    "inference_runner",
    "max_batch_size",
    "max_sequence_length",
    "pad_key_length",
    "pre_allocate_kv_cache",
    "validate_runner_input",
)
"""Of how attention is run; its softmax is always in float32 here."""


def read_config(settings: Settings) -> dict[str, Any]:
    settings.ignore(*UNUSED, "num_key_value_heads")
    return {
        **read_shared(settings, activation="gelu_pytorch_tanh"),
        **BIASES,
        **read_scale(settings),
        "num_kv_heads": 1 if settings.take("multi_query", True) else None,
        "position": "learned",
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    shared = write_shared(config, activation="gelu_pytorch_tanh")
    return {**shared, **write_scale(config), "multi_query": config.kv_heads == 1}


FAMILY = Family(
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(
        norm("attention_norm", "ln_1"),
        # One key head is behind all query heads; as many as these lie head by head.
        Part("attn.c_attn", QKV, GROUPED),
        linear("attention/out", "attn.c_proj"),
        norm("mlp_norm", "ln_2"),
        linear("mlp/up", "mlp.c_fc"),
        linear("mlp/down", "mlp.c_proj"),
    ),
    layer="transformer.h.{}",
    embed="transformer.wte",
    position="transformer.wpe",
    final_norm="transformer.ln_f",
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)
