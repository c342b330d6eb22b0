"""``lmjax convert``, and commands on a Hugging Face directory: one model in every form gives the same numbers."""

import json
import shutil

import numpy as np
import pytest

from lmjax.config import load_model
from tests.command import lmjax
from tests.convert.tiny_model import SETTINGS, write_model

TEXT = "Some text — to be scored.\n"
GREEDY = ["--prompt", "abc", "--max-tokens", "6", "--temperature", "0", "--json"]


@pytest.fixture(scope="module")
def source(request, tmp_path_factory):
    rng = np.random.default_rng(request.config.getoption("--seed"))
    return write_model(tmp_path_factory.mktemp("source") / "hf", rng)


@pytest.fixture(scope="module")
def imported(source):
    out = source.parent / "imported"
    assert lmjax("convert", "import", str(source), str(out)) == 0
    return out


def told(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert lmjax(*map(str, arguments)) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    assert lmjax(*map(str, arguments)) == 2
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_an_imported_model_is_the_same_and_its_export_too(source, imported, tmp_path, capsys):
    exported = tmp_path / "exported"
    assert lmjax("convert", "export", str(imported), str(exported)) == 0
    for one, other in ((imported, source), (exported, source), (imported, imported / "checkpoints" / "0")):
        found = told(capsys, "convert", "check", one, other, "--json")
        assert found == {"tensors": 21, "differing": [], "config": []}
    assert json.loads((exported / "config.json").read_text()) == SETTINGS
    assert (exported / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert load_model(str(imported / "model.yaml")).rope_theta == 100.0


def test_every_form_scores_and_continues_a_text_alike(source, imported, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    scores = [told(capsys, "evaluate", model, "--text", tmp_path / "text", "--json") for model in (source, imported)]
    assert scores[0] == scores[1]
    assert scores[0]["tokens"] == len(TEXT.encode()), "the first of them after BOS, which is not scored"
    found = [told(capsys, "generate", model, *GREEDY) for model in (source, imported)]
    assert found[0] == found[1]
    assert found[0]["samples"][0]["tokens"] == 6
    other = write_model(tmp_path / "other", np.random.default_rng(99))
    assert told(capsys, "evaluate", other, "--text", tmp_path / "text", "--json") != scores[0]


def test_a_text_ends_at_a_token_that_generation_config_names(source, tmp_path, capsys):
    whole = told(capsys, "generate", source, *GREEDY)["samples"][0]
    assert whole["finish_reason"] == "length"
    ending = shutil.copytree(source, tmp_path / "ending")
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(256))}))
    found = told(capsys, "generate", ending, *GREEDY)["samples"][0]
    assert (found["tokens"], found["finish_reason"]) == (0, "eos")


def test_a_bfloat16_export_is_rounded_and_check_says_by_how_much(imported, tmp_path, capsys):
    assert lmjax("convert", "export", str(imported), str(tmp_path / "half"), "--dtype", "bfloat16") == 0
    said = refused(capsys, "convert", "check", imported, tmp_path / "half")
    assert "differ: 21 of 21 tensors" in said
    assert "embed/table" in said
    capsys.readouterr()
    assert lmjax("convert", "check", str(imported), str(tmp_path / "half"), "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert len(found["differing"]) == 21
    assert all(0 < entry["largest"] < 2**-7 * 3 for entry in found["differing"])


def test_check_names_one_value_of_one_layer_and_a_field_of_the_config(source, tmp_path, capsys):
    changed = shutil.copytree(source, tmp_path / "changed")
    (shard,) = (path for path in changed.glob("*.safetensors") if b"layers.1.mlp.up_proj" in path.read_bytes())
    content = bytearray(shard.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little")
    start += header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    content[start : start + 4] = np.float32(7.0).tobytes()
    shard.write_bytes(content)
    settings = {**SETTINGS, "rope_theta": 90.0}
    (changed / "config.json").write_text(json.dumps(settings))
    said = refused(capsys, "convert", "check", source, changed)
    assert "differ: 1 of 21 tensors" in said
    assert "mlp/up/kernel[1]" in said
    assert "1 of 384" in said
    assert "model.rope_theta: 100.0 and 90.0" in said


def test_models_with_different_parameters_are_told_apart_by_their_configs(source, tmp_path, capsys):
    wider = write_model(tmp_path / "wider", np.random.default_rng(0), intermediate_size=32)
    said = refused(capsys, "convert", "check", source, wider)
    assert "different parameters" in said
    assert "model.mlp_dim: 24 and 32" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "{source}", "{taken}"], "not empty"),
        (["import", "{nowhere}", "{out}"], "nowhere"),
        (["import", "{source}", "{out}", "--memory-budget", "a lot"], "--memory-budget is 'a lot'"),
        (["import", "{source}", "{out}", "--memory-budget", "1MB"], "give at least"),
        (["export", "{source}", "{out}"], "a Hugging Face model already"),
        (["export", "{nowhere}", "{out}"], "no such file or directory"),
        (["export", "{imported}", "{taken}"], "not empty"),
        (["export", "{imported}/checkpoints/3", "{out}"], "no checkpoint of step 3. Checkpoints here: 0"),
        (["export", "{imported}", "{out}", "--shard-size", "0GB"], "--shard-size is '0GB'"),
        (["check", "{source}", "{taken}"], "not a model"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_nothing_is_left(
    source, imported, tmp_path, capsys, arguments, message
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    places = {name: str(tmp_path / name) for name in ("out", "taken", "nowhere")}
    places |= {"source": str(source), "imported": str(imported)}
    assert message in refused(capsys, "convert", *(argument.format(**places) for argument in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine"]


def test_what_has_no_effect_on_a_foreign_model_is_refused(source, capsys):
    assert "give a file with --text" in refused(capsys, "evaluate", source)
    said = refused(capsys, "generate", source, "--prompt", "a", "data.path=elsewhere")
    assert "no effect" in said
    assert "mesh, precision, train.attention_kernel" in said
