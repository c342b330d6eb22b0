"""config.json of the families: old and new spellings, absent keys, odd values; read as transformers reads the same."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from lmjax.config import load_model  # noqa: E402
from lmjax.convert.settings import WITHOUT_EFFECT, Settings, read_config_file  # noqa: E402
from lmjax.errors import InputError  # noqa: E402
from lmjax.models.decoder import DecoderConfig  # noqa: E402
from tests.convert.family_checks import check_same_settings, compared, read_values, resolved  # noqa: E402
from tests.convert.published import GEMMA3_1B, LLAMA3_1, PUBLISHED, QWEN2, SMOLLM2, phi3_5  # noqa: E402
from tests.models.families import gemma, llama, moe  # noqa: E402

MODELS = Path(__file__).parents[2] / "configs" / "models"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2")
TWINS = llama.FAMILIES | gemma.FAMILIES | moe.FAMILIES
TWINS = {name: twin for name, twin in TWINS.items() if name not in ("granite", "dbrx")}
"""Not DBRX, of whose dictionaries transformers reads less; see test_configs_moe.py."""
REFUSED = "refused"
NOT_READ = {
    "max_window_layers": "without layer_types, and with a window",
    "_sliding_window_pattern": "never",
    "original_max_position_embeddings": "with a scaling, where it counts and not the entry there",
}
"""Keys without an effect in the tiny models, and when they have one."""
SCALINGS = {
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16},
    "yarn without a first length": {"rope_type": "yarn", "factor": 4.0},
    "yarn with its own factor of attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    "yarn with two weights": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    "llama3": LLAMA3_1["rope_scaling"],
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "factor": 8.0},
    "both names of the kind": {"type": "linear", "rope_type": "linear", "factor": 4.0},
    "none": {"rope_type": "default"},
}


def by_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same config.json as transformers 5 writes it."""
    return their_config(values).to_dict()


def their_config(values: Mapping[str, Any]) -> Any:
    settings = copy.deepcopy(dict(values))  # which transformers changes
    return transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)


def outcome(values: Mapping[str, Any]) -> DecoderConfig | str:
    try:
        return resolved(read_values(values)[1])
    except InputError:
        return REFUSED


def settings_of(name: str) -> dict[str, Any]:
    """The config.json of a tiny model."""
    twin = TWINS[name]
    return compared(twin.model(twin.config).config)


def others(value: Any) -> list[Any]:
    """Values of the same kind, and for a dictionary those with one entry changed."""
    match value:
        case None:
            return [3]
        case bool():
            return [not value]
        case int() | float():
            return [2 * value]
        case str():
            return ["another"]
        case []:
            return [[1]]
        case list():
            return [value[::-1] + value[:1]]
        case dict():
            return [value | {key: other} for key, one in value.items() if key not in NOT_READ for other in others(one)]
        case _:
            raise TypeError(value)


def published() -> dict[str, dict[str, Any]]:
    scaling = load_model(str(MODELS / "phi3_5_mini_128k.yaml")).rope_scaling
    return PUBLISHED | {"phi3_5_mini_128k": phi3_5(scaling.short_factors, scaling.long_factors)}


def test_published_files_are_what_the_yaml_files_of_configs_say():
    for name, values in published().items():
        expected = resolved(load_model(str(MODELS / f"{name}.yaml")))
        assert resolved(read_values(values)[1]) == expected, name
        assert resolved(read_values(by_transformers(values))[1]) == expected, name


def test_published_files_of_smollm2_are_read():
    config = read_values(SMOLLM2)[1]
    assert (config.num_heads, config.kv_heads, config.head_width, config.rope_theta) == (9, 3, 64, 100_000.0)
    assert config.tie_embeddings


def test_what_is_written_of_published_files_is_the_same_model_to_transformers():
    for name, values in published().items():
        family, config = read_values(values)
        written = {"model_type": family.model_type, **family.write_config(config)}
        assert resolved(read_values(written)[1]) == resolved(config), name
        read = by_transformers({"model_type": family.model_type}).keys() - WITHOUT_EFFECT - NOT_READ.keys()
        if config.sliding_window is None:  # as of Phi-3.5, whose window is longer than its longest row
            read -= {"sliding_window"}
        settings = [compared(their_config(each)) for each in (written, values)]
        found, expected = ({key: each for key, each in one.items() if key in read} for one in settings)
        check_same_settings(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_mean_what_they_mean_to_transformers(name):
    values = {"model_type": name}
    assert outcome(values) == outcome(by_transformers(values)) != REFUSED


@pytest.mark.parametrize("name", TWINS)
def test_each_key_may_be_absent(name):
    values = settings_of(name)
    for key in values.keys() - {"model_type"} - WITHOUT_EFFECT:
        less = {other: value for other, value in values.items() if other != key}
        try:
            expected = outcome(by_transformers(less))
        except Exception:  # noqa: BLE001 (whatever transformers raises where the rest is no model)
            expected = REFUSED
        assert outcome(less) == expected, key


@pytest.mark.parametrize("name", TWINS)
def test_each_key_changes_the_decoder_or_is_refused_where_it_changes(name):
    values = settings_of(name)
    original = outcome(values)
    assert original != REFUSED
    unread = WITHOUT_EFFECT | NOT_READ.keys() | {"model_type"}
    if values.get("use_sliding_window") is False:
        unread |= {"use_sliding_window", "sliding_window"}  # one by itself, that is
    if values.get("decoder_sparse_step") == 1 and not values["mlp_only_layers"]:
        unread |= {"intermediate_size"}  # of dense layers
    if "kv_lora_rank" in values:  # the first two are computed, the third counts layers that are left out
        unread |= {"head_dim", "qk_head_dim", "num_nextn_predict_layers"}
    for key in values.keys() - unread:
        for other in others(values[key]):
            assert outcome(values | {key: other}) != original, (key, other)


@pytest.mark.parametrize("key", ["brand_new_key", "quantization_config", "rope_interleaved", "sliding_window"])
def test_keys_that_a_family_does_not_have_are_refused_by_name(key):
    values = settings_of("llama")
    with pytest.raises(InputError, match=key):
        read_values(values | {key: {"bits": 4}})
    assert outcome(values | {key: None}) == outcome(values) or key == "rope_interleaved"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "hidden_act", "quick_gelu"),
        ("llama", "hidden_size", "32"),
        ("llama", "rope_scaling", "linear"),
        ("phi3 4k", "sliding_window", "4"),
        ("llama", "num_hidden_layers", None),
        ("llama", "mlp_bias", 1),
        ("mistral", "layer_types", ["full_attention"]),
        ("qwen2", "layer_types", ["full_attention", "chunked_attention"]),
        ("qwen2", "layer_types", ["full_attention"] * 3),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen2", "use_mrope", True),
        ("gemma", "hidden_activation", "gelu"),
        ("gemma", "use_bidirectional_attention", True),
        ("gemma2", "hidden_activation", "silu"),
        ("gemma2", "sliding_window", None),
        ("gemma3", "sliding_window_pattern", "2"),
        ("phi3 4k", "lm_head_bias", True),
        ("phi3 4k", "full_attn_mod", 2),
    ],
)
def test_values_that_the_decoder_cannot_have_are_refused_by_name(name, key, value):
    with pytest.raises(InputError, match=rf"config\.json: .*{key}"):
        read_values(settings_of(name) | {key: value})


@pytest.mark.parametrize("name", SCALINGS)
def test_each_spelling_of_a_scaling_is_read_as_transformers_reads_it(name):
    base = LLAMA3_1 | {"rope_theta": 2000.0, "max_position_embeddings": 4096, "rope_scaling": SCALINGS[name]}
    config = read_values(base)[1]
    assert config.rope_theta == 2000
    assert (config.rope_scaling is None) == (name == "none")
    assert read_values(by_transformers(base))[1].rope_scaling == config.rope_scaling
    nested = {"rope_theta": 2000.0, **SCALINGS[name]}
    rest = {key: value for key, value in base.items() if not key.startswith("rope_")}
    assert read_values(rest | {"rope_parameters": nested})[1] == config


@pytest.mark.parametrize("weights", [(0.7, 1.0), (1.0, 1.0), (0.0, 1.0)])
def test_the_weights_of_yarn_are_the_factor_that_transformers_makes_of_them(weights):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    scaling |= dict(zip(("mscale", "mscale_all_dim"), weights, strict=True))
    values = LLAMA3_1 | {"rope_scaling": scaling}
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](their_config(values))
    found = read_values(values)[1].rope_scaling
    assert found.frequencies(500_000.0, 128, None)[1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "proportional", "factor": 2.0},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": "4"},
        {"rope_type": "linear", "factor": 0.5},
        {"rope_type": "linear", "factor": 4.0, "low_freq_factor": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0, "mscale_of_none": 1.0},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3, "attention_factor": 1.0},
        {"mrope_section": [16, 24, 24]},
    ],
)
def test_scalings_that_are_not_known_or_not_whole_are_refused(scaling):
    with pytest.raises(InputError, match=r"config\.json: .*(rope|scaling)"):
        read_values(LLAMA3_1 | {"rope_scaling": scaling})


def test_gemma_3_reads_its_two_thetas_in_either_spelling():
    old = GEMMA3_1B | {
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8},
    }
    config = read_values(old)[1]
    assert (config.rope_theta, config.rope_theta_sliding) == (5e5, 2e4)
    assert config.rope_scaling.factor == 8
    new = by_transformers(old)
    assert new["rope_parameters"].keys() == {"full_attention", "sliding_attention"}
    assert outcome(new) == outcome(old)
    new["rope_parameters"]["sliding_attention"] |= {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(InputError, match="sliding_attention have rope_type linear"):
        read_values(new)
    with pytest.raises(InputError, match="one entry for the layers"):
        read_values(new | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})


def test_layers_from_a_number_on_have_qwens_window():
    values = QWEN2 | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 21}
    config = read_values(values)[1]
    assert config.layer_pattern == ("full",) * 21 + ("sliding",) * 7
    assert outcome(by_transformers(values)) == outcome(values)
    assert read_values(values | {"max_window_layers": 28})[1].sliding_window is None
    assert read_values(values | {"max_window_layers": 0})[1].layer_pattern == ("sliding",)


def test_sliding_layers_that_see_all_keep_their_own_theta():
    config = read_values(GEMMA3_1B | {"max_position_embeddings": 512})[1]
    assert config.layer_pattern == ("sliding",) * 5 + ("full",)
    assert (config.sliding_window, config.rope_theta_sliding) == (512, 10_000)


def test_a_file_that_is_no_config_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        read_config_file(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="found list"):
        read_config_file(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_config_file(tmp_path)


def test_a_family_that_is_not_known_is_named_with_those_that_are():
    with pytest.raises(InputError, match=r"brand_new.*gemma2.*llama"):
        read_values({"model_type": "brand_new"})


def test_two_names_of_one_number_have_to_agree():
    settings = Settings({"n_embd": 8, "hidden_size": 9}, "config.json")
    with pytest.raises(InputError, match="hidden_size is 9 and n_embd is 8"):
        settings.rename({"hidden_size": "n_embd"})
