"""The operations compiled for eight TPU chips that are not here: it fits, it shards, and the kernels are accepted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmjax.compat import temporary_bytes
from lmjax.hardware import Hardware
from lmjax.mesh import AXES
from lmjax.ops.attention import attention
from lmjax.ops.attention_mask import Mask
from lmjax.ops.cross_entropy import LossOptions, linear_cross_entropy
from lmjax.ops.lookup import lookup
from lmjax.ops.projection import project
from tests.ops.sharded import BATCH

ROWS, LENGTH, EMBED, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 2048, 1024, 16, 2, 64, 32_000
CHUNK = 512
V5P = Hardware("tpu", "v5p")
WHOLE, BY_HEAD, RESIDUAL = P(BATCH, None, None), P(BATCH, None, "tensor", None), P(BATCH, "tensor", None)


def compiled(num_kv_heads: int):
    """Value and gradients of lookup, attention and loss, bf16, on the mesh (2, 2, 1, 2) of v5p."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices
    mesh = Mesh(np.array(devices).reshape(2, 2, 1, 2), AXES, axis_types=(AxisType.Explicit,) * 4)
    kv_heads = "tensor" if num_kv_heads % 2 == 0 else None

    def loss(parameters, tokens, segment_ids):
        x = lookup(parameters["table"], tokens, jnp.dtype("bfloat16"))
        whole = jax.sharding.reshard(x, WHOLE)
        q = project("btd,dnh->btnh", whole, parameters["query"], BY_HEAD, reduce_f32=False)
        k = project("btd,dkh->btkh", whole, parameters["key"], P(BATCH, None, kv_heads, None), reduce_f32=True)
        out = attention(q, k, k, mask=Mask(window=700), segment_ids=segment_ids, scale=HEAD_DIM**-0.5, hardware=V5P)
        x += project("btnh,nhd->btd", out, parameters["out"], RESIDUAL, reduce_f32=False)
        weights = jnp.ones_like(tokens, jnp.float32)
        options = LossOptions(z_loss=1e-4, chunk_tokens=CHUNK)
        return linear_cross_entropy(x, parameters["table"], tokens, weights, options, vocab_size=VOCAB - 7).loss

    with jax.set_mesh(mesh):

        def shape(spec, *sizes, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

        parameters = {
            "table": shape(P("tensor", ("fsdp", "expert")), VOCAB, EMBED),
            "query": shape(P(("fsdp", "expert"), "tensor"), EMBED, HEADS, HEAD_DIM),
            "key": shape(P(("fsdp", "expert"), kv_heads), EMBED, num_kv_heads, HEAD_DIM),
            "out": shape(P("tensor", None, ("fsdp", "expert")), HEADS, HEAD_DIM, EMBED),
        }
        rows = shape(P(BATCH), ROWS, LENGTH, dtype=jnp.int32)
        traced = jax.jit(jax.value_and_grad(loss)).trace(parameters, rows, rows)
        return traced.lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.slow
@pytest.mark.parametrize("num_kv_heads", [KV_HEADS, 1])
def test_lookup_attention_and_loss_compile_for_v5p(num_kv_heads):
    pytest.importorskip("libtpu")
    program = compiled(num_kv_heads)
    text = program.as_text()
    assert {"fwd", "dq", "dkv"} <= set(re.findall(r"splash_mha_([a-z]+)", text))
    rows, vocab = ROWS // 4, VOCAB // 2  # of a device
    assert has_array(text, CHUNK, vocab)
    assert not has_array(text, rows * LENGTH, vocab)
    assert not has_array(text, LENGTH, LENGTH)
    assert "reduce-scatter" in text
    assert temporary_bytes(program) < 4 * rows * LENGTH * vocab * 4


def has_array(text: str, rows: int, columns: int) -> bool:
    """Whether the program has an array whose last two dimensions are these, in any order of storage."""
    return re.search(rf"\[(\d+,)*({rows},{columns}|{columns},{rows})\]", text) is not None
