"""Parameters of the committed architectures are those of the published checkpoints."""

import dataclasses
from pathlib import Path

import jax
import pytest

from lmjax.config.run import load_model
from lmjax.models.counts import parameter_count
from lmjax.models.decoder import DecoderConfig
from lmjax.nn.embed import table_rows
from lmjax.train.state import abstract_decoder
from tests.models.test_counts import PUBLISHED as EARLIER
from tests.tiny import mesh_of

MODELS = Path(__file__).parents[2] / "configs" / "models"

# The sums over the tensors of the checkpoints, tied tables once.
PUBLISHED = {
    "bloom_176b": 176_247_271_424,
    "bloom_560m": 559_214_592,
    "dbrx": 131_596_523_520,
    "deepseek_v3": 671_026_419_200,
    "falcon_40b": 41_303_293_952,
    "falcon_7b": 6_921_720_704,
    "falcon_rw_1b": 1_311_625_216,
    "gemma2_27b": 27_227_128_320,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gpt2": 124_439_808,
    "gpt2_xl": 1_557_611_200,
    "gpt_neox_20b": 20_554_567_680,
    "gptj_6b": 6_050_882_784,
    "llama1_65b": 65_285_660_672,
    "llama1_7b": 6_738_415_616,
    "llama3_1_405b": 405_853_388_800,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b_v0_2": 7_241_732_096,
    "mixtral_8x22b": 140_620_634_112,
    "mixtral_8x7b": 46_702_792_704,
    "mpt_7b": 6_649_286_656,
    "olmo2_1b": 1_484_916_736,
    "olmo2_32b": 32_234_279_936,
    "olmo2_7b": 7_298_617_344,
    "olmoe_1b_7b": 6_919_161_856,
    "opt_125m": 125_239_296,
    "opt_6_7b": 6_658_473_984,
    "phi2": 2_779_683_840,
    "phi3_5_mini_128k": 3_821_079_552,
    "phi3_mini_4k": 3_821_079_552,
    "qwen2_0_5b": 494_032_768,
    "qwen2_7b": 7_615_616_512,
    "qwen2_moe_a2_7b": 14_315_784_192,
    "qwen3_0_6b": 596_049_920,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_8b": 8_190_735_360,
    "starcoder": 15_517_456_384,
}
# As their authors state them: billions in all, and those that a token goes through.
ROUNDED = {
    "dbrx": (132, 36),
    "deepseek_v3": (671, 37),
    "mixtral_8x22b": (141, 39),
    "mixtral_8x7b": (46.7, 12.9),
    "olmoe_1b_7b": (6.9, 1.3),
    "qwen2_moe_a2_7b": (14.3, 2.7),
    "qwen3_30b_a3b": (30.5, 3.3),
}
NOT_PUBLISHED = {"switch_base_decoder": 3_705_785_088}
# OPT's table of positions begins with two rows that are never read.
UNREAD_ROWS = {"opt_125m": 2, "opt_6_7b": 2}


def tree_count(config: DecoderConfig) -> int:
    """Parameters of the tree that training makes, less the padding rows of its tables."""
    _, params = abstract_decoder(config, mesh_of(1, 1, 1))
    numbers_a_token = config.embed_dim * (1 if config.tie_embeddings else 2) + config.head_bias
    padding = (table_rows(config.vocab_size) - config.vocab_size) * numbers_a_token
    if config.position == "learned":
        padding += (table_rows(config.max_length) - config.max_length) * config.embed_dim
    return sum(leaf.size for leaf in jax.tree.leaves(params)) - padding


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    config = load_model(str(MODELS / f"{name}.yaml"))
    assert parameter_count(config) + UNREAD_ROWS.get(name, 0) * config.embed_dim == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_of_experts_are_those_that_their_authors_state(name):
    """Rounded or cut off at the last digit that they state."""
    config = load_model(str(MODELS / f"{name}.yaml"))
    counts = parameter_count(config), parameter_count(config, active=True)
    assert counts[1] < counts[0]
    for count, stated in zip(counts, ROUNDED[name], strict=True):
        last_digit = 1 if isinstance(stated, int) else 0.1
        assert -last_digit / 2 <= count / 1e9 - stated < last_digit


def test_active_parameters_are_those_of_a_decoder_with_the_chosen_experts_alone():
    for name in (*ROUNDED, *NOT_PUBLISHED):
        config = load_model(str(MODELS / f"{name}.yaml"))
        moe = config.moe
        assert moe is not None
        chosen = dataclasses.replace(moe, num_experts=moe.experts_per_token, groups=1, top_groups=1)
        has_bias = moe.choice_bias_rate is not None
        routers = (moe.num_experts - moe.experts_per_token) * (config.embed_dim + has_bias)
        routers *= sum(block.mlp == "moe" for block in config.blocks)
        alone = parameter_count(dataclasses.replace(config, moe=chosen)) + routers
        assert parameter_count(config, active=True) == alone


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED | NOT_PUBLISHED)
def test_parameter_count_is_the_size_of_the_tree(name):
    config = load_model(str(MODELS / f"{name}.yaml"))
    assert parameter_count(config) == tree_count(config)


def test_every_committed_architecture_has_a_published_count():
    assert {file.stem for file in MODELS.glob("*.yaml")} == PUBLISHED.keys() | NOT_PUBLISHED.keys() | EARLIER.keys()
