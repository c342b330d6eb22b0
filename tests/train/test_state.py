import jax
import numpy as np
import pytest

from lmjax.errors import InputError
from lmjax.sharding import leaf_report
from lmjax.train.state import decay_mask, init_state
from tests import tiny
from tests.tiny import CONFIG

SMALL = tiny.with_changes(CONFIG, num_layers=1, tie_embeddings=True)


@pytest.fixture(scope="module")
def on_one_device():
    return init_state(tiny.blueprint_of(SMALL, tiny.mesh_of(1, 1, 1)), 3)


@pytest.mark.parametrize("shape", tiny.MESHES)
def test_init_has_the_same_bits_on_every_mesh(shape, on_one_device):
    blueprint = tiny.blueprint_of(SMALL, tiny.mesh_of(*shape))
    state = init_state(blueprint, 3)
    for (path, leaf), like, one in zip(
        jax.tree.leaves_with_path(state),
        jax.tree.leaves(blueprint.state),
        jax.tree.leaves(on_one_device),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        assert leaf.sharding == like.sharding, name
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype), name
        np.testing.assert_array_equal(leaf, one, err_msg=name)


def test_init_is_drawn_from_the_seed_and_by_the_scheme(on_one_device):
    again = init_state(tiny.blueprint_of(SMALL, tiny.mesh_of(1, 1, 1)), 3)
    jax.tree.map(np.testing.assert_array_equal, again, on_one_device)
    other = init_state(tiny.blueprint_of(SMALL, tiny.mesh_of(1, 1, 1)), 4)
    matrices = [leaf for leaf in jax.tree.leaves(on_one_device.params) if leaf.ndim > 2 or leaf.shape[0] == 128]
    others = [leaf for leaf in jax.tree.leaves(other.params) if leaf.ndim > 2 or leaf.shape[0] == 128]
    assert len(matrices) == 8
    for one, two in zip(matrices, others, strict=True):
        assert abs(np.corrcoef(np.ravel(one), np.ravel(two))[0, 1]) < 0.2
    block = on_one_device.params["segments"][0]["blocks"][0]
    assert np.std(block["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.1)
    assert np.std(block["mlp"]["down"]["kernel"]) == pytest.approx(0.02 / np.sqrt(2), rel=0.1)


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 8)])
def test_each_device_holds_an_eighth_of_parameters_and_moments(shape):
    config = tiny.with_changes(CONFIG, embed_dim=128, mlp_dim=256, vocab_size=500)
    state = tiny.blueprint_of(config, tiny.mesh_of(*shape)).state
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    held = sum(leaf.bytes_per_device for leaf in leaf_report(state))
    assert total / 8 <= held <= 1.1 / 8 * total
    replicated = tiny.blueprint_of(config, tiny.mesh_of(8, 1, 1)).state
    assert sum(leaf.bytes_per_device for leaf in leaf_report(replicated)) == total


def test_arrays_hold_what_the_blueprint_says(rng):
    """The bytes of real buffers, not of specs."""
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(1, 8, 1))
    state = tiny.state_of(blueprint, tiny.random_params(blueprint, rng))
    device = jax.devices()[0]
    shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    held = sum(shard.data.nbytes for shard in shards if shard.device == device)
    assert held == sum(leaf.bytes_per_device for leaf in leaf_report(blueprint.state))


@pytest.mark.fast
def test_moments_are_sharded_as_their_parameters():
    state = tiny.blueprint_of(CONFIG, tiny.mesh_of(2, 2, 2)).state
    params = jax.tree.map(lambda leaf: leaf.sharding.spec, state.params)
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    for moments in (adam.mu, adam.nu):
        assert jax.tree.map(lambda leaf: leaf.sharding.spec, moments) == params
    kernel = params["segments"][0]["blocks"][0]["attention"]["query"]["kernel"]
    assert kernel == jax.P(None, ("fsdp", "expert"), "tensor", None)


@pytest.mark.fast
def test_matrices_are_decayed_and_norms_are_not():
    config = tiny.with_changes(CONFIG, qkv_bias=True, mlp_bias=True, qk_norm="full", attention_sinks=True)
    names = set()
    for path, decayed in jax.tree.leaves_with_path(decay_mask(config)):
        names.add(path[-1].key)
        assert decayed == (path[-1].key in ("kernel", "table")), jax.tree_util.keystr(path)
    assert names == {"kernel", "table", "bias", "scale", "sinks"}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"embed_dim": 36}, (1, 8, 1), "embed has size 36.*fsdp = 8 devices: 36 mod 8 = 4"),
        ({"num_heads": 6}, (1, 1, 4), "heads has size 6.*tensor = 4 devices: 6 mod 4 = 2"),
        ({"mlp_dim": 50}, (1, 1, 4), "mlp has size 50.*50 mod 4 = 2"),
    ],
)
def test_meshes_that_do_not_divide_the_model_are_refused(changes, shape, message):
    config = tiny.with_changes(CONFIG, **changes)
    tiny.blueprint_of(config, tiny.mesh_of(2, 1, 1))
    with pytest.raises(InputError, match=message):
        tiny.blueprint_of(config, tiny.mesh_of(*shape))
