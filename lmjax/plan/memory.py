"""What a device's memory holds at each stage of a train step, in closed form: every array by name, without a compile.

Where an array lives is a fact of the model (what the backward pass needs), of JAX (what a scan stacks) or of XLA (what
it fuses, copies and when it frees); the last differ between compilers, and each has its reason beside it. The stage
with the most bytes is the peak.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from lmjax.models.config import BlockKind, DecoderConfig
from lmjax.plan.share import Setup, Share
from lmjax.sharding import parameter_spec
from lmjax.train.state import declared_parameters

Kind = Literal[
    "parameters", "moments", "batch", "gradients", "saved", "activations", "attention", "logits", "weights", "tables"
]
"""``weights`` are copies of parameters: cast, gathered or laid out anew; ``tables`` those of the vocabulary, and their
gradients before they are summed over devices."""

MOMENTS = 2
"""Of AdamW, as many arrays as parameters."""
FLOAT32 = 4
CHUNK = 512
LANES = 128
"""Numbers in the last dimension of a tile of a TPU's memory: fewer are filled up."""


class Array(NamedTuple):
    """An array of one device, or several that live and die together."""

    kind: Kind
    name: str
    bytes: int


class Stage(NamedTuple):
    """A time of the step."""

    name: str
    arrays: tuple[Array, ...]

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)


def stages(setup: Setup) -> tuple[Stage, ...]:
    """The times of a step at which its memory can be at its peak, and what lives then; arrays of no bytes are out."""
    share = Share(setup)
    lasting = tuple(_state(share))
    found = [Stage("loss", (*lasting, *_casts(share), *_saved(share), *_accumulated(share), *_loss(share)))]
    gradients = tuple(_gradients(share))
    for number, segment in enumerate(setup.model.segments):
        block = (*lasting, *_casts(share), *_saved(share), *_accumulated(share), *gradients)
        name = "backward pass of the blocks" + (f" of segment {number}" if len(setup.model.segments) > 1 else "")
        found += [Stage(name, (*block, *arrays)) for arrays in _blocks(share, segment.pattern)]
    found.append(Stage("gradient of the embedding", (*lasting, *gradients, *_accumulated(share), *_lookup(share))))
    found.append(Stage("update", (*lasting, *gradients)))
    return tuple(Stage(name, tuple(array for array in arrays if array.bytes)) for name, arrays in found)


def peak(setup: Setup) -> Stage:
    """The stage that needs the most memory."""
    return max(stages(setup), key=lambda stage: stage.bytes)


class ParameterNumbers(NamedTuple):
    """Numbers of a device."""

    layers: int
    """Those of all blocks."""
    matrices: int
    """Those of them that are cast to the compute dtype and gathered."""
    experts: int
    """Those of matrices of experts."""
    transposed: int
    """Those of other matrices whose first dimension is not the one that is gathered."""
    outside: int
    """Those outside of blocks: tables and the last norms."""


def _state(share: Share) -> Iterator[Array]:
    setup = share.setup
    parameters = parameter_numbers(setup)
    num = parameters.layers + parameters.outside
    yield Array("parameters", "parameters", num * FLOAT32)
    yield Array("moments", "moments of AdamW", MOMENTS * num * FLOAT32)
    # Tokens, targets, segments, positions and weights.
    yield Array("batch", "batch", 5 * 4 * share.tokens * setup.accumulation)


def parameter_numbers(setup: Setup) -> ParameterNumbers:
    """Of one device."""
    return _numbers(setup.model, tuple(setup.sizes.items()))


@functools.lru_cache(maxsize=4096)
def _numbers(model: DecoderConfig, sizes: tuple[tuple[str, int], ...]) -> ParameterNumbers:
    counts = dict.fromkeys(ParameterNumbers._fields, 0)
    for path, shape, axes in declared_parameters(model):
        entries = tuple(parameter_spec(axes, shape, dict(sizes)))
        parts = math.prod(dict(sizes)[name] for entry in entries if entry for name in _names(entry))
        num = math.prod(shape) // parts
        is_of_layers = path[0] == "segments"
        counts["layers" if is_of_layers else "outside"] += num
        if is_of_layers and path[-1] == "kernel":
            counts["matrices"] += num
            counts["experts"] += num if axes[0] == "experts" else 0
            gathered = [dim for dim, axis in enumerate(axes) if axis in ("embed", "latent_in", "expert_embed")]
            counts["transposed"] += num if gathered != [0] and axes[0] != "experts" else 0
    return ParameterNumbers(**counts)


def _names(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry


def _casts(share: Share) -> Iterator[Array]:
    setup = share.setup
    numbers = parameter_numbers(setup)
    platform = setup.hardware.platform
    if platform == "tpu" and setup.compute_bytes != FLOAT32:
        # A cast of every layer's matrices does not change in the loop over layers: it is moved out of it, forward and
        # backward, and done once.
        yield Array("weights", "matrices of all layers in the compute dtype", numbers.matrices * setup.compute_bytes)
    if platform == "gpu":
        # An all-gather wants the dimension that it joins to be the outermost one. Parameters that have it elsewhere are
        # laid out anew, before the loop over layers and all at once. Of experts the outermost is their number.
        moved = numbers.transposed if setup.sizes["fsdp"] * setup.sizes["expert"] > 1 else 0
        moved += numbers.experts if setup.sizes["fsdp"] > 1 else 0
        yield Array("weights", "matrices laid out for their all-gather", moved * FLOAT32)


def _saved(share: Share) -> Iterator[Array]:
    for kind, group in itertools.groupby(sorted(share.setup.model.blocks)):
        number = len(list(group))
        for array in saved_by_block(share, kind):
            yield Array("saved", f"{array.name} of {number} blocks", number * array.bytes)


def saved_by_block(share: Share, kind: BlockKind) -> Iterator[Array]:
    """What the backward pass of one block finds in the device's memory."""
    remat = share.setup.remat
    model = share.setup.model
    if remat.policy == "none":
        yield from _everything(share, kind)
        return
    yield Array("saved", "block_input", share.residual)
    values = _attention_values(share)
    if "attention_out" in kept(share.setup):
        wide = _wide(model.value_width) if share.setup.hardware.platform == "tpu" else 1  # saved as the kernel gives it
        yield Array("saved", "attention_out", round(values.out * wide) + values.statistics)
    names = {"query": values.query, "key": values.key, "value": values.value}
    sizes = _hidden(share, kind)
    if model.mlp_gated:
        names["mlp_gate"] = sizes.hidden
    names |= {"mlp_up": sizes.hidden, "mlp_hidden": sizes.hidden}
    if remat.policy == "dots":
        del names["mlp_hidden"]
        # Of results that are only added to something, no gradient needs the value.
        is_read = model.residual == "sequential" or model.norm_placement != "pre"
        names["attention's output"] = share.residual if is_read else 0
        names["the MLP's output"] = share.residual if model.norm_placement != "pre" else 0
        names["the experts' output"] = sizes.rows  # for the gradient of a token's weights
    for name, num_bytes in names.items():
        if name in kept(share.setup) or remat.policy == "dots":
            yield Array("saved", name, num_bytes)


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


def _everything(share: Share, kind: BlockKind) -> Iterator[Array]:
    """What JAX keeps of a block where nothing is computed again: besides what is tagged, norms in float32."""
    values, c = _attention_values(share), share.setup.compute_bytes
    # Of each norm, its input in float32 and that input divided by its deviation; the block's input is not kept besides.
    yield Array("saved", "inside of norms", 4 * share.residual // c * FLOAT32)
    yield Array("saved", "inputs of attention and MLP", 2 * share.whole)
    masked = values.out if share.setup.kernels[kind.attention] in ("splash", "chunked", "reference") else 0
    saved = values.query + values.key + values.value + values.out + masked + values.statistics
    yield Array("saved", "attention", saved)
    number = 6 if share.setup.model.mlp_gated else 4
    yield Array("saved", "inside of the MLP", number * _hidden(share, kind).hidden)


class _AttentionValues(NamedTuple):
    """Bytes."""

    query: int
    key: int
    value: int
    out: int
    statistics: int
    """The logarithm of the normaliser of every query and head, float32."""


def _attention_values(share: Share) -> _AttentionValues:
    model, c = share.setup.model, share.setup.compute_bytes
    heads, kv_heads = share.heads * share.tokens, share.kv_heads * share.tokens
    return _AttentionValues(
        query=heads * model.head_width * c,
        key=kv_heads * model.head_width * c,
        value=kv_heads * model.value_width * c,
        out=heads * model.value_width * c,
        statistics=heads * FLOAT32,
    )


def _accumulated(share: Share) -> Iterator[Array]:
    setup = share.setup
    if setup.accumulation == 1:
        return
    numbers = parameter_numbers(setup)
    yield Array("gradients", "sums over micro-batches", (numbers.layers + numbers.outside) * FLOAT32)
    table = share.vocab * setup.model.embed_dim
    fsdp = setup.sizes["fsdp"] * setup.sizes["expert"]
    tables = 1 if setup.model.tie_embeddings else 2
    match setup.hardware.platform:
        case "tpu":
            # The zeros to which the embedding's gradient is added do not change from one micro-batch to the next.
            yield Array("tables", "zeros of the embedding's gradient", table * FLOAT32)
            yield Array("weights", "tables in the compute dtype", tables * table // fsdp * setup.compute_bytes)
        case "gpu":
            yield Array("weights", "tables laid out for their all-gather", tables * table // fsdp * FLOAT32)
        case "cpu":
            yield Array("tables", "zeros of the tables' gradients", 2 * table * FLOAT32)


def _gradients(share: Share, *, output: bool = True) -> Iterator[Array]:
    """When all but the embedding's are there."""
    setup = share.setup
    numbers = parameter_numbers(setup)
    fsdp = setup.sizes["fsdp"] * setup.sizes["expert"]
    yield Array("gradients", "gradients of the layers", numbers.layers * FLOAT32)
    if output:
        yield Array("gradients", "gradient of the output table", share.vocab * setup.model.embed_dim // fsdp * FLOAT32)


def _loss(share: Share) -> Iterator[Array]:
    setup = share.setup
    table = share.vocab * setup.model.embed_dim
    shards = share.tensor if share.is_sequence_split else 1
    tokens = share.tokens // shards
    chunks = -(-tokens * shards // setup.loss_chunk_tokens)
    chunk = -(-tokens // chunks) * shards
    yield Array("tables", "output table, gathered", table * setup.compute_bytes)
    yield Array("tables", "gradient of the output table on this device", table * FLOAT32)
    yield Array("logits", "logits of a chunk", chunk * share.vocab * FLOAT32)
    if setup.hardware.platform == "cpu":
        # Zeros are made as soon as memory is not scarce, and a sum is not made in place of what it is added to.
        yield from _gradients(share, output=False)
        yield Array("tables", "zeros of the embedding's gradient", table * FLOAT32)
        yield Array("tables", "gradient of a chunk", table * FLOAT32 if chunks > 1 else 0)
    else:
        yield Array("logits", "gradient of these logits", chunk * share.vocab * setup.compute_bytes)
    yield Array("activations", "last hidden states and their gradient", 2 * share.residual)


def _lookup(share: Share) -> Iterator[Array]:
    table = share.vocab * share.setup.model.embed_dim
    yield Array("tables", "gradient of the embedding on this device", table * FLOAT32)
    yield Array("activations", "gradient of the embeddings", share.whole // share.setup.compute_bytes * FLOAT32)


def _blocks(share: Share, pattern: tuple[BlockKind, ...]) -> tuple[tuple[Array, ...], ...]:
    """Of the blocks of a pattern while one of them goes backward: what lives at each time that can be the peak."""
    match share.setup.hardware.platform:
        case "tpu":
            return tuple(tuple(_block_tpu(share, kind)) for kind in dict.fromkeys(pattern))
        case "gpu":
            return tuple(tuple(_blocks_gpu(share, pattern, at)) for at in ("attention", "projections"))
    return tuple(tuple(_block_cpu(share, kind)) for kind in dict.fromkeys(pattern))


class _Hidden(NamedTuple):
    """Bytes of arrays of the feed-forward half."""

    hidden: int
    """Of the hidden layer of the MLP, or of the experts on this device."""
    rows: int
    """Of the experts' input or output; 0 without experts."""
    matrix: int
    """Of a gathered matrix."""


def _hidden(share: Share, kind: BlockKind) -> _Hidden:
    model, c = share.setup.model, share.setup.compute_bytes
    if kind.mlp == "dense":
        return _Hidden(share.hidden, 0, model.embed_dim * model.mlp_dim // share.tensor * c)
    assert model.moe is not None
    width = model.expert_dim // share.tensor
    experts = model.moe.num_experts // share.setup.sizes["expert"]
    shared = share.tokens * (model.moe.shared_dim or 0) // share.tensor * c
    rows = share.expert_rows
    return _Hidden(rows * width * c + shared, rows * model.embed_dim * c, experts * model.embed_dim * width * c)


def _block_tpu(share: Share, kind: BlockKind) -> Iterator[Array]:
    """At the gradient of the hidden layer. What attention needs to go backward was computed for the MLP's input."""
    model, remat = share.setup.model, share.setup.remat
    yield from _hidden_values(share, (kind,), 4, 3, 3)
    yield Array("activations", "residual stream, input and gradient", 4 * share.residual)
    if share.is_sequence_split:
        yield Array("activations", "input of the MLP and gradient, whole sequences", 2 * share.whole)
    yield Array("weights", "matrices of the MLP, gathered", 2 * _hidden(share, kind).matrix)
    if remat.policy != "none":
        yield from _recomputed_attention_tpu(share, kind)
    if model.position == "rope":
        yield Array("activations", "cosines and sines", 2 * share.tokens * model.rope_width // 2 * FLOAT32)


def _hidden_values(
    share: Share, pattern: tuple[BlockKind, ...], dense: int, experts: int, rows: int
) -> Iterator[Array]:
    """Arrays as large as hidden layers, given how many there are where nothing of them is saved."""
    saved = sum(name in kept(share.setup) for name in ("mlp_gate", "mlp_up", "mlp_hidden"))
    for kind in pattern:
        number = dense if kind.mlp == "dense" else experts
        number = 2 if share.setup.remat.policy == "none" else number - saved
        sizes = _hidden(share, kind)
        yield Array("activations", "hidden layer and its gradient", number * sizes.hidden)
        yield Array("activations", "rows of the experts", rows * sizes.rows)


def _wide(head_dim: int) -> float:
    """By how much a kernel's array is larger than its numbers: it has a head's dimensions last, and tiles of a TPU's
    memory hold a multiple of 128 numbers."""
    return -(-head_dim // LANES) * LANES / head_dim


def _recomputed_attention_tpu(share: Share, kind: BlockKind) -> Iterator[Array]:
    model, saved, values = share.setup.model, kept(share.setup), _attention_values(share)
    kernel = share.setup.kernels[kind.attention]
    wide, wide_values = _wide(model.head_width), _wide(model.value_width)
    yield Array("attention", "attention's result", values.out)
    if "attention_out" in saved:
        return
    for name, factor in (("query", wide), ("key", wide), ("value", wide_values)):
        if name not in saved:
            yield Array("attention", name, round(getattr(values, name) * factor))
    if kernel == "splash":
        yield Array("attention", "splash's result", round(values.out * wide_values))  # before padding is set to 0
        yield Array("attention", "statistics, once a lane", values.statistics * LANES)
        yield Array("attention", "segments, once a lane", share.tokens * 4 * LANES)
    else:
        yield Array("attention", "statistics", values.statistics)


def _blocks_gpu(share: Share, pattern: tuple[BlockKind, ...], at: str) -> Iterator[Array]:
    """While attention goes backward, or the projections before it. Gradients of matrices wait for the end of the loop's
    body, with what they are made of."""
    model, c = share.setup.model, share.setup.compute_bytes
    yield from _hidden_values(share, pattern, 4, 6, 0)
    residual, whole = (4, 4) if at == "attention" else (3, 7)
    if not share.is_sequence_split:
        residual, whole = 4, 0
    yield Array("activations", "residual stream, input and gradient", (residual * len(pattern)) * share.residual)
    yield Array("activations", "whole sequences", whole * share.whole)
    if model.norm_placement == "sandwich":
        yield Array("activations", "inside of norms", 3 * len(pattern) * share.residual // c * FLOAT32)
    values = _attention_values(share)
    heads = values.query + values.key + values.value
    if at == "attention":
        yield Array("attention", "queries, keys, values", heads * len(pattern))
        yield Array("attention", "attention's result and its gradient", 2 * values.out)
    yield Array("attention", "gradients of queries, keys, values", heads)
    if share.setup.kernels[pattern[-1].attention] == "chunked" and at == "attention":
        yield Array("attention", "sums of these gradients in float32", heads // c * FLOAT32)
        pairs = share.rows * share.heads * CHUNK * CHUNK
        yield Array("attention", "scores of a pair of blocks", pairs * (2 * FLOAT32 + 3 * c))
    yield Array("weights", "matrices of attention, gathered", 2 * model.embed_dim * share.heads * model.head_width * c)


def _block_cpu(share: Share, kind: BlockKind) -> Iterator[Array]:
    """While attention goes backward. Products want both operands with what they sum over last: some are kept twice."""
    model, c = share.setup.model, share.setup.compute_bytes
    values = _attention_values(share)
    yield from _hidden_values(share, (kind,), 7 if c == FLOAT32 else 5, 6, 5)
    yield Array("activations", "residual stream, input and gradient", 5 * share.residual // c * FLOAT32)
    yield Array("activations", "whole sequences", 3 * share.whole)
    yield Array("attention", "sums of gradients", (values.query + values.key + values.value) // c * FLOAT32)
    yield Array("attention", "queries, keys, values", 2 * values.query + values.key + values.value + values.out)
    yield Array("weights", "matrices of the MLP, gathered", 2 * _hidden(share, kind).matrix)
    yield Array("tables", "zeros of the embedding's gradient", share.vocab * model.embed_dim * FLOAT32)
