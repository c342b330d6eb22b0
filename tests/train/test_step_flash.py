"""The quickstart's model trained with the TPU kernel, interpreted, as with the reference."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lmjax.config import load
from lmjax.ops.attention_flash_tpu import flash_visits
from lmjax.ops.attention_kernels import KERNELS
from lmjax.train.step import DeviceBatch, loss_sums
from tests import tiny
from tests.ops.flash_cases import TILING

LENGTH = TILING.tile


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernel, to be had on CPU."""
    options = {"cpu": {"interpret": True, "tiling": TILING}}
    kernel = dataclasses.replace(KERNELS["flash_tpu"], hardware=frozenset({"cpu"}), options=options)
    monkeypatch.setitem(KERNELS, "flash_tpu", kernel)


def primitives(jaxpr, *, in_loop: bool = False) -> Iterator[tuple[str, bool]]:
    """The name of every step of a program, and whether it is inside of a loop over layers."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, in_loop
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner, in_loop=in_loop or equation.primitive.name == "scan")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kinds", [("full",), ("full", "sliding")])
def test_what_the_kernel_visits_is_found_once_a_batch_for_each_kind_of_block(rng, monkeypatch, kinds):
    monkeypatch.setattr(tiny, "LENGTH", LENGTH)
    window = 40 if "sliding" in kinds else None
    config = tiny.with_changes(tiny.CONFIG, num_layers=4, head_dim=8, layer_pattern=kinds, sliding_window=window)
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(2, 1, 1))
    params = tiny.state_of(blueprint, tiny.random_params(blueprint, rng)).params
    batch = DeviceBatch(*tiny.by_rows(blueprint.mesh, *tiny.packed_batch(rng, config)))

    def found(visits: Any) -> tuple[int, int]:
        """How often it is looked for where the segments begin, outside of loops and inside."""
        monkeypatch.setitem(KERNELS, "flash_tpu", dataclasses.replace(KERNELS["flash_tpu"], visits=visits))
        execution = tiny.execution(attention_kernel="flash_tpu")

        def loss(params):
            return loss_sums(blueprint.decoder(params), batch, execution, tiny.LOSS)[0].loss

        with jax.set_mesh(blueprint.mesh):
            program = jax.make_jaxpr(jax.grad(loss))(params)
        in_loops = [in_loop for name, in_loop in primitives(program.jaxpr) if name == "cummax"]
        return in_loops.count(False), in_loops.count(True)

    assert found(visits=flash_visits) == (2 * len(kinds), 0)
    assert found(visits=None)[1] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_the_quickstarts_model_trains_with_the_tpu_kernel_to_the_losses_of_the_reference(rng, seed, monkeypatch):
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
