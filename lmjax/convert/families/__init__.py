"""The families, one file each."""

from lmjax.convert.families import (
    bloom,
    dbrx,
    deepseek_v3,
    falcon,
    gemma,
    gemma2,
    gemma3_text,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gptj,
    llama,
    mistral,
    mixtral,
    mpt,
    olmo2,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from lmjax.convert.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gemma.FAMILY,
        gemma2.FAMILY,
        gemma3_text.FAMILY,
        phi3.FAMILY,
        olmo2.FAMILY,
        gpt2.FAMILY,
        gptj.FAMILY,
        gpt_neox.FAMILY,
        gpt_bigcode.FAMILY,
        opt.FAMILY,
        phi.FAMILY,
        falcon.FAMILY,
        mpt.FAMILY,
        bloom.FAMILY,
        mixtral.FAMILY,
        qwen2_moe.FAMILY,
        qwen3_moe.FAMILY,
        olmoe.FAMILY,
        dbrx.FAMILY,
        deepseek_v3.FAMILY,
    )
}
"""By ``model_type``. A decoder without a source is exported as the first of these that can say all of it."""
