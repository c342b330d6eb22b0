"""Rows to the devices of their experts and back, against a simulation in Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.expert_exchange import plan_exchange, sent_back, sent_to_experts
from tests.tiny import mesh_of

WIDTH = 3
PER_EXPERT = jax.P("expert")


@functools.cache
def exchanged(num_devices: int, num_rows: int, num_received: int):
    """The function of all devices' rows and sizes: what comes, what comes back, rows of each expert; jitted."""

    def local(rows_MD, sizes_E):
        exchange = plan_exchange(sizes_E)
        received = sent_to_experts(rows_MD, exchange, num_received, "cpu")
        return received, sent_back(2 * received, exchange, num_rows, "cpu"), exchange.sizes

    specs = (PER_EXPERT,) * 2
    return jax.jit(jax.shard_map(local, in_specs=specs, out_specs=(PER_EXPERT,) * 3))


def simulated(rows_PMD: np.ndarray, sizes_PE: np.ndarray, num_received: int) -> np.ndarray:
    """What each device gets: of each of its experts the rows of the first device, then those of the second, …"""
    num_devices, num_experts = sizes_PE.shape
    received = np.zeros((num_devices, num_received, WIDTH), np.float32)
    for receiver, experts in enumerate(np.split(np.arange(num_experts), num_devices)):
        found = []
        for expert in experts:
            for sender in range(num_devices):
                start = sizes_PE[sender, :expert].sum()
                found += list(rows_PMD[sender, start : start + sizes_PE[sender, expert]])
        received[receiver, : len(found)] = np.reshape(found, (-1, WIDTH))
    return received


def draw(rng: np.random.Generator, num_devices: int, num_experts: int, num_rows: int):
    """Rows, and sizes of which many are 0; some devices have rows beyond those of all experts."""
    sizes = rng.multinomial(num_rows - rng.integers(0, 3), rng.dirichlet(np.full(num_experts, 0.3)), num_devices)
    rows = rng.standard_normal((num_devices, num_rows, WIDTH)).astype(np.float32)
    return rows, sizes.astype(np.int32)


@pytest.mark.parametrize(("num_devices", "num_experts"), [(2, 2), (4, 12), (8, 8)])
def test_rows_go_to_their_experts_in_order_and_come_back_to_their_places(rng, num_devices, num_experts):
    num_rows = 10
    num_received = num_devices * num_rows
    mesh = mesh_of(1, 1, 1, num_devices)
    differing = 0
    for _ in range(5):
        rows, sizes = draw(rng, num_devices, num_experts, num_rows)
        with jax.set_mesh(mesh):
            sharding = jax.NamedSharding(mesh, PER_EXPERT)
            arrays = (jax.device_put(x.reshape(-1, *x.shape[2:]), sharding) for x in (rows, sizes))
            received, back, of_experts = exchanged(num_devices, num_rows, num_received)(*arrays)
        expected = simulated(rows, sizes, num_received)
        np.testing.assert_array_equal(np.reshape(received, expected.shape), expected)
        np.testing.assert_array_equal(np.asarray(of_experts), sizes.sum(0))
        is_sent = np.arange(num_rows) < sizes.sum(1, keepdims=True)
        np.testing.assert_array_equal(np.reshape(back, rows.shape), 2 * rows * is_sent[..., None])
        swapped = simulated(rows, sizes[:, ::-1], num_received)
        differing += not np.array_equal(np.reshape(received, expected.shape), swapped)
    assert differing


def test_gradients_go_the_other_way(rng):
    """<forth(x), y> is <x, its gradient>, and that gradient is the rows of y that x became."""
    num_devices, num_experts, num_rows, num_received = 4, 8, 6, 24
    mesh = mesh_of(1, 1, 1, num_devices)
    rows, sizes = draw(rng, num_devices, num_experts, num_rows)
    weights = rng.standard_normal((num_devices * num_received, WIDTH)).astype(np.float32)

    def local(rows_MD, sizes_E, weights_RD):
        received = sent_to_experts(rows_MD, plan_exchange(sizes_E), num_received, "cpu")
        return jax.lax.psum(jnp.sum(received * weights_RD), "expert")

    run = jax.shard_map(local, in_specs=(PER_EXPERT,) * 3, out_specs=jax.P())
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, PER_EXPERT))  # noqa: E731
        arrays = [place(rows.reshape(-1, WIDTH)), place(sizes.reshape(-1)), place(weights)]
        value, gradient = jax.jit(jax.value_and_grad(run))(*arrays)
    np.testing.assert_allclose(value, np.sum(np.asarray(gradient) * rows.reshape(-1, WIDTH)), rtol=1e-5)
    places = simulated(np.arange(rows.size, dtype=np.float32).reshape(rows.shape) + 1, sizes, num_received)
    expected = np.zeros(rows.size, np.float32)
    taken = places.reshape(-1) > 0
    expected[places.reshape(-1)[taken].astype(int) - 1] = weights.reshape(-1)[taken]
    np.testing.assert_array_equal(np.reshape(gradient, -1), expected)
