import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.ops.cross_entropy import LossOptions, linear_cross_entropy, naive_cross_entropy, token_nll
from tests.ops.sharded import BATCH, assert_trees_close, count, run_on, shapes

BATCH_SIZE, LENGTH, EMBED, VOCAB, ROWS = 8, 16, 16, 100, 128
TABLE, TOKENS, BIAS = P("tensor", ("fsdp", "expert")), P(BATCH), P("tensor")
SOFTCAP = 5.0
OPTIONS = LossOptions(z_loss=1e-2, chunk_tokens=24)  # divides neither the tokens of a device nor those of a row


class Inputs:
    def __init__(self, rng):
        self.x = rng.normal(size=(BATCH_SIZE, LENGTH, EMBED)).astype(np.float32)
        self.table = rng.normal(size=(ROWS, EMBED)).astype(np.float32)
        self.targets = rng.integers(0, VOCAB, (BATCH_SIZE, LENGTH)).astype(np.int32)
        self.weights = rng.random((BATCH_SIZE, LENGTH)).astype(np.float32)
        self.weights[:, -3:] = 0
        self.bias = rng.normal(size=ROWS).astype(np.float32)

    def placed(self, sequence: str | None = "tensor"):
        x = (self.x, P(BATCH, sequence, None))
        return x, (self.table, TABLE), (self.targets, TOKENS), (self.weights, TOKENS)

    def placed_with_bias(self):
        return *self.placed(), (self.bias, BIAS)

    def naive(self, options=OPTIONS, vocab_size=VOCAB):
        return with_gradients(naive_cross_entropy, options, vocab_size)(self.x, self.table, self.targets, self.weights)

    def naive_with_bias(self, softcap: float | None, bias: np.ndarray | None = None):
        arrays = (self.x, self.table, self.targets, self.weights, self.bias if bias is None else bias)
        return with_gradients(naive_cross_entropy, softcap=softcap)(*arrays)


@pytest.fixture
def inputs(rng) -> Inputs:
    return Inputs(rng)


def with_gradients(function, options=OPTIONS, vocab_size=VOCAB, softcap=None):
    """(sums, (dx, dtable)), of half the loss, so that the incoming gradient is not one; also dbias, if there is one."""

    def half_loss(x, table, targets, weights, bias=None):
        sums = function(x, table, targets, weights, options, vocab_size=vocab_size, bias_V=bias, softcap=softcap)
        return 0.5 * sums.loss, sums

    def run(*args):
        differentiated = (0, 1, 4)[: len(args) - 2]
        (_, sums), gradients = jax.value_and_grad(half_loss, argnums=differentiated, has_aux=True)(*args)
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


def torchs(inputs: Inputs, softcap: float | None):
    """(sums, (dx, dtable, dbias)) by torch's cross_entropy, in float64."""
    torch = pytest.importorskip("torch")
    arrays = (array.astype(np.float64) for array in (inputs.x, inputs.table, inputs.bias))
    x, table, bias = (torch.tensor(array, requires_grad=True) for array in arrays)
    logits = (x @ table[:VOCAB].T + bias[:VOCAB]).reshape(-1, VOCAB)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    targets = torch.tensor(inputs.targets).long().reshape(-1)
    weights = torch.tensor(inputs.weights.astype(np.float64)).reshape(-1)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights
    z_loss = OPTIONS.z_loss * (torch.logsumexp(logits, -1) ** 2 * weights).sum()
    (0.5 * (nll.sum() + z_loss)).backward()
    sums = [value.detach().numpy() for value in (nll.sum() + z_loss, nll.sum(), z_loss, weights.sum())]
    return sums, (x.grad.numpy(), table.grad.numpy(), bias.grad.numpy())


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
def test_bias_and_softcap_are_torchs(mesh, inputs, softcap):
    expected_sums, expected_gradients = torchs(inputs, softcap)
    for sums, gradients in (
        inputs.naive_with_bias(softcap),
        run_on(mesh, with_gradients(linear_cross_entropy, softcap=softcap), *inputs.placed_with_bias()),
    ):
        np.testing.assert_allclose(sums, expected_sums, rtol=2e-6)
        assert_trees_close(gradients, expected_gradients, 3e-6)
        assert not np.any(np.asarray(gradients[2])[VOCAB:])
    assert [gradient.sharding.spec for gradient in gradients] == [P(BATCH, "tensor", None), TABLE, BIAS]
    for _, others in (inputs.naive_with_bias(6.0), inputs.naive_with_bias(softcap, np.roll(inputs.bias, 1))):
        for found, other in zip(gradients, others, strict=True):
            with pytest.raises(AssertionError):
                assert_trees_close(found, other, 1e-2)


def test_a_capped_target_that_is_far_from_likely_has_the_gradient_of_its_cap(one_device, inputs):
    """Its probability is less than float32 can tell from zero, and its logit does not move any more."""
    inputs.x *= 40
    cap = 60.0
    logits = inputs.x @ inputs.table[:VOCAB].T
    inputs.targets = logits.argmin(-1).astype(np.int32)
    assert np.all(np.ptp(cap * np.tanh(logits / cap), axis=-1) > 110)
    function = with_gradients(linear_cross_entropy, softcap=cap)
    _, gradients = run_on(one_device, function, *inputs.placed_with_bias())
    assert_trees_close(gradients, torchs(inputs, cap)[1], 1e-3)


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


def test_score_with_bias_and_softcap(mesh_2x2x2, inputs):
    def scores(x, table, targets, bias):
        return token_nll(x, table, targets, OPTIONS, vocab_size=VOCAB, bias_V=bias, softcap=SOFTCAP)

    x, table, targets, _, bias = inputs.placed_with_bias()
    nll = run_on(mesh_2x2x2, scores, x, table, targets, bias)
    logits = inputs.x @ inputs.table[:VOCAB].T + inputs.bias[:VOCAB]
    for cap, is_equal in ((SOFTCAP, True), (SOFTCAP + 1, False)):
        capped = jax.nn.log_softmax(cap * np.tanh(logits / cap))
        expected = -np.take_along_axis(capped, inputs.targets[..., None], axis=-1)[..., 0]
        assert np.allclose(nll, expected, rtol=1e-5, atol=1e-5) == is_equal


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
