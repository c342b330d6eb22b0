"""The names and shapes of a decoder's parameters, without making any."""

import jax
from flax import nnx

from lmjax.models.decoder import Decoder, DecoderConfig


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path from the root, such as ``segments/0/blocks/0/mlp/up/kernel``."""
    abstract = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    params = nnx.to_pure_dict(nnx.split(abstract)[1])
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
