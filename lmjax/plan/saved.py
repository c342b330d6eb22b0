"""What the backward pass finds of each block: the remat policy, as JAX carries it out.

What JAX stacks for the backward pass of a scan is a fact of its trace, which tests hold this against.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

from lmjax.models.config import BlockKind
from lmjax.models.remat import RematConfig
from lmjax.plan.share import FLOAT32, Setup, Share

Kind = Literal[
    "parameters", "moments", "batch", "gradients", "saved", "activations", "attention", "logits", "weights", "tables"
]
"""``weights`` are copies of parameters: cast, gathered or laid out anew; ``tables`` those of the vocabulary, and their
gradients before they are summed over devices."""

LANES = 128
"""Numbers in the last dimension of a tile of a TPU's memory: fewer are filled up."""


class Array(NamedTuple):
    """An array of one device, or several that live and die together."""

    kind: Kind
    name: str
    bytes: int


def saved_by_block(share: Share, kind: BlockKind) -> Iterator[Array]:
    """What the backward pass of one block finds in the device's memory."""
    remat = share.setup.remat
    model = share.setup.model
    if remat.policy == "none":
        yield from _everything(share, kind)
        return
    yield Array("saved", "block_input", share.residual)
    values = share.attention
    if "attention_out" in kept(share.setup):
        factor = wide(model.value_width) if share.setup.hardware.platform == "tpu" else 1  # as the kernel gives it
        yield Array("saved", "attention_out", round(values.out * factor) + values.statistics)
    names = {"query": values.query, "key": values.key, "value": values.value}
    sizes = share.feed_forward(kind)
    if model.mlp_gated:
        names["mlp_gate"] = sizes.hidden
    names |= {"mlp_up": sizes.hidden, "mlp_hidden": sizes.hidden}
    if remat.policy == "dots":
        del names["mlp_hidden"]
        names["narrow vectors"] = values.latent + values.latent_key
        names["key"] -= values.latent_key * share.heads  # as projected, without what all heads have alike
        # Of results that are only added to something, no gradient needs the value.
        is_read = model.residual == "sequential" or model.norm_placement != "pre"
        names["attention's output"] = share.residual if is_read else 0
        names["the MLP's output"] = share.residual if model.norm_placement != "pre" else 0
        names["the experts' output"] = sizes.rows  # for the gradient of a token's weights
    widths = {"query": model.head_width, "key": model.head_width, "value": model.value_width}
    for name, num_bytes in names.items():
        if name in kept(share.setup) or remat.policy == "dots":
            factor = wide(widths[name]) if name in widths and share.setup.hardware.platform == "tpu" else 1
            yield Array("saved", name, round(num_bytes * factor))


def kept(setup: Setup) -> frozenset[str]:
    """The tagged values that the backward pass finds on the device, where the policy goes by tags."""
    remat = setup.remat
    match remat.policy:
        case "attention":
            return frozenset({"attention_out"})
        case "dots":
            return frozenset({"mlp_gate", "mlp_up"})
        case "save":
            return frozenset(remat.save)
    return frozenset()


def offloaded_bytes(setup: Setup) -> int:
    """Of one device, what waits for the backward pass of a micro-batch in the memory of its host."""
    names = setup.remat.offload
    if not names:
        return 0
    here = Share(dataclasses.replace(setup, remat=RematConfig(policy="save", save=names)))
    return sum(
        array.bytes for kind in setup.model.blocks for array in saved_by_block(here, kind) if array.name in names
    )


INSIDE = {"silu": 4, "gelu": 4, "gelu_tanh": 5, "relu": 1}
"""Arrays as large as the hidden layer that JAX keeps of an activation and its result, if nothing is computed again."""


def _everything(share: Share, kind: BlockKind) -> Iterator[Array]:
    """What JAX keeps of a block where nothing is computed again: besides what is tagged, norms in float32."""
    model, values, c = share.setup.model, share.attention, share.setup.compute_bytes
    # Of each norm, its input in float32 and that input divided by its deviation; the block's input is not kept besides.
    norms = 1 if model.residual == "parallel_shared_norm" else 4 if model.norm_placement == "sandwich" else 2
    yield Array("saved", "inside of norms", 2 * norms * share.residual // c * FLOAT32)
    kernel = share.setup.kernels[kind.attention].name
    masked = values.out if kernel in ("splash", "chunked") else 0
    saved = values.query + values.key + values.value + values.out + masked + values.statistics
    yield Array("saved", "attention", saved)
    yield Array("saved", "narrow vectors and inside of their norms", values.latent + 2 * values.latent // c * FLOAT32)
    if kernel == "reference":  # their exponentials, the weights, and how steep the cap was
        in_float32 = 1 if model.attention_softcap is None else 2
        yield Array("saved", "scores of attention", share.pairs * (in_float32 * FLOAT32 + c))
    gated, sizes = model.mlp_gated, share.feed_forward(kind)
    signs = sizes.hidden // c if model.activation == "relu" else 0
    yield Array("saved", "inside of the MLP", (INSIDE[model.activation] + 2 * gated) * sizes.hidden + signs)
    if kind.mlp == "dense":
        yield Array("saved", "inputs of attention and MLP", 2 * share.whole)
        return
    # The router's input is float32; rows are kept for both projections of them and for their weights, and matrices as
    # they were gathered.
    yield Array("saved", "inputs of attention and router", share.whole + share.whole // c * FLOAT32)
    yield Array("saved", "rows of the experts", (3 if gated else 2) * sizes.rows)
    yield Array("saved", "matrices of the experts, gathered", (3 if gated else 2) * sizes.matrix)


def wide(head_dim: int) -> float:
    """By how much a kernel's array is larger than its numbers: it has a head's dimensions last, and tiles of a TPU's
    memory hold a multiple of 128 numbers."""
    return -(-head_dim // LANES) * LANES / head_dim
