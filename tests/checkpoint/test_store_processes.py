"""Two processes that share no disk save one state in an object store, and restore it, on another mesh too."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch" / "local.sh"

TWO_PROCESSES = """
    import os, sys, time
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from lmjax.checkpoint import store
    from lmjax.checkpoint.manifest import list_steps, read_manifest
    from lmjax.checkpoint.processes import first_on_machine, gather
    from lmjax.checkpoint.restore import restore
    from lmjax.checkpoint.save import CheckpointConfig, Saver
    from lmjax.errors import InputError
    from lmjax.mesh import MeshConfig, make_mesh
    from lmjax.startup import start_distributed

    start_distributed()
    process, directory = jax.process_index(), sys.argv[1]
    os.environ["LMJAX_CACHE"] = f"{os.environ['LMJAX_CACHE']}/machine_{process}"
    assert first_on_machine() is (process == 0)

    def state_on(mesh, spec, step):
        weights = step * np.arange(32.0).reshape(8, 4)
        values = {"params": {"w": (weights, spec)}, "step": (np.array(step), PartitionSpec())}
        return jax.tree.map(lambda pair: jax.make_array_from_callback(
            pair[0].shape, NamedSharding(mesh, pair[1]), lambda index: pair[0][index]),
            values, is_leaf=lambda leaf: isinstance(leaf, tuple))

    def check(found, state, step):
        assert found.step == step
        for ours, theirs in zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True):
            assert ours.sharding == theirs.sharding
            for one, other in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
                assert np.array_equal(one.data, other.data)

    def target(state):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)

    mesh, spec = make_mesh(MeshConfig(fsdp=2, tensor=2)), PartitionSpec("fsdp", "tensor")
    makedirs = os.makedirs

    def late(path, *arguments, **options):
        # The directory of a step, but not on the way to one in it.
        if str(path).endswith("-tmp") and sys._getframe(1).f_globals["__name__"] != "os":
            time.sleep(1)
        return makedirs(path, *arguments, **options)

    if process == 1:  # what process 0 has made, and says so, says nothing of this one's disk
        os.makedirs = late
    saver = Saver(directory, CheckpointConfig(keep_last=2))
    for step in (1, 2):
        saver.save(step, state_on(mesh, spec, step), {})
    saver.wait()
    parts = {name.split("/")[1] for name in read_manifest(directory, 2).files if name.startswith("params/")}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= parts and "manifest.ocdbt" not in parts
    check(restore(directory, target(state_on(mesh, spec, 2))), state_on(mesh, spec, 2), 2)
    other = state_on(make_mesh(MeshConfig(fsdp=1, tensor=4)), PartitionSpec("tensor", None), 2)
    check(restore(directory, target(other)), other, 2)

    if process == 1:
        def fail(*_):
            raise OSError("the way of process 1")
        store.paths.upload = fail
    saver.save(3, state_on(mesh, spec, 3), {})
    try:
        saver.wait()
        raise AssertionError("the save did not fail")
    except InputError as error:
        assert "saving checkpoint 3 failed" in str(error) and "the way of process 1" in str(error)
    assert list_steps(directory) == [1, 2]
    saver.close()
    gather(None)
    print("all agreed")
"""


@pytest.mark.slow
def test_two_processes_without_a_shared_disk(bucket):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": os.pathsep.join([str(LAUNCH.parents[1]), *sys.path]),
    }
    command = [LAUNCH, "2", sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), f"{bucket}/run/checkpoints"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] all agreed", "[1] all agreed"]
