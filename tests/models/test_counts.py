import math

import jax
import numpy as np
import pytest

from lmjax.config.run import load_model
from lmjax.models.counts import parameter_count, training_flops
from lmjax.models.decoder import DecoderConfig
from lmjax.ops.attention_mask import Mask
from lmjax.train.state import abstract_decoder
from tests.models.switches import CONFIGS
from tests.tiny import CONFIG, mesh_of, with_changes

# The sums over the tensors of the published checkpoints.
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "mistral_7b": 7_241_732_096,
}


def tree_count(config: DecoderConfig) -> int:
    """Parameters of the tree that training makes, less the padding of its vocabulary tables."""
    _, params = abstract_decoder(config, mesh_of(1, 1, 1))
    rows = dict.fromkeys(("embed", "head", "head_bias"), config.vocab_size) | {"position": config.max_length}
    count = 0
    for path, leaf in jax.tree.leaves_with_path(params):
        table = path[0].key
        count += math.prod((rows[table], *leaf.shape[1:])) if table in rows else leaf.size
    return count


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    config = load_model(f"configs/models/{name}.yaml")
    assert parameter_count(config) == PUBLISHED[name] == tree_count(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"num_kv_heads": 1, "head_dim": 6},
        {"num_layers": 5, "layer_pattern": ("sliding", "sliding", "full"), "sliding_window": 3},
    ],
)
def test_parameter_count_is_the_size_of_the_tree(changes):
    check_count(with_changes(CONFIG, **changes))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count_with_every_switch_is_the_size_of_the_tree(name):
    check_count(CONFIGS[name])


def check_count(config: DecoderConfig) -> None:
    assert parameter_count(config) == tree_count(config)
    assert parameter_count(config) != tree_count(with_changes(config, mlp_dim=config.mlp_dim + 1))


@pytest.mark.fast
@pytest.mark.parametrize("length", [2, 5, 16])
def test_training_flops_are_those_of_every_product(length):
    """Counted from the tree's matrices and from the pairs that the masks let through."""
    config = with_changes(CONFIG, num_layers=3, layer_pattern=("sliding", "full"), sliding_window=4)
    window, whole = Mask(window=4), Mask()
    positions = np.arange(length)
    pairs = sum(int(mask.visible(positions[:, None] - positions).sum()) for mask in (window, whole, window))
    _, params = abstract_decoder(config, mesh_of(1, 1, 1))
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params["segments"]) if leaf.ndim > 2)
    matrices += config.vocab_size * config.embed_dim
    forward = 2 * matrices * length + 2 * 2 * pairs * config.num_heads * config.head_width
    assert training_flops(config, 7, length) == 3 * 7 * forward


@pytest.mark.fast
def test_values_of_another_width_count_as_they_are():
    """Latent attention: scores over keys of 10 dimensions, sums of values of 6, and the matrices of the tree."""
    config, length = with_changes(CONFIGS["latent"], layer_pattern=("full",), sliding_window=None), 7
    _, params = abstract_decoder(config, mesh_of(1, 1, 1))
    matrices = sum(
        leaf.size for path, leaf in jax.tree.leaves_with_path(params["segments"]) if path[-1].key == "kernel"
    )
    matrices += config.vocab_size * config.embed_dim
    pairs = config.num_layers * length * (length + 1) // 2
    forward = 2 * matrices * length + 2 * pairs * config.num_heads * (10 + 6)
    assert training_flops(config, 1, length) == 3 * forward


@pytest.mark.fast
def test_causal_attention_counts_half_of_the_square():
    """Against 6 N + 6 L T D a token: PaLM's figure (arXiv 2204.02311, appendix B) with half of its attention."""
    config, length = load_model("configs/models/llama3_8b.yaml"), 8192
    matmul_parameters = parameter_count(config) - config.vocab_size * config.embed_dim
    usual = 6 * matmul_parameters + 6 * config.num_layers * length * config.embed_dim
    assert training_flops(config, 1, length) / length == pytest.approx(usual, rel=1e-4)
