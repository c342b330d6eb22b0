"""A Llama or Mistral of transformers with the parameters of one of our decoders."""

import numpy as np
import pytest

from lmjax.models.decoder import DecoderConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def theirs(config: DecoderConfig, tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The logits of the model of the same shape with these tensors."""
    shape = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }
    if config.sliding_window is None:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        shape["sliding_window"] = config.sliding_window
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**shape))
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def as_transformers(config: DecoderConfig, params) -> dict[str, np.ndarray]:
    """Our parameters under their names: matrices transposed to (out, in), heads flattened, layers apart, no padding."""
    tensors = {
        "model.embed_tokens.weight": params["embed"]["table"][: config.vocab_size],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = params["head"]["table"][: config.vocab_size]
    block = params["segments"][0]["blocks"][0]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = block["attention_norm"]["scale"][i]
        tensors[f"{layer}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"][i]
        for ours, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            kernel = block["attention"][ours]["kernel"][i]
            tensors[f"{layer}.self_attn.{name}.weight"] = kernel.reshape(config.embed_dim, -1).T
        kernel = block["attention"]["out"]["kernel"][i]
        tensors[f"{layer}.self_attn.o_proj.weight"] = kernel.reshape(-1, config.embed_dim).T
        for name in ("gate", "up", "down"):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = block["mlp"][name]["kernel"][i].T
    return tensors
