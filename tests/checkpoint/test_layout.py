"""What a state may hold, and the names under which it is on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.checkpoint.layout import absolute, flatten, split_parts

pytestmark = pytest.mark.fast


def test_paths_name_every_kind_of_node():
    state = {"params": {"w": jnp.ones(2)}, "optimizer": (optax.ScaleByScheduleState(jnp.int32(0)), [jnp.ones(1)], None)}
    assert list(flatten(state)) == ["optimizer/0/count", "optimizer/1/0", "params/w"]
    assert list(split_parts(flatten(state))["optimizer"]) == ["optimizer/0/count", "optimizer/1/0"]


@pytest.mark.parametrize("kind", ["scalar", "numpy", "float", "key"])
def test_only_jax_arrays_of_numbers(kind):
    leaf = {"scalar": np.int32(3), "numpy": np.ones(2), "float": 1.0, "key": jax.random.key(0)}[kind]
    with pytest.raises(TypeError, match="(?s)params/w is .* a checkpoint holds jax arrays of numbers"):
        flatten({"params": {"w": leaf}})


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(AssertionError, match="one path"):
        flatten({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})


def test_a_path_in_an_object_store_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(absolute("s3://bucket/run")) == "s3://bucket/run"
    assert str(absolute("run")) == str(tmp_path / "run")
