import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.errors import InputError
from lmjax.optim import OptimizerConfig, make_optimizer, make_schedule

PEAK = 3e-3


@pytest.mark.fast
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_cosine_is_optax_warmup_cosine_one_update_on(warmup):
    """The rate of update n is the curve's value at n + 1: the first update is not lost, the last has the end's rate."""
    config = OptimizerConfig(learning_rate=PEAK, warmup_steps=warmup, end_fraction=0.2)
    found = [float(make_schedule(config, 20)(count)) for count in range(20)]
    theirs = optax.warmup_cosine_decay_schedule(0.0, PEAK, warmup, 20, end_value=0.2 * PEAK)
    np.testing.assert_allclose(found, [float(theirs(count + 1)) for count in range(20)], rtol=1e-6)
    assert found[-1] == pytest.approx(0.2 * PEAK)
    assert found[0] > 0
    if warmup:
        assert found[warmup - 1] == max(found) == pytest.approx(PEAK)
        assert found[:warmup] == pytest.approx([PEAK * (i + 1) / warmup for i in range(warmup)])


@pytest.mark.fast
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_constant_stays_at_its_peak(warmup):
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, schedule="constant", warmup_steps=warmup), 10)
    found = [float(schedule(count)) for count in range(10)]
    assert found == pytest.approx([PEAK * min(1, (i + 1) / max(warmup, 1)) for i in range(10)])


@pytest.mark.fast
def test_cosine_ends_at_a_tenth_by_default():
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK), 7)
    assert float(schedule(6)) == pytest.approx(0.1 * PEAK)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_adamw_equals_that_of_pytorch(clip_norm, rng):
    """With clipping before the moments, and decay of the one leaf that the mask names."""
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(learning_rate=PEAK, warmup_steps=2, weight_decay=0.5, epsilon=1e-4, clip_norm=clip_norm)
    schedule = make_schedule(config, 6)
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("w", (3, 4)), ("s", (4,)))}
    optimizer = make_optimizer(config, schedule, {"w": True, "s": False})
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)

    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    groups = [{"params": [theirs["w"]], "weight_decay": 0.5}, {"params": [theirs["s"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon)
    norms = []
    for step in range(6):
        grads = {
            name: rng.standard_normal(value.shape).astype(np.float32) * 10.0**-step for name, value in start.items()
        }
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
        for name, value in theirs.items():
            value.grad = torch.from_numpy(grads[name].copy())
        if clip_norm is not None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)))
        for group in adamw.param_groups:
            group["lr"] = float(schedule(step))
        adamw.step()
        for name, value in theirs.items():
            np.testing.assert_allclose(params[name], value.detach().numpy(), rtol=1e-5, atol=1e-6)
    for name, first in start.items():
        assert np.abs(np.asarray(params[name]) - first).max() > PEAK
    if clip_norm is not None:
        assert min(norms) < clip_norm < max(norms)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"schedule": "linear"}, "'cosine' or 'constant'"),
        ({"schedule": "constant", "end_fraction": 0.1}, "with schedule cosine only"),
        ({"end_fraction": 1.5}, "end_fraction is 1.5"),
        ({"learning_rate": True}, "valid number"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**fields)
