"""What training makes of what the routers did: a part of the loss, moved biases of choices, rows of metrics."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmjax.models.config import BlockKind, DecoderConfig
from lmjax.nn.moe import MoEConfig, moved_bias
from lmjax.ops.routing import RouterSums


def router_loss(moe: MoEConfig, router: RouterSums, num_tokens: Any) -> Any:
    """The routers' part of the loss: their sums over some of a batch's ``num_tokens`` tokens, weighted."""
    return (moe.balance_weight * jnp.sum(router.balance) + moe.z_weight * jnp.sum(router.z)) / num_tokens


def zero_sums(moe: MoEConfig, blocks: Sequence[BlockKind]) -> RouterSums:
    """What the routers of no tokens did."""
    num_layers = sum(kind.mlp == "moe" for kind in blocks)
    zeros = RouterSums._make(jnp.zeros(num_layers, jnp.float32) for _ in RouterSums._fields)
    return zeros._replace(load=jnp.zeros((num_layers, moe.num_experts), jnp.float32))


def with_moved_biases(params: Any, config: DecoderConfig, router: RouterSums, rate: float) -> Any:
    """The parameters with the biases of the routers' choices moved by the loads of the global batch.

    The optimizer leaves them as they are: they have no gradient and no decay.
    """
    first, segments = 0, dict(params["segments"])
    for number, segment in enumerate(config.segments):
        blocks = dict(params["segments"][number]["blocks"])
        places = [place for place, kind in enumerate(segment.pattern) if kind.mlp == "moe"]
        if not places:
            continue
        loads = router.load[first : first + segment.repeats * len(places)].reshape(segment.repeats, len(places), -1)
        first += segment.repeats * len(places)
        for i, place in enumerate(places):
            moe = blocks[place]["moe"]
            bias = moved_bias(moe["router"]["choice_bias"], loads[:, i], rate)
            blocks[place] = blocks[place] | {"moe": moe | {"router": moe["router"] | {"choice_bias": bias}}}
        segments[number] = segments[number] | {"blocks": blocks}
    return params | {"segments": segments}


def router_row(router: RouterSums, blocks: Sequence[BlockKind], choices: int) -> dict[str, Any]:
    """What a row of metrics.jsonl says of the routers, by the number of each block with experts.

    ``router`` is on the host, of the whole global batch, of whose tokens each had so many ``choices``.
    """
    sums = RouterSums._make(np.asarray(sums, np.float64) for sums in router)
    num_tokens = max(sums.load[0].sum() / choices, 1)
    numbers = [number for number, kind in enumerate(blocks) if kind.mlp == "moe"]
    told = {
        "load": sums.load / (num_tokens * choices),
        "dropped": sums.dropped / (num_tokens * choices),
        "entropy": sums.entropy / num_tokens,
        "balance": sums.balance / num_tokens,
        "z": sums.z / num_tokens,
        "not_finite": sums.not_finite,
    }
    return {
        str(number): {name: np.round(values[i], 6).tolist() for name, values in told.items()}
        for i, number in enumerate(numbers)
    }
