"""Train steps compiled for TPU chips that are not here: they fit, they shard, and nothing quadratic exists in them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from lmjax.compat import temporary_bytes
from lmjax.errors import InputError
from lmjax.hardware import Hardware
from lmjax.mesh import MeshConfig
from lmjax.models.decoder import DecoderConfig, Execution
from lmjax.nn.attention_latent import LatentConfig
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.plan.compile import CompiledStep, compile_step, kept_or_compiled, topology_mesh
from lmjax.plan.hlo import arrays_above
from lmjax.plan.topology import topology_devices
from lmjax.train import executable
from lmjax.train.feed import abstract_batch
from lmjax.train.state import make_blueprint
from lmjax.train.step import lower_step

LENGTH = 1024
CONFIG = DecoderConfig(
    vocab_size=2 * LENGTH, max_length=LENGTH, embed_dim=256, num_layers=2, num_heads=2, head_dim=128, mlp_dim=512
)
"""Of no parameter has a device LENGTH x LENGTH elements. With tensor 2, it has the logits of LENGTH tokens."""


@pytest.fixture(autouse=True)
def _needs_libtpu():
    pytest.importorskip("libtpu")


def compiled(mesh_config: MeshConfig, topology: str, *, config: DecoderConfig = CONFIG, **changes) -> CompiledStep:
    """One sequence for each chip that has a part of the batch."""
    mesh = topology_mesh(mesh_config, topology)
    blueprint = make_blueprint(config, OptimizerConfig(), 10, mesh)
    execution = dataclasses.replace(
        Execution(compute_dtype=jnp.dtype("bfloat16"), hardware=Hardware("tpu", "v5p")), **changes
    )
    batch = abstract_batch(mesh.shape["data"] * mesh.shape["fsdp"], LENGTH, 1, mesh)
    return compile_step(blueprint, execution, LossOptions(chunk_tokens=256), batch)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)])
def test_a_step_compiles_and_nothing_in_it_is_quadratic(sizes: tuple[int, int, int]):
    data, fsdp, tensor = sizes
    config = dataclasses.replace(CONFIG, num_heads=4, vocab_size=tensor * LENGTH)
    step = compiled(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), "v5p:2x2x2", config=config)
    assert arrays_above(step.text, LENGTH, LENGTH) == set()
    assert "splash" in step.text
    # Parameters and two moments in float32, of which a device has its share and a few whole norms, and the batch.
    parameters = 4 * (2 * config.vocab_size * 256 + 2 * (256 * 128 * 4 * 4 + 3 * 256 * 512))
    assert 3 * parameters / (fsdp * tensor) < step.argument_bytes < 3 * parameters / (fsdp * tensor) + 200_000
    assert step.alias_bytes > 0.99 * step.output_bytes
    assert step.total_bytes < step.argument_bytes + step.temp_bytes + 200_000
    assert step.flops
    moved = {kind: found.bytes for kind, found in step.collectives.items()}
    if fsdp * tensor == 1:
        assert moved.keys() == {"all-reduce"}
    else:
        assert moved["all-gather"] > 0
        assert moved["reduce-scatter"] > 0


@pytest.mark.slow
def test_the_reference_kernel_is_found_to_have_all_scores():
    step = compiled(MeshConfig(fsdp=2, tensor=2), "v5p:2x2x1", attention_kernel="reference")
    assert {"f32", "bf16"} <= {found.dtype for found in arrays_above(step.text, LENGTH, LENGTH)}


def test_a_step_that_does_not_fit_is_refused_with_the_sizes():
    config = dataclasses.replace(CONFIG, vocab_size=2**20, embed_dim=2048)
    with pytest.raises(InputError, match=r"does not fit the memory of a TPU v5 lite .*\d+\.\d+G.*15\.75G.*Lower train"):
        compiled(MeshConfig(data=4, fsdp=1), "v5e:2x2", config=config)


@pytest.mark.slow
def test_latent_attention_compiles_with_the_kernel_for_tpu():
    """Queries and keys of 192 dimensions, values of 128; nothing has the keys of all pairs of positions."""
    config = dataclasses.replace(
        CONFIG,
        num_heads=4,
        head_dim=192,
        vocab_size=2 * LENGTH,
        latent=LatentConfig(kv_rank=64, query_rank=128, rope_dim=64, value_dim=128),
    )
    step = compiled(MeshConfig(data=2, fsdp=2, tensor=2), "v5p:2x2x2", config=config)
    assert "splash" in step.text
    assert arrays_above(step.text, LENGTH, LENGTH) == set()


def test_a_mesh_that_does_not_fit_the_topology_is_refused():
    with pytest.raises(InputError, match="8 are here"):
        topology_mesh(MeshConfig(fsdp=3), "v5p:2x2x2")
    with pytest.raises(InputError, match="cannot be laid out"):
        topology_mesh(MeshConfig(fsdp=128, tensor=2), "v5p:4x8x8")


@pytest.mark.parametrize(("platform", "topology"), [("tpu", "v5p:2x2x1"), ("cpu", "cpu:1")])
def test_temporaries_are_what_is_needed_besides_arguments_and_results(platform, topology):
    """In units of an argument: none to add to it, in its own place or another, and one or two to sort it."""
    n = 4096
    square = jax.ShapeDtypeStruct((n, n), "float32", sharding=SingleDeviceSharding(topology_devices(topology)[0]))

    def temporaries(function, **options) -> float:
        lowered = jax.jit(function, **options).trace(square).lower(lowering_platforms=(platform,))
        return temporary_bytes(lowered.compile()) / (4 * n**2)

    assert temporaries(lambda x: x + 1) < 0.1
    assert temporaries(lambda x: x + 1, donate_argnums=0) < 0.1
    assert 1 <= temporaries(lambda x: jnp.sort(jnp.sort(x, 0), 1) @ x) < 2.1


def lowered_for(config: DecoderConfig, mesh: Mesh) -> jax.stages.Lowered:
    blueprint = make_blueprint(config, OptimizerConfig(), 10, mesh)
    execution = Execution(compute_dtype=jnp.dtype("float32"))
    return lower_step(blueprint, execution, LossOptions(), abstract_batch(4, 64, 1, mesh))


@pytest.fixture
def lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step for four forced CPU devices, and an empty cache."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))
    mesh = topology_mesh(MeshConfig(fsdp=4), "cpu:4")
    return lowered_for(CONFIG, mesh), mesh


def test_what_was_compiled_before_is_not_compiled_again(lowered, tmp_path: Path):
    step, mesh = lowered
    first = kept_or_compiled(step, mesh, {})
    again = kept_or_compiled(step, mesh, {})
    assert (first.is_kept, again.is_kept) == (False, True)
    assert again == dataclasses.replace(first, is_kept=True)
    assert again.collectives == first.collectives
    assert again.collectives["all-gather"].bytes > 0
    kept_or_compiled(step, mesh, {"xla_cpu_enable_fast_math": True})
    assert len(list((tmp_path / "plans").iterdir())) == 2
    for file in (tmp_path / "plans").iterdir():
        file.write_bytes(file.read_bytes()[:1000])  # cut off
    assert not kept_or_compiled(step, mesh, {}).is_kept
    assert kept_or_compiled(step, mesh, {}).is_kept
    for file in (tmp_path / "plans").iterdir():
        content = bytearray(file.read_bytes())
        content[100] ^= 255
        file.write_bytes(content)
    assert not kept_or_compiled(step, mesh, {}).is_kept


def test_where_the_cache_cannot_be_written_the_compile_is_told_all_the_same(
    lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    step, mesh = lowered
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "file"))
    executable = tmp_path / "step"
    assert kept_or_compiled(step, mesh, {}, str(executable)).total_bytes > 0
    assert executable.stat().st_size > 0
    told = capsys.readouterr().err
    assert told.startswith("lmjax: this compile is not kept: ")
    assert "set LMJAX_CACHE" in told


def test_options_of_the_process_tell_one_compile_from_another(lowered, monkeypatch: pytest.MonkeyPatch):
    step, mesh = lowered
    kept_or_compiled(step, mesh, {})
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert kept_or_compiled(step, mesh, {}).is_kept
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert not kept_or_compiled(step, mesh, {}).is_kept


def test_arrays_at_the_peak_are_listed_where_they_are_asked_for(lowered):
    step, mesh = lowered
    plain = kept_or_compiled(step, mesh, {})
    assert plain.arrays is None
    listed = kept_or_compiled(step, mesh, {}, lists_arrays=True)
    assert not listed.is_kept
    assert listed.total_bytes == plain.total_bytes
    assert listed.arrays is not None
    table = 4 * CONFIG.vocab_size * CONFIG.embed_dim // 4  # float32, of one of four devices
    state = [
        array for array in listed.arrays if array.scope.startswith("state.") and "['embed']['table']" in array.scope
    ]
    assert [array.bytes for array in state] == 3 * [table]  # and two moments
    assert sum(array.bytes for array in listed.arrays) == pytest.approx(listed.total_bytes, rel=0.02)
    assert kept_or_compiled(step, mesh, {}, lists_arrays=True) == dataclasses.replace(listed, is_kept=True)
    assert kept_or_compiled(step, mesh, {}).is_kept


def test_the_program_the_devices_and_the_compiler_tell_one_compile_from_another(
    lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step, mesh = lowered
    kept_or_compiled(step, mesh, {})
    monkeypatch.setattr(executable, "installed", lambda packages: dict.fromkeys(packages, "another"))
    assert not kept_or_compiled(step, mesh, {}).is_kept
    monkeypatch.undo()
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))
    other = lowered_for(dataclasses.replace(CONFIG, mlp_dim=256), mesh)
    assert not kept_or_compiled(other, mesh, {}).is_kept
    assert kept_or_compiled(step, mesh, {}).is_kept


def test_vector_memory_of_kernels_is_told():
    step = compiled(MeshConfig(fsdp=4), "v5e:2x2", attention_kernel="flash_tpu")
    assert set(step.kernel_memory) == {"flash_forward", "flash_dq", "flash_dkv"}
    assert all(2**18 < num_bytes < 2**24 for num_bytes in step.kernel_memory.values())
