import math

import jax
import pytest

from lmjax.errors import InputError
from lmjax.models.remat import RematConfig
from lmjax.train.step import DeviceBatch, loss_sums, row_keys
from tests import tiny
from tests.tiny import CONFIG, LOSS

NONE = RematConfig(policy="none")
POLICIES = {
    "full": RematConfig(policy="full"),
    "dots": RematConfig(policy="dots"),
    "attention": RematConfig(policy="attention"),
    "save": RematConfig(policy="save", save=("query", "mlp_hidden")),
    "offload": RematConfig(policy="save", save=("attention_out",), offload=("block_input", "mlp_up")),
}


@pytest.fixture(scope="module")
def problem(request):
    """Parameters, and the loss as a function of them and of a remat policy; with dropout, if asked for."""
    rng = tiny.generator(request)
    blueprint = tiny.blueprint_of(tiny.with_changes(CONFIG, dropout=0.2), tiny.mesh_of(1, 1, 1))
    params = tiny.state_of(blueprint, tiny.random_params(blueprint, rng)).params
    batch = DeviceBatch(*tiny.by_rows(blueprint.mesh, *(field[:2] for field in tiny.packed_batch(rng, CONFIG))))

    def loss(params, remat, scan_layers=True, dropout=False):
        execution = tiny.execution(remat=remat, scan_layers=scan_layers)
        keys = row_keys(jax.random.key(3), 1, 2)[0] if dropout else None
        return loss_sums(blueprint.decoder(params), batch, execution, LOSS, keys)[0].loss

    with jax.set_mesh(blueprint.mesh):
        yield params, loss


@pytest.fixture(scope="module")
def unsaved(problem):
    """The loss and its gradient without any remat."""
    params, loss = problem
    return jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, NONE)


@pytest.mark.parametrize(
    "name", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in POLICIES if name != "full")]
)
def test_every_policy_gives_the_same_gradients(name, problem, unsaved):
    params, loss = problem
    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, POLICIES[name])
    assert abs(float(value - unsaved[0])) <= 1e-6 * abs(float(unsaved[0]))
    tiny.assert_trees_close(grads, unsaved[1], 1e-5)
    with pytest.raises(AssertionError):
        tiny.assert_trees_close(jax.tree.map(lambda leaf: leaf * 1.001, grads), unsaved[1], 1e-5)


@pytest.mark.slow
def test_the_backward_pass_zeroes_what_the_forward_pass_zeroed(problem, unsaved):
    params, loss = problem
    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2, 3))
    value, expected = gradient(params, NONE, True, True)
    assert abs(float(value - unsaved[0])) > 1e-3 * abs(float(unsaved[0]))
    for name, policy in POLICIES.items():
        found, grads = gradient(params, policy, True, True)
        assert abs(float(found - value)) <= 1e-6 * abs(float(value)), name
        tiny.assert_trees_close(grads, expected, 1e-5)


def residual_bytes(loss, params, remat, scan_layers) -> int:
    """What the forward pass keeps for the backward pass, by its shapes: nothing is computed."""
    backward = jax.eval_shape(lambda params: jax.vjp(lambda p: loss(p, remat, scan_layers), params)[1], params)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_policies_keep_what_they_say(scan_layers, problem):
    params, loss = problem
    policies = {"none": NONE, **POLICIES}
    kept = {name: residual_bytes(loss, params, remat, scan_layers) for name, remat in policies.items()}
    tokens = 2 * tiny.LENGTH * CONFIG.num_layers
    stream = 4 * tokens * CONFIG.embed_dim
    heads = 4 * tokens * CONFIG.num_heads * CONFIG.head_width
    hidden = 4 * tokens * CONFIG.mlp_dim
    assert kept["attention"] - kept["full"] == heads
    assert kept["save"] - kept["full"] == heads + hidden
    # query, key, value, out, gate and up; nothing within a block depends on down.
    assert kept["dots"] - kept["full"] == 3 * heads + stream + 2 * hidden
    assert kept["none"] > kept["dots"] + 3 * stream


@pytest.mark.parametrize("scan_layers", [True, False])
def test_unrolled_blocks_are_kept_from_being_merged_with_their_recomputation(scan_layers, problem):
    """Without barriers, on TPU six unrolled blocks under full remat took the memory of no remat, 3.3 times as much."""
    params, loss = problem
    gradient = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    lowered = gradient.lower(params, POLICIES["full"], scan_layers).as_text()
    of_the_loss = 2  # logits' gradients are computed once, and the table's is summed before layers go backward
    assert lowered.count("optimization_barrier") == of_the_loss + (0 if scan_layers else CONFIG.num_layers)


@pytest.mark.parametrize("policy", ["full", "attention"])
@pytest.mark.parametrize("pattern", [("full",), ("sliding", "full")])
def test_blocks_of_a_pattern_are_computed_again_one_after_the_other(pattern, policy, request):
    """Without barriers, a TPU's program had the hidden layers of both blocks of a pattern at once."""
    window = 5 if "sliding" in pattern else None
    config = tiny.with_changes(CONFIG, num_layers=4, layer_pattern=pattern, sliding_window=window)
    rng = tiny.generator(request)
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    batch = DeviceBatch(*tiny.by_rows(blueprint.mesh, *(field[:2] for field in tiny.packed_batch(rng, config))))

    def loss(params):
        return loss_sums(blueprint.decoder(params), batch, tiny.execution(remat=POLICIES[policy]), LOSS)[0].loss

    with jax.set_mesh(blueprint.mesh):
        lowered = jax.jit(jax.grad(loss)).lower(blueprint.params).as_text()
    assert lowered.count("optimization_barrier") == 2 + (0 if len(pattern) == 1 else len(pattern))


def test_full_computes_the_forward_pass_again(problem):
    params, loss = problem

    def products(remat: RematConfig) -> int:
        return str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, remat)).count("dot_general[")

    block = 7 + 2  # weights, scores and weighted values
    assert products(POLICIES["full"]) - products(NONE) >= block - 2  # the last products' results are not needed again
    assert products(POLICIES["full"]) > products(POLICIES["dots"]) > products(NONE)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "minimal"}, "'none', 'full', 'dots', 'attention' or 'save'"),
        ({"policy": "save"}, "both are empty"),
        ({"policy": "full", "save": ("query",)}, "with policy save only"),
        ({"policy": "none", "offload": ("query",)}, "with policy save only"),
        ({"policy": "save", "save": ("queries",)}, "'attention_out'"),
        ({"policy": "save", "save": ("query",), "offload": ("query",)}, "named twice"),
    ],
)
def test_unknown_and_useless_names_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        RematConfig(**fields)
