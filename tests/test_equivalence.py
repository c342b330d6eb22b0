"""One training step, whole: on every mesh, and against an implementation that shares nothing with it."""

import jax
import numpy as np
import pytest

from lmjax.optim import OptimizerConfig
from tests import tiny
from tests.tiny import CONFIG

STEPS = 20


@pytest.fixture(scope="module")
def one_device(request):
    """Losses and gradient norms of 20 updates on a single device."""
    return _run((1, 1, 1), request.config.getoption("--seed"))


def _run(shape: tuple[int, int, int], seed: int):
    rng = np.random.default_rng(seed)
    batches = [tiny.packed_batch(rng, CONFIG) for _ in range(STEPS)]
    state, metrics = tiny.Trainer(CONFIG, tiny.mesh_of(*shape)).train(batches, seed)
    return state, np.array([told.loss for told in metrics]), np.array([told.grad_norm for told in metrics])


@pytest.mark.parametrize("shape", tiny.MESHES)
def test_every_mesh_trains_to_the_losses_of_one_device(shape, one_device, seed):
    state, losses, norms = _run(shape, seed)
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-5)
    np.testing.assert_allclose(norms, one_device[2], rtol=1e-4)
    assert losses[-1] < losses[0] - 0.3  # something was learned, so that updates took part in the comparison
    wanted = tiny.blueprint_of(CONFIG, tiny.mesh_of(*shape)).state
    for (path, leaf), like in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == like.sharding, jax.tree_util.keystr(path)
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype), jax.tree_util.keystr(path)


def test_kv_heads_fewer_than_tensor_train_to_the_losses_of_one_device(seed):
    config = tiny.with_changes(CONFIG, num_kv_heads=2, num_layers=1)
    rng = np.random.default_rng(seed)
    batches = [tiny.packed_batch(rng, config) for _ in range(2)]
    one_device = tiny.Trainer(config, tiny.mesh_of(1, 1, 1))
    expected = np.array([told[:4] for told in one_device.train(batches, seed)[1]])
    found = np.array([told[:4] for told in tiny.Trainer(config, tiny.mesh_of(1, 2, 4)).train(batches, seed)[1]])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    other_parameters = np.array([told[:4] for told in one_device.train(batches, seed + 1)[1]])
    assert np.abs(other_parameters / expected - 1)[:, 0].min() > 1e-3


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_step_equals_pytorch(tied, rng):
    """Packed rows, grouped heads, sliding and full layers, clipping, warm-up, decay of matrices: five losses."""
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("benchmarks.torch_decoder")
    config = tiny.with_changes(
        CONFIG, num_kv_heads=2, num_layers=3, layer_pattern=("sliding", "full"), sliding_window=3, tie_embeddings=tied
    )
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.5, weight_decay=0.3, epsilon=1e-6)
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1), optimizer)
    params = tiny.random_params(blueprint, rng)
    batches = [tiny.packed_batch(rng, config) for _ in range(5)]

    model = peer.TorchDecoder(config)
    peer.copy_parameters(model, params, config)
    adamw = peer.make_adamw(model, learning_rate=1.0, beta1=0.9, beta2=0.95, epsilon=1e-6, weight_decay=0.3)
    expected, expected_norms = [], []
    for step, batch in enumerate(batches):
        tokens, targets, segment_ids, positions, weights = (torch.from_numpy(field) for field in batch)
        loss = peer.loss(model(tokens, positions, segment_ids), targets.long(), weights)
        adamw.zero_grad()
        loss.backward()
        expected_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in adamw.param_groups:
            group["lr"] = float(blueprint.schedule(step))
        adamw.step()
        expected.append(float(loss.detach()))

    state, step = tiny.state_of(blueprint, params), tiny.jitted_step(blueprint)
    losses, norms = [], []
    with jax.set_mesh(blueprint.mesh):
        for batch in batches:
            state, metrics = step(state, tiny.to_mesh(batch, blueprint.mesh))
            losses.append(float(metrics.loss))
            norms.append(float(metrics.grad_norm))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-4)
    assert min(norms) > 0.5  # clipping took part
    names = ("embed.weight", "blocks.2.mlp_norm.weight")
    scale = list(peer.layers(state.params, config))[2]["mlp_norm"]["scale"]
    found = dict(zip(names, (state.params["embed"]["table"][: config.vocab_size], scale), strict=True))
    tiny.assert_trees_close(found, {name: model.get_parameter(name).detach().numpy() for name in names}, 1e-4)
    with pytest.raises(AssertionError):
        tiny.assert_trees_close(found, {**found, names[0]: params["embed"]["table"][: config.vocab_size]}, 1e-2)
    # The negative control: without the documents' boundaries the peer's first loss is another one.
    tokens, targets, segment_ids, positions, weights = (torch.from_numpy(field) for field in batches[0])
    peer.copy_parameters(model, params, config)
    with torch.no_grad():
        whole = float(peer.loss(model(tokens, positions, torch.ones_like(segment_ids)), targets.long(), weights))
    assert abs(whole - expected[0]) > 1e-3
