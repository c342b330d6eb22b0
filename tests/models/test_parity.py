"""Logits equal those of transformers' models, with every parameter random: norms that are all ones hide mistakes."""

import jax
import numpy as np
import pytest

from lmjax.models.decoder import DecoderConfig
from tests import tiny
from tests.tiny import CONFIG, FLOAT32

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


def ours(config: DecoderConfig, params, tokens: np.ndarray) -> np.ndarray:
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    @jax.jit
    def hidden(params, tokens, positions):
        return blueprint.decoder(params).hidden(tokens, positions, None, FLOAT32)

    with jax.set_mesh(blueprint.mesh):
        x = hidden(tiny.state_of(blueprint, params).params, *tiny.by_rows(blueprint.mesh, tokens, positions))
    table = params["embed" if config.tie_embeddings else "head"]["table"]
    return np.asarray(x) @ table[: config.vocab_size].T


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="multi-head"),
        pytest.param({"num_kv_heads": 2, "rope_theta": 500_000.0}, id="grouped-query"),
        pytest.param({"num_kv_heads": 1, "tie_embeddings": True}, id="multi-query, tied"),
        pytest.param({"num_kv_heads": 2, "layer_pattern": ("sliding",), "sliding_window": 4}, id="sliding"),
        pytest.param({"head_dim": 6, "norm_epsilon": 1e-2, "num_layers": 3}, id="wide heads, large epsilon"),
    ],
)
def test_logits_equal_those_of_transformers(changes, rng):
    config = tiny.with_changes(CONFIG, **changes)
    params = tiny.random_params(tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1)), rng)
    tokens = rng.integers(0, config.vocab_size, (2, 14)).astype(np.int32)
    tensors = as_transformers(config, params)
    expected = theirs(config, tensors, tokens)
    found = ours(config, params, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    name = "model.layers.1.post_attention_layernorm.weight"
    wrong = theirs(config, {**tensors, name: np.ones_like(tensors[name])}, tokens)
    assert np.abs(found - wrong).max() > 1e-2
    if config.sliding_window is not None:
        off_by_one = tiny.with_changes(config, sliding_window=config.sliding_window + 1)
        assert np.abs(found - theirs(off_by_one, tensors, tokens)).max() > 1e-2
