"""Layers of experts of Switch Transformers (transformers' SwitchTransformersSparseMLP), read and written one by one.

These models are encoder-decoders, which no decoder here is, so that `lmjax convert` refuses them as a whole. A layer of
experts is what it is here: ``model.moe`` with one choice of weight as scored, ``gated: false``, and slots of experts
counted in each sequence. Legend: D embed, E experts, F width of an expert.
"""

import re
from collections.abc import Mapping

import numpy as np

from lmjax.convert.tensors import TensorFiles
from lmjax.errors import InputError

ROUTER, UP, DOWN = "router/matrix", "up/kernel", "down/kernel"
"""The parameters of ``nn.moe.MoE``: (D, E), (E, D, F) and (E, F, D)."""


def read_switch_layer(files: TensorFiles, name: str) -> dict[str, np.ndarray]:
    """The layer ``name``, such as ``decoder.block.1.layer.2.mlp``, as float32 parameters by their path in ``MoE``.

    Raises InputError where the files have no layer of experts of that name, or some of its experts only.
    """
    router = f"{name}.router.classifier.weight"
    if router not in files.infos:
        pattern = re.compile(r"(.+)\.router\.classifier\.weight")
        there = [match[1] for match in map(pattern.fullmatch, files.infos) if match]
        raise InputError(f"{name}: no layer of experts of Switch; these files have {', '.join(there) or 'none'}")
    if (bias := f"{name}.router.classifier.bias") in files.infos:
        raise InputError(f"{bias}: routers here have no bias; only layers without one are read")
    num_experts = files.infos[router].shape[0]
    tensors = _names(name, num_experts)
    missing = [tensor for pair in tensors for tensor in pair if tensor not in files.infos]
    if missing:
        raise InputError(f"{missing[0]}: missing, and the router chooses among {num_experts} experts; fetch all files")
    return {
        ROUTER: np.asarray(files.read(router), np.float32).T,
        UP: np.stack([np.asarray(files.read(up), np.float32).T for up, _ in tensors]),
        DOWN: np.stack([np.asarray(files.read(down), np.float32).T for _, down in tensors]),
    }


def switch_layer_tensors(params: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The other way: the tensors of the layer, by their names in transformers."""
    found = {f"{name}.router.classifier.weight": params[ROUTER].T}
    for expert, (up, down) in enumerate(_names(name, len(params[UP]))):
        found |= {up: params[UP][expert].T, down: params[DOWN][expert].T}
    return {tensor: np.ascontiguousarray(values) for tensor, values in found.items()}


def _names(name: str, num_experts: int) -> list[tuple[str, str]]:
    """Of each expert's first and second matrix."""
    experts = [f"{name}.experts.expert_{expert}" for expert in range(num_experts)]
    return [(f"{expert}.wi.weight", f"{expert}.wo.weight") for expert in experts]
