"""The times and rates of a run's updates."""

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import Mesh

from lmjax.compat import device_memory_peak
from lmjax.hardware import peak_flops
from lmjax.models.counts import training_flops
from lmjax.train.job import Job
from lmjax.train.router import router_row
from lmjax.train.step import StepMetrics


@dataclasses.dataclass(frozen=True)
class Pending:
    """An update that was dispatched and whose metrics were not fetched yet."""

    step: int
    metrics: StepMetrics
    written: bool
    """Whether it gets a row of metrics.jsonl."""
    of_batch: dict[str, Any]
    """What its row says of its global batch."""


class Clock:
    """Turns fetched metrics into rows of metrics.jsonl, with the times and rates that belong to them."""

    def __init__(self, job: Job, mesh: Mesh):
        self.total_seconds = 0.0
        """Of all updates so far, without evaluations and saves."""
        self._devices = list(mesh.local_devices)
        peak = peak_flops(self._devices[0].device_kind)
        self._peak = None if peak is None else peak * mesh.size
        self._flops = training_flops(job.model, job.train.global_batch_size, job.data.sequence_length)
        self._moe, self._blocks = job.model.moe, job.model.blocks
        self._waited = 0.0
        self._last = time.perf_counter()

    def restart(self) -> None:
        """What happened since the last update is not part of the next."""
        self._last = time.perf_counter()

    def row(self, pending: Pending, tokens: float, seconds_waited: float) -> dict[str, Any]:
        metrics: StepMetrics = jax.device_get(pending.metrics)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.total_seconds += seconds
        waited, self._waited = seconds_waited - self._waited, seconds_waited
        memory = [peak for peak in map(device_memory_peak, self._devices) if peak is not None]
        row = {
            "step": pending.step,
            "loss": float(metrics.loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens": tokens + float(metrics.tokens),
            "tokens_per_second": float(metrics.tokens) / seconds,
            "step_seconds": seconds,
            "data_seconds": waited,
            "data_wait_share": waited / seconds,
            "mfu": None if self._peak is None else self._flops / seconds / self._peak,
            "memory_bytes": max(memory, default=None),
        }
        if metrics.router is not None and self._moe is not None:
            row["router"] = router_row(metrics.router, self._blocks, self._moe.experts_per_token)
        return row | pending.of_batch
