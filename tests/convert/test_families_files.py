"""Every family through the disk: its files to a checkpoint of ours, and back to files that are the same bit by bit."""

from pathlib import Path

import numpy as np
import pytest

from lmjax.checkpoint.slices import open_step
from lmjax.convert.exporting import export_model
from lmjax.convert.importing import import_model
from lmjax.convert.settings import read_config_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402

from tests.convert.family_checks import make_example  # noqa: E402
from tests.models.families import alibi, gemma, gpt, llama, moe  # noqa: E402

TWINS = llama.FAMILIES | gemma.FAMILIES | gpt.FAMILIES | alibi.FAMILIES | moe.FAMILIES
TWINS.pop("granite")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def tensors(directory: Path) -> dict[str, "torch.Tensor"]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TWINS)
def test_files_come_back_from_a_checkpoint_bit_by_bit(name, dtype, rng, tmp_path):
    example = make_example(TWINS[name], {}, rng, tmp_path)
    source = tmp_path / "source"
    example.model.to(DTYPES[dtype]).save_pretrained(source)
    imported = import_model(source, tmp_path / "ours")
    assert imported.source_dtype == dtype
    with open_step(tmp_path / "ours" / "checkpoints") as reader:
        export_model(reader, imported.config, tmp_path / "back", huggingface=tmp_path / "ours" / "huggingface")
    before, after = tensors(source), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        found = after[key]
        assert tensor.dtype == DTYPES[dtype]
        # Biases of choices become float32, which transformers keeps them in too.
        assert found.dtype == (torch.float32 if key.endswith("e_score_correction_bias") else DTYPES[dtype])
        assert torch.equal(found, tensor.to(found.dtype))
    assert any(np.ptp(tensor.float().numpy()) > 0.1 for tensor in after.values() if tensor.ndim == 1), "random norms"
    assert read_config_file(tmp_path / "back") == read_config_file(source)
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
