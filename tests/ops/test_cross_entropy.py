import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.ops.cross_entropy import LossOptions, linear_cross_entropy, naive_cross_entropy, token_nll
from tests.ops.sharded import BATCH, assert_trees_close, count, run_on, shapes

BATCH_SIZE, LENGTH, EMBED, VOCAB, ROWS = 8, 16, 16, 100, 128
TABLE, TOKENS = P("tensor", "fsdp"), P(BATCH)
OPTIONS = LossOptions(z_loss=1e-2, chunk_tokens=24)  # divides neither the tokens of a device nor those of a row


class Inputs:
    def __init__(self, rng):
        self.x = rng.normal(size=(BATCH_SIZE, LENGTH, EMBED)).astype(np.float32)
        self.table = rng.normal(size=(ROWS, EMBED)).astype(np.float32)
        self.targets = rng.integers(0, VOCAB, (BATCH_SIZE, LENGTH)).astype(np.int32)
        self.weights = rng.random((BATCH_SIZE, LENGTH)).astype(np.float32)
        self.weights[:, -3:] = 0

    def placed(self, sequence: str | None = "tensor"):
        x = (self.x, P(BATCH, sequence, None))
        return x, (self.table, TABLE), (self.targets, TOKENS), (self.weights, TOKENS)

    def naive(self, options=OPTIONS, vocab_size=VOCAB):
        return with_gradients(naive_cross_entropy, options, vocab_size)(self.x, self.table, self.targets, self.weights)


@pytest.fixture
def inputs(rng) -> Inputs:
    return Inputs(rng)


def with_gradients(function, options=OPTIONS, vocab_size=VOCAB):
    """(sums, (dx, dtable)), of half the loss, so that the incoming gradient is not one."""

    def half_loss(x, table, targets, weights):
        sums = function(x, table, targets, weights, options, vocab_size=vocab_size)
        return 0.5 * sums.loss, sums

    def run(*args):
        (_, sums), gradients = jax.value_and_grad(half_loss, argnums=(0, 1), has_aux=True)(*args)
        return sums, gradients

    return run


def test_naive_form_is_torchs(inputs):
    torch = pytest.importorskip("torch")
    x, table = (torch.tensor(array, requires_grad=True) for array in (inputs.x, inputs.table))
    logits = (x @ table[:VOCAB].T).reshape(-1, VOCAB)
    targets, weights = torch.tensor(inputs.targets).long().reshape(-1), torch.tensor(inputs.weights).reshape(-1)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights
    z_loss = OPTIONS.z_loss * (torch.logsumexp(logits, -1) ** 2 * weights).sum()
    (0.5 * (nll.sum() + z_loss)).backward()
    sums, gradients = inputs.naive()
    expected = [value.detach().numpy() for value in (nll.sum() + z_loss, nll.sum(), z_loss, weights.sum())]
    np.testing.assert_allclose(sums, expected, rtol=2e-6)
    assert_trees_close(gradients, (x.grad.numpy(), table.grad.numpy()), 2e-6)


@pytest.mark.parametrize("sequence", ["tensor", None])
def test_value_and_gradients_are_the_naive_ones_on_any_mesh(mesh, inputs, sequence):
    sums, gradients = run_on(mesh, with_gradients(linear_cross_entropy), *inputs.placed(sequence))
    expected_sums, expected_gradients = inputs.naive()
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-6)
    assert_trees_close(gradients, expected_gradients, 2e-6)
    assert [gradient.sharding.spec for gradient in gradients] == [P(BATCH, sequence, None), TABLE]
    assert not np.any(np.asarray(gradients[1])[VOCAB:])


def test_comparison_sees_one_more_row_of_the_table(mesh_2x2x2, inputs):
    sums, _ = run_on(mesh_2x2x2, with_gradients(linear_cross_entropy, vocab_size=VOCAB + 1), *inputs.placed())
    assert abs(sums.loss / inputs.naive()[0].loss - 1) > 1e-4


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 4096])
def test_chunks_change_nothing(one_device, inputs, chunk_tokens):
    options = LossOptions(z_loss=OPTIONS.z_loss, chunk_tokens=chunk_tokens)
    sums, gradients = run_on(one_device, with_gradients(linear_cross_entropy, options), *inputs.placed())
    expected_sums, expected_gradients = inputs.naive()
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-6)
    assert_trees_close(gradients, expected_gradients, 2e-6)


def test_score_of_each_token_is_on_its_own_place(mesh, inputs):
    def scores(x, table, targets, weights):
        sums = linear_cross_entropy(x, table, targets, weights, OPTIONS, vocab_size=VOCAB)
        return token_nll(x, table, targets, OPTIONS, vocab_size=VOCAB), sums

    nll, sums = run_on(mesh, scores, *inputs.placed())
    logits = inputs.x @ inputs.table[:VOCAB].T
    expected = -np.take_along_axis(jax.nn.log_softmax(logits), inputs.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums, inputs.naive()[0], rtol=1e-6)


def test_bfloat16_gives_float32_sums_and_table_gradient_near_those_of_float32(mesh_2x2x2, inputs):
    expected_sums, expected_gradients = inputs.naive()
    inputs.x = inputs.x.astype(jnp.bfloat16)
    sums, (dx, dtable) = run_on(mesh_2x2x2, with_gradients(linear_cross_entropy), *inputs.placed())
    assert {value.dtype for value in sums} == {jnp.dtype("float32")}
    assert (dx.dtype, dtable.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(sums, expected_sums, rtol=2e-3)
    assert_trees_close((dx, dtable), expected_gradients, 2e-2)


def test_three_products_with_gradients_and_one_without(one_device, inputs):
    arrays = [array for array, _ in inputs.placed()]

    def traced(function, sequence="tensor"):
        def placed(*arrays):
            specs = (P(BATCH, sequence, None), TABLE, TOKENS, TOKENS)
            return function(*map(jax.sharding.reshard, arrays, specs))

        with jax.set_mesh(one_device):
            return jax.make_jaxpr(placed)(*arrays)

    def value(*args):
        return linear_cross_entropy(*args, OPTIONS, vocab_size=VOCAB)

    training = traced(with_gradients(linear_cross_entropy))
    evaluation = traced(value)
    assert count(training, "dot_general") == 3
    assert count(evaluation, "dot_general") == 1
    all_logits = BATCH_SIZE * LENGTH * ROWS
    assert max(np.prod(shape, dtype=int) for shape in shapes(training)) < all_logits / 4
    naive = jax.make_jaxpr(with_gradients(naive_cross_entropy, vocab_size=ROWS))(*arrays)
    assert max(np.prod(shape, dtype=int) for shape in shapes(naive)) == all_logits
