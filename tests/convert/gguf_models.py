"""Small GGUF files for the tests, written by the gguf package in the way of llama.cpp's convert_hf_to_gguf.py."""

import numpy as np

LAYERS, EMBED, MLP, HEADS, KV_HEADS, WIDTH = 2, 96, 160, 6, 2, 16
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SHAPES = {
    "attn_norm": (EMBED,),
    "attn_q": (HEADS * WIDTH, EMBED),
    "attn_k": (KV_HEADS * WIDTH, EMBED),
    "attn_v": (KV_HEADS * WIDTH, EMBED),
    "attn_output": (EMBED, HEADS * WIDTH),
    "ffn_norm": (EMBED,),
    "ffn_gate": (MLP, EMBED),
    "ffn_up": (MLP, EMBED),
    "ffn_down": (EMBED, MLP),
}
METADATA = {
    "llama.context_length": 128,
    "llama.embedding_length": EMBED,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": MLP,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.dimension_count": WIDTH,
    "llama.rope.freq_base": 50_000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "general.file_type": 1,
}


def permute(weights, heads):
    """Rows of queries or keys from Hugging Face's order into llama.cpp's."""
    return weights.reshape(heads, 2, -1, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def random_weights(rng, *, vocab_size=64, tied=True, biased=False):
    """By Hugging Face's names, in float32."""
    weights = {"model.embed_tokens.weight": (vocab_size, EMBED), "model.norm.weight": (EMBED,)}
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            stem = f"model.layers.{layer}.{NAMES[name]}"
            weights[f"{stem}.weight"] = shape
            if biased and "norm" not in name:
                weights[f"{stem}.bias"] = shape[:1]
    if not tied:
        weights["lm_head.weight"] = (vocab_size, EMBED)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in weights.items()}


def gguf_name(name):
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in outside:
        return f"{outside[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{next(ours for ours, theirs in NAMES.items() if theirs == rest)}.{kind}"


def write_gguf(path, weights, *, kind="F32", metadata=METADATA, extra=None, architecture="llama"):
    """Returns what the file holds: the matrices quantised to ``kind`` and back, by Hugging Face's names."""
    import gguf

    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    held = {}
    for name, values in weights.items():
        own = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(values, own)
        held[name] = gguf.quants.dequantize(packed, own)
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                packed = permute(packed, heads)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=own)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
