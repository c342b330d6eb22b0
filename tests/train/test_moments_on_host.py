"""Moments in the memory of the hosts change where they lie and nothing else.

The CPU's devices have that memory too, as JAX sees it: here states are placed and moved for real.
"""

import jax
import numpy as np
import pytest

from lmjax.checkpoint.restore import restore
from lmjax.checkpoint.save import CheckpointConfig, Saver
from lmjax.train.state import HOST_MEMORY, init_state, make_blueprint, state_from
from tests import tiny
from tests.tiny import CONFIG

MESH = (1, 4, 2)


def blueprint_of(*, moments_on_host: bool):
    return make_blueprint(CONFIG, tiny.OPTIMIZER, 20, tiny.mesh_of(*MESH), moments_on_host=moments_on_host)


def trainer_of(*, moments_on_host: bool) -> tiny.Trainer:
    trainer = tiny.Trainer(CONFIG, tiny.mesh_of(*MESH), accumulation=2)
    trainer.blueprint = blueprint_of(moments_on_host=moments_on_host)
    trainer.step = tiny.jitted_step(trainer.blueprint, tiny.FLOAT32)
    return trainer


def assert_moments_are_on_the_host(state) -> None:
    for path, leaf in jax.tree.leaves_with_path(state):
        is_moment = any(getattr(entry, "name", None) in ("mu", "nu") for entry in path)
        expected = HOST_MEMORY if is_moment else "device"
        assert leaf.sharding.memory_kind == expected, jax.tree_util.keystr(path)


def assert_same_bits(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_updates_have_the_same_bits_and_leave_the_moments_there(rng, seed):
    batches = [tiny.packed_batch(rng, CONFIG) for _ in range(3)]
    expected, told = trainer_of(moments_on_host=False).train(batches, seed)
    found, told_here = trainer_of(moments_on_host=True).train(batches, seed)
    assert told_here == told
    assert_same_bits(found, expected)
    assert_moments_are_on_the_host(found)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(expected)} == {"device"}
    first = trainer_of(moments_on_host=True).train(batches[:1], seed)[0]
    assert any(np.any(one != other) for one, other in zip(*map(jax.tree.leaves, (first, found)), strict=True))


def test_states_begin_there():
    blueprint = blueprint_of(moments_on_host=True)
    state = init_state(blueprint, 3)
    assert_moments_are_on_the_host(state)
    assert_same_bits(state, init_state(blueprint_of(moments_on_host=False), 3))
    assert_moments_are_on_the_host(state_from(blueprint, state.params))


@pytest.mark.parametrize("saved_on_host", [True, False])
def test_checkpoints_go_from_the_one_memory_to_the_other(tmp_path, rng, seed, saved_on_host):
    trainer = trainer_of(moments_on_host=saved_on_host)
    state, _ = trainer.train([tiny.packed_batch(rng, CONFIG)], seed)
    saver = Saver(str(tmp_path), CheckpointConfig())
    saver.save(1, state, {})
    saver.close()
    there = restore(tmp_path, blueprint_of(moments_on_host=True).state)
    here = restore(tmp_path, blueprint_of(moments_on_host=False).state)
    assert there is not None
    assert here is not None
    assert_same_bits(there.state, state)
    assert_same_bits(here.state, state)
    assert_moments_are_on_the_host(there.state)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(here.state)} == {"device"}
