"""The quickstart's model trained with the TPU kernel, interpreted, as with the reference."""

import dataclasses

import numpy as np
import pytest

from lmjax.config import load
from lmjax.ops.attention_kernels import KERNELS
from tests import tiny


@pytest.mark.slow
def test_the_quickstarts_model_trains_with_the_tpu_kernel_to_the_losses_of_the_reference(rng, seed, monkeypatch):
    interpreted = {"cpu": {"interpret": True, "tile": 128}}
    kernel = dataclasses.replace(KERNELS["flash_tpu"], hardware=frozenset({"cpu"}), options=interpreted)
    monkeypatch.setitem(KERNELS, "flash_tpu", kernel)
    config = load("configs/quickstart.yaml", [])
    monkeypatch.setattr(tiny, "LENGTH", config.data.sequence_length)
    batches = [tiny.packed_batch(rng, config.model) for _ in range(3)]
    losses = {}
    for name in ("flash_tpu", "reference"):
        execution = tiny.execution(attention_kernel=name)
        trainer = tiny.Trainer(config.model, tiny.mesh_of(2, 2, 1), execution)
        losses[name] = [metrics.loss for metrics in trainer.train(batches, seed)[1]]
    np.testing.assert_allclose(losses["flash_tpu"], losses["reference"], rtol=1e-5)
    assert losses["reference"][2] != pytest.approx(losses["reference"][0], rel=1e-3)
