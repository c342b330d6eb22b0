"""Whether a mesh follows the links between chips that are not here; no compiler is asked."""

import dataclasses
import functools

from lmjax.mesh import laid_out
from lmjax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A device of a slice that is not here: as much of it as says where it lies."""

    platform: str
    device_kind: str
    id: int
    coords: tuple[int, ...]
    core_on_chip: int
    process_index: int = 0


@functools.lru_cache(maxsize=1024)
def check_layout(topology: Topology, inside: tuple[tuple[str, int], ...]) -> None:
    """Raises InputError where a mesh of these sizes does not follow the links of a slice; the compiler is not asked."""
    machine = topology.machine
    if machine is None or topology.hardware.platform != "tpu":
        return
    x, y, z = (*topology.shape, 1)[:3]
    devices = [
        StandIn("tpu", machine.device_kind, number, tuple(coords), core)
        for number, (*coords, core) in enumerate(
            (a, b, c, core)
            for c in range(z)
            for b in range(y)
            for a in range(x)
            for core in range(machine.chip_devices)
        )
    ]
    laid_out(dict(inside), devices)
