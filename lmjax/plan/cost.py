"""What a train step has to compute, to move and to send, in closed form, and the time of that at the hardware's peak.

Not a forecast: kernels stay below the peak and sends wait, which is not here; and where a compiler finds a way to move
or to send less than is counted, that part takes less.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from lmjax.hardware import peak_flops
from lmjax.mesh import AXES, FSDP_AXES, MeshConfig, crossing
from lmjax.models.config import BlockKind
from lmjax.models.counts import attention_flops, block_products, training_flops
from lmjax.plan.memory import MOMENTS, moments_bytes, parameter_numbers
from lmjax.plan.saved import kept, offloaded_bytes
from lmjax.plan.share import FLOAT32, Setup, Share
from lmjax.plan.topology import Topology

LINKS = {"tpu": ("ICI", "DCN"), "gpu": ("NVLink", "network"), "cpu": ("memory", "memory")}
"""What connects the devices of a slice or host, and these with each other."""

HOST_AXIS, HOST_LINK = "host", "PCIe"
"""What a device receives from the memory of its host is along no axis of the mesh."""


class Traffic(NamedTuple):
    """What a device receives in a step, from others along an axis of the mesh, or from its host."""

    axis: str
    """One of AXES, or HOST_AXIS."""
    what: str
    link: str
    """One of LINKS, or HOST_LINK."""
    bytes: int


class Cost(NamedTuple):
    """Of one step."""

    model_flops: int
    """Of all devices, without what is computed again (``training_flops``)."""
    flops: int
    """Of one device, with it."""
    memory_bytes: int
    """That a device reads and writes of its memory."""
    traffic: tuple[Traffic, ...]


class Bound(NamedTuple):
    """Seconds that each part of a step takes at the hardware's peak."""

    compute: float
    memory: float
    links: float
    """Inside of a slice or host."""
    network: float
    """Between them."""
    host: float
    """Of what is fetched from the host's memory. As long again it takes to bring it there, which may be meanwhile."""
    waited_for: float
    """What of links and network goes along ``tensor`` and ``expert``: the next product needs it."""

    @property
    def seconds(self) -> float:
        """Of a step with everything at once."""
        return max(self.compute, self.memory, self.links, self.network, self.host)

    @property
    def predicted(self) -> float:
        """The same where a device computes, moves or waits for what it needs next, one after the other, and only what
        goes along the other axes hides behind that. By it ways to carry out a step are compared."""
        return max(self.compute + self.memory + self.waited_for + 2 * self.host, self.links, self.network)


def cost(setup: Setup, mesh: MeshConfig, topology: Topology) -> Cost:
    """Of a step of ``setup`` on the devices of ``topology``, laid out as ``mesh`` says."""
    rows = setup.rows * setup.accumulation
    model_flops = training_flops(setup.model, rows, setup.length)
    again = sum(_computed_again(setup, kind) for kind in setup.model.blocks) * rows
    share = Share(setup)
    return Cost(
        model_flops=model_flops,
        flops=(model_flops + again) // setup.num_devices,
        memory_bytes=_memory_bytes(share),
        traffic=tuple(found for found in _traffic(share, mesh, topology) if found.bytes),
    )


class Rates(NamedTuple):
    """What one device does in a second."""

    flops: float
    memory: float
    """Bytes, as for the others."""
    links: float
    network: float
    host: float


def rates(topology: Topology) -> Rates | None:
    """At the hardware's peak; None for CPUs, whose peak is not known."""
    machine = topology.machine
    if machine is None:
        return None
    peak = peak_flops(machine.device_kind)
    assert peak is not None
    return Rates(
        flops=peak,
        memory=machine.memory_bandwidth,
        links=machine.link_bandwidth,
        network=machine.network_bandwidth,
        host=machine.host_bandwidth,
    )


def bound(cost: Cost, topology: Topology) -> Bound | None:
    """At the hardware's peak; None for CPUs."""
    found = rates(topology)
    return None if found is None else bound_at(cost, found)


def bound_at(cost: Cost, rates: Rates) -> Bound:
    near = {links[0] for links in LINKS.values()}
    links = [found for found in cost.traffic if found.link in near]
    host = [found for found in cost.traffic if found.link == HOST_LINK]
    network = [found for found in cost.traffic if found.link not in (*near, HOST_LINK)]

    def seconds(traffic: list[Traffic], rate: float, axes: tuple[str, ...] = (*AXES, HOST_AXIS)) -> float:
        return sum(found.bytes for found in traffic if found.axis in axes) / rate

    inner = ("tensor", "expert")
    return Bound(
        compute=cost.flops / rates.flops,
        memory=cost.memory_bytes / rates.memory,
        links=seconds(links, rates.links),
        network=seconds(network, rates.network),
        host=seconds(host, rates.host),
        waited_for=seconds(links, rates.links, inner) + seconds(network, rates.network, inner),
    )


def _computed_again(setup: Setup, kind: BlockKind) -> int:
    """Operations of a row in a block that the backward pass does a second time.

    The last product of a block is not among them, nor that of attention where the MLP does not read its result: no
    gradient in the block needs them.
    """
    policy, saved, model = setup.remat.policy, kept(setup) | set(setup.remat.offload), setup.model
    if policy == "none":
        return 0
    again = 0 if "attention_out" in saved else attention_flops(model, kind, setup.length)
    if policy == "dots":
        return again
    products = block_products(model, kind)
    matrices = products.router
    if not {"query", "key", "value"} <= saved:
        matrices += products.inputs
    if "projection" not in saved and model.residual == "sequential":
        matrices += products.output
    hidden = {"mlp_up", "mlp_gate"} if model.mlp_gated else {"mlp_up"}
    matrices += products.hidden * len(hidden - saved) // len(hidden)
    return again + 2 * setup.length * matrices


def _memory_bytes(share: Share) -> int:
    """Parameters, moments and gradients are read and written once, moments that come from the host and go there twice;
    matrices in the compute dtype are written when they
    are gathered and read by each product, and what a block works on is written once and read twice."""
    setup = share.setup
    numbers = parameter_numbers(setup)
    total = numbers.layers + numbers.outside
    update = (2 + 2 * MOMENTS * (2 if setup.moments_on_host else 1) + 2) * total * FLOAT32
    gathered = numbers.matrices * setup.sizes["fsdp"] * setup.compute_bytes
    passes = 2 if setup.remat.policy == "none" else 3
    matrices = 2 * passes * gathered * setup.accumulation
    model, values = setup.model, 0
    heads = share.attention.query + share.attention.key + share.attention.value + share.attention.out
    for kind in model.blocks:
        hidden = (3 if model.mlp_gated else 2) * share.feed_forward(kind).hidden
        values += 4 * share.whole + hidden + heads
    logits = share.tokens * share.vocab * FLOAT32
    return update + matrices + 3 * (passes * values + 2 * logits) * setup.accumulation


def _traffic(share: Share, mesh: MeshConfig, topology: Topology) -> Iterator[Traffic]:
    setup, c = share.setup, share.setup.compute_bytes
    numbers, A = parameter_numbers(setup), setup.accumulation
    passes = 1 if setup.remat.policy == "none" else 2
    reduced = FLOAT32 if setup.reduce_in_float32 else c

    def over(axis: str, what: str, num_bytes: float) -> Iterator[Traffic]:
        """``num_bytes`` is all that the devices of the axis have together of what each gets, or gives up, the whole."""
        size, parts = setup.sizes[axis], _parts(setup, mesh, topology, axis)
        inside = size // parts
        near, far = LINKS[setup.hardware.platform]
        yield Traffic(axis, what, near, round(num_bytes * (inside - 1) / inside))
        # Each device of a slice fetches its part of what the others have, and passes it on inside.
        yield Traffic(axis, what, far, round(num_bytes * (parts - 1) / parts / inside))

    whole = numbers._replace(**{name: count * setup.sizes["fsdp"] for name, count in numbers._asdict().items()})
    for axis in FSDP_AXES:
        # Over expert goes, after fsdp, what is no expert's.
        part = whole.matrices if axis == "fsdp" else (whole.matrices - whole.experts) * setup.sizes["expert"]
        again = 0
        if setup.hardware.platform == "gpu" and setup.remat.policy not in ("none", "dots"):
            # Elsewhere the gradients find what was gathered to compute values again. The last product is not computed
            # again, and experts gather inside of what is.
            saved = whole.heads if {"query", "key", "value"} <= kept(setup) else 0
            again = whole.matrices - whole.experts - whole.down - saved
            again *= 1 if axis == "fsdp" else setup.sizes["expert"]
        table = share.table // (setup.sizes["expert"] if axis == "fsdp" else 1)
        yield from over(axis, "matrices gathered", A * (2 * part + again) * c)
        yield from over(axis, "gradients summed and split", A * part * reduced)
        yield from over(axis, "tables gathered", A * (1 if setup.model.tie_embeddings else 2) * table * c)
        yield from over(axis, "gradients of tables summed and split", A * 2 * table * FLOAT32)
    yield from over(
        "data", "gradients summed", A * 2 * (numbers.layers * reduced + 2 * share.table // share.fsdp * FLOAT32)
    )
    number = len(setup.model.blocks) * A * share.whole
    if share.is_sequence_split:
        once = A * share.whole  # the last hidden states for the loss, and their gradient
        yield from over("tensor", "residual stream gathered", (2 + 2 * (passes - 1) + 2) * number + once)
        yield from over("tensor", "residual stream summed and split", (2 + (passes - 1) + 2) * number + once)
    elif share.tensor > 1:
        yield from over("tensor", "residual stream summed", 2 * (4 + passes - 1) * number)
    yield from over("expert", "tokens to experts and back", A * _exchanged(share, passes))
    if setup.moments_on_host:
        yield Traffic(HOST_AXIS, "moments, which go back when they are updated", HOST_LINK, moments_bytes(setup))
    yield Traffic(HOST_AXIS, "saved values, which went there before", HOST_LINK, A * offloaded_bytes(setup))


def _exchanged(share: Share, passes: int) -> int:
    """Bytes of the rows of all experts' devices that go to experts and back; how many go where is the router's to say,
    and here they go everywhere alike."""
    setup, moe = share.setup, share.setup.model.moe
    if moe is None:
        return 0
    blocks = sum(kind.mlp == "moe" for kind in setup.model.blocks)
    if moe.capacity_factor is not None:  # all slots, there and back
        return blocks * 2 * (passes + 1) * share.expert_rows * setup.model.embed_dim * setup.compute_bytes
    if share.is_ragged:
        return blocks * 2 * (passes + 1) * share.whole * moe.experts_per_token
    # All tokens come to each device, and what it made of them is summed: that is not computed again.
    return blocks * (passes + 3) * share.whole * setup.sizes["expert"]


def _parts(setup: Setup, mesh: MeshConfig, topology: Topology, axis: str) -> int:
    """Into how many slices or hosts the axis is cut."""
    asked = crossing(mesh).get(axis, 1)
    if topology.slices == 1 or asked > 1 or setup.hardware.platform == "tpu":
        return asked
    if mesh.dcn_data * mesh.dcn_fsdp > 1:
        return 1
    # Devices in their order: the last axes fill a host first. Where hosts and turns of an axis do not end together, it
    # counts as cut into as many as it reaches.
    inner = math.prod(setup.sizes[name] for name in AXES[AXES.index(axis) + 1 :])
    return min(setup.sizes[axis], -(-inner * setup.sizes[axis] // topology.slice_devices))
