"""What a device's memory holds at each stage of a train step, in closed form: every array by name, without a compile.

Where an array lives is a fact of the model (what the backward pass needs), of JAX (what a scan stacks) or of XLA (what
it fuses, copies and when it frees); the last differ between compilers, and each has its reason beside it. The stage
with the most bytes is the peak.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jax.sharding import AbstractMesh, NamedSharding

from lmjax.models.config import BlockKind, DecoderConfig
from lmjax.ops.attention_chunked import BLOCK
from lmjax.plan.saved import LANES, Array, Kind, kept, saved_by_block, wide
from lmjax.plan.share import FLOAT32, Setup, Share
from lmjax.sharding import parameter_spec
from lmjax.train.state import declared_parameters

MOMENTS = 2
"""Of AdamW, as many arrays as parameters."""


class Stage(NamedTuple):
    """A time of the step."""

    name: str
    arrays: tuple[Array, ...]

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def bytes_by_kind(self) -> dict[Kind, int]:
        found: dict[Kind, int] = {}
        for array in self.arrays:
            found[array.kind] = found.get(array.kind, 0) + array.bytes
        return found


def stages(setup: Setup) -> tuple[Stage, ...]:
    """The times of a step at which its memory can be at its peak, and what lives then; arrays of no bytes are out."""
    share = Share(setup)
    lasting = tuple(_state(share))
    found = [Stage("loss", (*lasting, *_casts(share), *_saved(share), *_accumulated(share), *_loss(share)))]
    gradients = tuple(_gradients(share))
    for number, segment in enumerate(setup.model.segments):
        block = (*lasting, *_casts(share), *_saved(share), *_accumulated(share), *gradients)
        name = "backward pass of the blocks" + (f" of segment {number}" if len(setup.model.segments) > 1 else "")
        found += [Stage(name + at, (*block, *arrays)) for at, arrays in _blocks(share, segment.pattern).items()]
    found.append(Stage("gradient of the embedding", (*lasting, *gradients, *_accumulated(share), *_lookup(share))))
    found.append(Stage("update", (*lasting, *_updated(share, gradients))))
    return tuple(Stage(name, tuple(array for array in arrays if array.bytes)) for name, arrays in found)


def peak(stages: Iterable[Stage]) -> Stage:
    """The one that needs the most memory."""
    return max(stages, key=lambda stage: stage.bytes)


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
    down: int
    """Those of the matrices with which dense MLPs end."""
    heads: int
    """Those of the matrices that make queries, keys and values."""
    outside: int
    """Those outside of blocks: tables and the last norms."""


def _state(share: Share) -> Iterator[Array]:
    setup = share.setup
    parameters = parameter_numbers(setup)
    num = parameters.layers + parameters.outside
    yield Array("parameters", "parameters", num * FLOAT32)
    if not setup.moments_on_host:
        yield Array("moments", "moments of AdamW", moments_bytes(setup))
    # Tokens, targets, segments, positions and weights.
    yield Array("batch", "batch", 5 * 4 * share.tokens * setup.accumulation)


def moments_bytes(setup: Setup) -> int:
    """Of the moments of one device, wherever they are."""
    numbers = parameter_numbers(setup)
    return MOMENTS * (numbers.layers + numbers.outside) * FLOAT32


def _updated(share: Share, gradients: tuple[Array, ...]) -> Iterator[Array]:
    """What an update adds to the state. Where there is room, TPUs fetch some of the moments long before."""
    setup = share.setup
    if setup.moments_on_host:
        yield Array("moments", "moments of AdamW, fetched from the host", moments_bytes(setup))
    if not setup.moments_on_host or setup.hardware.platform != "gpu":
        yield from gradients
    # On GPUs moments come as they are needed, and all wait for the end to go back, by when the gradients are gone.


def parameter_numbers(setup: Setup) -> ParameterNumbers:
    """Of one device."""
    return _numbers(setup.model, tuple(setup.sizes.items()))


HEADS = frozenset({"query", "key", "value", "query_up", "key_up", "value_up"})
"""What gives queries, keys and values, of the residual stream or of narrow vectors."""


@functools.lru_cache(maxsize=4096)
def _numbers(model: DecoderConfig, sizes: tuple[tuple[str, int], ...]) -> ParameterNumbers:
    counts = dict.fromkeys(ParameterNumbers._fields, 0)
    mesh = AbstractMesh(tuple(size for _, size in sizes), tuple(axis for axis, _ in sizes))
    for path, shape, axes in declared_parameters(model):
        sharding = NamedSharding(mesh, parameter_spec(axes, shape, mesh.shape))
        num = math.prod(sharding.shard_shape(shape))
        is_of_layers = path[0] == "segments"
        counts["layers" if is_of_layers else "outside"] += num
        if is_of_layers and path[-1] == "kernel":
            counts["matrices"] += num
            counts["experts"] += num if axes[0] == "experts" else 0
            counts["down"] += num if path[-3:-1] == ("mlp", "down") else 0
            counts["heads"] += num if path[-3] == "attention" and path[-2] in HEADS else 0
            gathered = [dim for dim, axis in enumerate(axes) if axis in ("embed", "latent_in", "expert_embed")]
            counts["transposed"] += num if gathered != [0] and axes[0] != "experts" else 0
    return ParameterNumbers(**counts)


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
        moved = numbers.transposed if share.fsdp > 1 else 0
        moved += numbers.experts if setup.sizes["fsdp"] > 1 else 0
        yield Array("weights", "matrices laid out for their all-gather", moved * FLOAT32)


def _saved(share: Share) -> Iterator[Array]:
    for kind, group in itertools.groupby(sorted(share.setup.model.blocks)):
        number = len(list(group))
        for array in saved_by_block(share, kind):
            yield Array("saved", f"{array.name} of {number} blocks", number * array.bytes)


def _accumulated(share: Share) -> Iterator[Array]:
    setup = share.setup
    if setup.accumulation == 1:
        return
    numbers = parameter_numbers(setup)
    yield Array("gradients", "sums over micro-batches", (numbers.layers + numbers.outside) * FLOAT32)
    table = share.table
    tables = 1 if setup.model.tie_embeddings else 2
    match setup.hardware.platform:
        case "tpu":
            # The zeros to which the embedding's gradient is added do not change from one micro-batch to the next.
            yield Array("tables", "zeros of the embedding's gradient", table * FLOAT32)
            yield Array("weights", "tables in the compute dtype", tables * table // share.fsdp * setup.compute_bytes)
        case "gpu":
            yield Array("weights", "tables laid out for their all-gather", tables * table // share.fsdp * FLOAT32)
        case "cpu":
            yield Array("tables", "zeros of the tables' gradients", 2 * table * FLOAT32)


def _gradients(share: Share, *, output: bool = True) -> Iterator[Array]:
    """When all but the embedding's are there."""
    setup = share.setup
    numbers = parameter_numbers(setup)
    yield Array("gradients", "gradients of the layers", numbers.layers * FLOAT32)
    if output:
        yield Array("gradients", "gradient of the output table", share.table // share.fsdp * FLOAT32)


def _loss(share: Share) -> Iterator[Array]:
    setup = share.setup
    table = share.table
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
    yield Array("tables", "gradient of the embedding on this device", share.table * FLOAT32)
    yield Array("activations", "gradient of the embeddings", share.whole // share.setup.compute_bytes * FLOAT32)


def _blocks(share: Share, pattern: tuple[BlockKind, ...]) -> dict[str, tuple[Array, ...]]:
    """Of the blocks of a pattern while one of them goes backward: what lives at each time that can be the peak."""
    platform, kinds = share.setup.hardware.platform, dict.fromkeys(pattern)
    if platform == "gpu":
        return {f", at {at}": tuple(_blocks_gpu(share, pattern, at)) for at in ("attention", "projections")}
    block = _block_tpu if platform == "tpu" else _block_cpu
    names = {kind: f", {kind.attention} attention and {kind.mlp} MLP" if len(kinds) > 1 else "" for kind in kinds}
    return {name: tuple(block(share, kind)) for kind, name in names.items()}


def _block_tpu(share: Share, kind: BlockKind) -> Iterator[Array]:
    """At the gradient of the hidden layer. What attention needs to go backward was computed for the MLP's input."""
    model, remat = share.setup.model, share.setup.remat
    # A ragged all-to-all gives rows in a layout of its own: those that come, and their gradients, are there in both.
    yield from _hidden_values(share, (kind,), 4, 3, 5 if share.is_ragged else 3)
    yield Array("activations", "residual stream, input and gradient", 4 * share.residual)
    if share.is_sequence_split:
        yield Array("activations", "input of the MLP and gradient, whole sequences", 2 * share.whole)
    yield Array("weights", "matrices of the MLP, gathered", 2 * share.feed_forward(kind).matrix)
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
        sizes = share.feed_forward(kind)
        yield Array("activations", "hidden layer and its gradient", number * sizes.hidden)
        yield Array("activations", "rows of the experts", rows * sizes.rows)


def _recomputed_attention_tpu(share: Share, kind: BlockKind) -> Iterator[Array]:
    model, saved, values = share.setup.model, kept(share.setup), share.attention
    kernel = share.setup.kernels[kind.attention].name
    wide_heads, wide_values = wide(model.head_width), wide(model.value_width)
    yield Array("attention", "attention's result", values.out)
    if "attention_out" in saved:
        return
    for name, factor in (("query", wide_heads), ("key", wide_heads), ("value", wide_values)):
        if name not in saved:
            yield Array("attention", name, round(getattr(values, name) * factor))
    yield from _narrow(share, 2)
    if kernel == "splash":
        yield Array("attention", "splash's result", round(values.out * wide_values))  # before padding is set to 0
        yield Array("attention", "statistics, once a lane", values.statistics * LANES)
        yield Array("attention", "segments, once a lane", share.tokens * 4 * LANES)
    else:
        yield Array("attention", "statistics", values.statistics)


def _narrow(share: Share, number: int) -> Iterator[Array]:
    """Of latent attention, the vectors that heads are made of, given how often they are there where none is saved: as
    they are projected, and after their norms."""
    saved = {"none": number, "dots": 1}.get(share.setup.remat.policy, 0)
    yield Array("attention", "narrow vectors", (number - saved) * share.attention.latent)


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
    values = share.attention
    heads = values.query + values.key + values.value
    if at == "attention":
        yield Array("attention", "queries, keys, values", heads * len(pattern))
        yield Array("attention", "attention's result and its gradient", 2 * values.out)
    yield Array("attention", "gradients of queries, keys, values", heads)
    for _ in pattern:
        yield from _narrow(share, 2)
    kernel, is_kept = share.setup.kernels[pattern[-1].attention].name, share.setup.remat.policy == "none"
    if kernel == "reference" and at == "attention":
        yield Array("attention", "scores", share.pairs * ((1 if is_kept else 2) * FLOAT32 + 2 * c))
    if kernel == "chunked" and at == "attention":
        yield Array("attention", "sums of these gradients in float32", heads // c * FLOAT32)
        pairs = share.rows * share.heads * BLOCK * BLOCK
        yield Array("attention", "scores of a pair of blocks", pairs * (2 * FLOAT32 + 3 * c))
    yield Array("weights", "matrices of attention, gathered", 2 * model.embed_dim * share.heads * model.head_width * c)


def _block_cpu(share: Share, kind: BlockKind) -> Iterator[Array]:
    """While attention goes backward. Products want both operands with what they sum over last: some are kept twice."""
    c, values = share.setup.compute_bytes, share.attention
    yield from _hidden_values(share, (kind,), 7 if c == FLOAT32 else 5, 6, 5)
    yield Array("activations", "residual stream, input and gradient", 5 * share.residual // c * FLOAT32)
    yield Array("activations", "whole sequences", 3 * share.whole)
    yield Array("attention", "sums of gradients", (values.query + values.key + values.value) // c * FLOAT32)
    yield Array("attention", "queries, keys, values", 2 * values.query + values.key + values.value + values.out)
    yield from _narrow(share, 3)
    yield Array("weights", "matrices of the MLP, gathered", 2 * share.feed_forward(kind).matrix)
    yield Array("tables", "zeros of the embedding's gradient", share.table * FLOAT32)
