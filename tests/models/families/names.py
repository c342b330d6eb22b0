"""Our tree of parameters under the names, shapes and fused layouts that a transformers model has in memory."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from lmjax.models.decoder import DecoderConfig

Tensors = dict[str, np.ndarray]

SUFFIX = {
    "kernel": "weight",
    "matrix": "weight",
    "scale": "weight",
    "bias": "bias",
    "choice_bias": "e_score_correction_bias",
}


MATRICES = ("kernel", "matrix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """What a transformers model calls our parts; linear layers are stored (out, in) with heads flattened."""

    embed: str
    final_norm: str
    layer: str
    """A layer's prefix, with {} for its number."""
    parts: dict[str, str]
    """Our part of a block to theirs. Parts with one name are fused into one tensor, in this order."""
    fused: Literal["stacked", "grouped"] = "stacked"
    """``stacked``: one part after the other. ``grouped``: for each key head its query heads, itself, its value head."""
    embed_norm: str | None = None
    position: str | None = None
    position_offset: int = 0
    """Rows before that of position 0, which are never read."""
    input_first: bool = False
    """Whether linear layers are stored (in, out), as in GPT-2's Conv1D."""
    experts: Callable[[np.ndarray, np.ndarray, np.ndarray], Tensors] | None = None
    """The tensors of a layer that hold all its experts' gates (experts, in, out), ups and downs."""


def state_dict(config: DecoderConfig, params: Any, names: Names) -> Tensors:
    """Every tensor of the model. KeyError if the tree has a part without a name."""
    table = params["embed"]["table"][: config.vocab_size]
    head = table if config.tie_embeddings else params["head"]["table"][: config.vocab_size]
    tensors = {f"{names.embed}.weight": table, "lm_head.weight": head}
    tensors |= _vectors(names.final_norm, params["final_norm"])
    if "head_bias" in params:
        tensors["lm_head.bias"] = params["head_bias"][: config.vocab_size]
    if names.embed_norm is not None:
        tensors |= _vectors(names.embed_norm, params["embed_norm"])
    if names.position is not None:
        unread = np.full((names.position_offset, config.embed_dim), 1e3, np.float32)
        tensors[f"{names.position}.weight"] = np.concatenate([unread, params["position"]["table"][: config.max_length]])
    for i, block in enumerate(_blocks(config, params)):
        prefix = names.layer.format(i)
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in _block_tensors(block, names).items()}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _vectors(name: str, part: Any) -> Tensors:
    return {f"{name}.{SUFFIX[kind]}": leaf for kind, leaf in part.items()}


def _blocks(config: DecoderConfig, params: Any) -> list[Any]:
    """The blocks from the first layer to the last, out of their segments, repeats and patterns."""
    blocks = []
    for index, segment in enumerate(config.segments):
        for repeat in range(segment.repeats):
            for j in range(len(segment.pattern)):
                block = params["segments"][index]["blocks"][j]
                blocks.append(jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], block))
    return blocks


def _block_tensors(block: Any, names: Names) -> Tensors:
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(block)}
    tensors: Tensors = {}
    if "moe" in block:
        assert names.experts is not None
        tensors |= names.experts(*(leaves.pop(("moe", part, "kernel")) for part in ("gate", "up", "down")))
    for part in sorted({path[:-1] for path in leaves}, key=lambda part: list(names.parts).index(".".join(part))):
        for kind in SUFFIX:
            if (*part, kind) in leaves:
                leaf = leaves.pop((*part, kind))
                rows = _rows(leaf, inputs=2 if part[-1] == "out" else 1) if kind in MATRICES else leaf
                found.setdefault((names.parts[".".join(part)], kind), []).append(rows)
    assert not leaves, leaves.keys()
    for (name, kind), parts in found.items():
        width = parts[0].shape[-1] if kind in MATRICES else 1
        if len(parts) == 3 and names.fused == "grouped":
            parts = [_grouped(*parts)]
        elif names.fused == "grouped" and len(parts) == 2 and parts[0].ndim == 3:  # keys and values of latent attention
            parts = [np.concatenate(parts, axis=1)]
        tensor = np.concatenate([part.reshape(-1, width) for part in parts])
        if kind not in MATRICES:
            tensor = tensor[:, 0]
        tensors[f"{name}.{SUFFIX[kind]}"] = tensor.T if names.input_first else tensor
    return tensors


def _rows(kernel: np.ndarray, inputs: int) -> np.ndarray:
    """(in ..., out ...) with the input dimensions flattened and last."""
    return np.moveaxis(kernel.reshape(-1, *kernel.shape[inputs:]), 0, -1)


def _grouped(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(heads, head_dim, ...) arrays as one of (key heads, queries of a key head + 2, head_dim, ...)."""
    query = query.reshape(key.shape[0], -1, *query.shape[1:])
    return np.concatenate([query, key[:, None], value[:, None]], axis=1)
