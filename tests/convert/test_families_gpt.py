"""GPT-2 and its relatives, and the families with ALiBi, both ways, against transformers."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax.convert.source import open_source
from lmjax.errors import InputError
from lmjax.nn.rope_scaling import LinearScaling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402
from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # noqa: E402
from transformers.models.falcon import modeling_falcon  # noqa: E402

from tests.convert.family_checks import (  # noqa: E402
    TOLERANCE,
    Example,
    check_family,
    check_logits,
    make_example,
    read,
    read_values,
    resolved,
    their_logits,
)
from tests.convert.published_gpt import PUBLISHED  # noqa: E402
from tests.models.families import alibi, gpt  # noqa: E402
from tests.models.families.family import Family as Twin  # noqa: E402


def published(twin: Twin, **settings: Any) -> Twin:
    """A twin with further ``settings`` of transformers, and what published files of the family say: their name for the
    approximation of GELU by tanh, and the length of BLOOM."""

    def model(config):
        theirs = twin.model(config).config
        for key in {"activation_function", "hidden_act"} & theirs.to_dict().keys():
            if config.activation == "gelu_tanh" and theirs.model_type != "gpt_bigcode":
                setattr(theirs, key, "gelu_new")
        if theirs.model_type == "bloom":
            theirs.seq_length = config.max_length
        for key, value in settings.items():
            setattr(theirs, key, value)
        return transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation=theirs._attn_implementation)

    return dataclasses.replace(twin, model=model)


FAMILIES = gpt.FAMILIES | alibi.FAMILIES
THREE_HEADS = {"num_heads": 3, "embed_dim": 24}
GRID = [
    pytest.param(published(family), changes, id=f"{name}, {case}")
    for name, family in FAMILIES.items()
    for case, changes in family.grid.items()
]


def case(name: str, what: str, changes: dict[str, Any], perturbed: str | None = None, **settings: Any):
    """One more of the grid, in which another tensor is ``perturbed``."""
    twin = published(FAMILIES[name], **settings)
    twin = dataclasses.replace(twin, perturbed=perturbed or twin.perturbed)
    return pytest.param(twin, changes, id=f"{name}, {what}")


MORE = [
    case("gpt2", "three heads", {**THREE_HEADS, "activation": "gelu"}),
    case("gpt2", "scores as they are", {"query_scale": 1.0}, scale_attn_weights=False),
    case("starcoder", "three heads, untied", {**THREE_HEADS, "tie_embeddings": False}),
    case("starcoder", "scores as they are", {"query_scale": 1.0}, scale_attn_weights=False),
    case("gpt-j", "three heads, tied", {"num_heads": 3, "embed_dim": 48, "tie_embeddings": True}),
    case("gpt-j", "58 of 100", {"num_heads": 2, "embed_dim": 200, "rope_fraction": math.nextafter(0.58, 1)}),
    case(
        "gpt-neox",
        "three heads, scaled positions",
        {"num_heads": 3, "embed_dim": 48, "rope_scaling": LinearScaling(factor=2.0)},
    ),
    case(
        "gpt-neox",
        "attention without biases",
        {"qkv_bias": False, "attention_out_bias": False},
        "dense_h_to_4h.bias",
        attention_bias=False,
    ),
    case("opt", "three heads, untied", {**THREE_HEADS, "tie_embeddings": False}),
    case("phi2", "three heads, tied", {"num_heads": 3, "embed_dim": 60, "tie_embeddings": True}),
    case("phi2", "whole heads turn", {"rope_fraction": 1.0}),
    case("falcon 7b", "three heads", {**THREE_HEADS, "mlp_dim": 96}),
    case("falcon 7b", "multi-head", {"num_kv_heads": None}),
    case("falcon 40b", "one norm", {"residual": "parallel_shared_norm"}, "input_layernorm.weight"),
    case("falcon rw", "rotary, multi-query", {"position": "rope", "alibi_scale": 1.0, "num_kv_heads": 1}),
    case("mpt", "untied", {"tie_embeddings": False}),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_in_and_out(name, rng, tmp_path):
    check_family(published(FAMILIES[name]), {}, rng, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("twin", "changes"), GRID + MORE)
def test_a_family_goes_in_and_out_throughout_its_grid(twin, changes, rng, tmp_path):
    check_family(twin, changes, rng, tmp_path)


@pytest.mark.slow
def test_falcon_rw_is_that_of_transformers_with_biases_that_are_not_rounded(rng, tmp_path, monkeypatch):
    """transformers takes ALiBi in bfloat16, which has neither the slopes of 12 heads nor distances above 256."""
    twin = dataclasses.replace(published(FAMILIES["falcon rw"]), length=300)
    changes = {"num_heads": 12, "embed_dim": 96, "max_length": 300}
    example = make_example(twin, changes, rng, tmp_path)
    rounded = their_logits(example.model, example.rows)
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", build_alibi_tensor)
    expected = check_logits(read(example.directory), example)
    assert np.abs(rounded[-1] - expected[-1]).max() > 100 * TOLERANCE


Tensors = dict[str, Any]


def without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def with_buffers(layer: str, *names: str) -> Callable[[Tensors], Tensors]:
    """Masks and frequencies of every layer, as older versions wrote them."""
    return lambda tensors: (
        tensors
        | {f"{layer.format(i)}.{name}": torch.ones(1, 1, 4, 4, dtype=torch.bool) for i in (0, 1) for name in names}
    )


def with_head(table: str) -> Callable[[Tensors], Tensors]:
    """The tied table a second time."""
    return lambda tensors: tensors | {"lm_head.weight": tensors[table].clone()}


def read_tensors(example: Example) -> Tensors:
    files = example.directory.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def save(tensors: Tensors, example: Example, directory: Path) -> None:
    directory.mkdir()
    shutil.copy(example.directory / "config.json", directory)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


MASKS = ("attn.bias", "attn.masked_bias")
VARIANTS = {
    "gpt2, without prefix": ("gpt2", without("transformer.")),
    "gpt2, masks": ("gpt2", lambda tensors: with_buffers("h.{}", *MASKS)(without("transformer.")(tensors))),
    "starcoder": ("starcoder", with_buffers("transformer.h.{}", *MASKS)),
    "gpt-j": ("gpt-j", with_buffers("transformer.h.{}", *MASKS)),
    "gpt-neox": (
        "gpt-neox",
        with_buffers("gpt_neox.layers.{}.attention", "bias", "masked_bias", "rotary_emb.inv_freq"),
    ),
    "opt, without prefix": ("opt", without("model.")),
    "opt, head": ("opt", with_head("model.decoder.embed_tokens.weight")),
    "falcon": ("falcon 7b", with_head("transformer.word_embeddings.weight")),
    "bloom": ("bloom", without("transformer.")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_published_files_are_read_as_transformers_reads_them(variant, rng, tmp_path):
    name, change = VARIANTS[variant]
    example = make_example(published(FAMILIES[name]), {}, rng, tmp_path)
    tensors = read_tensors(example)
    changed, other = change(tensors), tmp_path / "other"
    assert changed.keys() != tensors.keys()
    save(changed, example, other)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(other, output_loading_info=True)
    assert not report["missing_keys"] | report["mismatched_keys"]
    for key, parameter in example.model.named_parameters():
        assert torch.equal(model.get_parameter(key), parameter), key
    expected, found = open_source(example.directory), open_source(other)
    assert (found.config, found.leaves.keys()) == (expected.config, expected.leaves.keys())
    for path in expected.leaves:
        np.testing.assert_array_equal(found.read(path), expected.read(path), err_msg=path)


def test_a_tensor_beside_the_masks_is_refused(rng, tmp_path):
    example = make_example(published(FAMILIES["gpt2"]), {}, rng, tmp_path)
    other = tmp_path / "other"
    save(read_tensors(example) | {"transformer.h.0.attn.scale": torch.ones(3)}, example, other)
    with pytest.raises(InputError, match=r"transformer\.h\.0\.attn\.scale"):
        open_source(other)


@pytest.mark.fast
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_the_same_once_transformers_has_read_them(name):
    theirs = transformers.AutoConfig.for_model(**PUBLISHED[name])
    assert resolved(read_values(theirs.to_dict())[1]) == resolved(read_values(PUBLISHED[name])[1])


@pytest.mark.fast
@pytest.mark.parametrize("model_type", sorted({values["model_type"] for values in PUBLISHED.values()}))
def test_keys_that_are_absent_mean_what_they_mean_in_transformers(model_type):
    theirs = transformers.AutoConfig.for_model(model_type)
    assert resolved(read_values({"model_type": model_type})[1]) == resolved(read_values(theirs.to_dict())[1])
