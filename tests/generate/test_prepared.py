"""Parameters made ready for decoding: layers apart are the stack's own memory, and give the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.generate import prepared as module
from lmjax.generate.prepared import decoding, prepared, whole
from lmjax.hardware import Hardware
from tests import tiny
from tests.generate.case import CONFIG, Letters, parameters
from tests.generate.test_decode import PROMPTS, Generator, options_of


def placed(rng, shape=(1, 1, 1)):
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(*shape))
    return blueprint, parameters(blueprint, rng)[1]


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_layers_lie_in_the_memory_of_their_stack(rng, monkeypatch, shape):
    monkeypatch.setattr(module, "WORTH_COMPILING", 0)
    _, params = placed(rng, shape)
    ready = prepared(params, tiny.FLOAT32, 1)
    stack = params["segments"][0]["blocks"][0]["mlp"]["up"]["kernel"]
    layers = ready["segments"][0]["blocks"][0]["mlp"]["up"]["kernel"]
    assert len(layers) == stack.shape[0]
    for number, layer in enumerate(layers):
        assert layer.sharding.spec == jax.P(*stack.sharding.spec[1:])
        np.testing.assert_array_equal(layer, stack[number])
    shard, of_layer = stack.addressable_shards[-1].data, layers[0].addressable_shards[-1].data
    assert of_layer.unsafe_buffer_pointer() == shard.unsafe_buffer_pointer()
    assert ready["embed"]["table"] is params["embed"]["table"]


@pytest.mark.fast
def test_few_steps_and_other_platforms_keep_the_stack(rng):
    _, params = placed(rng)
    assert prepared(params, tiny.FLOAT32, 10) is params
    assert decoding(params, tiny.FLOAT32).scan_layers
    assert whole(params) == params
    layer_bytes = sum(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(params["segments"]))
    enough = -(-module.WORTH_COMPILING // layer_bytes)
    assert prepared(params, tiny.FLOAT32, enough - 1) is params
    apart = prepared(params, tiny.FLOAT32, enough)
    assert not decoding(apart, tiny.FLOAT32).scan_layers
    assert prepared(params, tiny.execution(hardware=Hardware("tpu")), enough) is params


@pytest.mark.fast
def test_what_products_read_is_cast_once(rng):
    _, params = placed(rng)
    ready = prepared(params, tiny.execution(compute_dtype=jnp.dtype("bfloat16")), 1)
    block = ready["segments"][0]["blocks"][0]
    assert ready["embed"]["table"].dtype == block["attention"]["out"]["kernel"].dtype == jnp.bfloat16
    assert block["attention_norm"]["scale"].dtype == ready["final_norm"]["scale"].dtype == jnp.float32


def test_layers_apart_give_the_tokens_and_probabilities_of_the_stack(rng, monkeypatch):
    blueprint, params = placed(rng)

    def generate():
        generator = Generator(blueprint, tiny.FLOAT32, Letters())
        found = generator.generate(params, PROMPTS, options_of(logprobs=1))
        return [(sample.tokens, [one.logprob for one in sample.logprobs or ()]) for (sample,) in found]

    expected = generate()
    monkeypatch.setattr(module, "WORTH_COMPILING", 0)
    compiled_apart = []
    monkeypatch.setattr(module, "_layers", lambda leaf, own=module._layers: compiled_apart.append(1) or own(leaf))
    found = generate()
    assert compiled_apart
    for (tokens, logprobs), (other_tokens, other) in zip(found, expected, strict=True):
        assert tokens == other_tokens
        np.testing.assert_allclose(logprobs, other, atol=2e-5)
