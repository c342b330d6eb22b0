"""GGUF files: every tensor under Hugging Face's name and in its layout, and the config.json that goes with them."""

import tracemalloc

import numpy as np
import pytest

from lmjax.convert import gguf_files
from lmjax.convert.gguf_files import FREQUENCIES, GGUFFile, gguf_config
from lmjax.convert.tensors import open_tensors
from lmjax.errors import InputError
from tests.convert.gguf_models import METADATA, WIDTH, random_weights, write_gguf

pytestmark = pytest.mark.fast

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_tensors_are_those_that_were_quantised(tmp_path, rng, monkeypatch, kind):
    monkeypatch.setattr(gguf_files, "PIECE", 1000)  # of which the tensors have several
    held = write_gguf(tmp_path / "model.gguf", random_weights(rng, tied=False, biased=True), kind=kind)
    files = open_tensors(tmp_path)
    assert files.infos.keys() == held.keys()
    for name, expected in held.items():
        found = files.read(name)
        assert found.dtype == files.infos[name].dtype == np.float32
        assert found.shape == files.infos[name].shape
        np.testing.assert_array_equal(found, expected, err_msg=name)
    q = "model.layers.1.self_attn.q_proj.weight"
    assert not np.array_equal(gguf_files.GGUFFile(tmp_path / "model.gguf").read(q.replace("q_", "o_")), held[q])
    files.close()


def blocks_of(kind, rng):
    """Random bytes whose half-precision scales are finite."""
    row = gguf.quants.quant_shape_to_byte_shape((256,), kind)[0]
    rows = rng.integers(0, 256, (96, row), np.uint8)
    finite = np.isfinite(gguf.quants.dequantize(rows, kind)).all(axis=1)
    return rows[finite][:32]


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "IQ2_XXS", "TQ2_0"])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_a_kind_that_can_only_be_dequantised_is_read_in_the_order_of_rows(tmp_path, rng, monkeypatch, kind):
    monkeypatch.setattr(gguf_files, "PIECE", 700)
    number = gguf.GGMLQuantizationType[kind]
    packed = blocks_of(number, rng)
    assert len(packed) == 32
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=number)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = GGUFFile(tmp_path / "model.gguf")
    expected = gguf.quants.dequantize(packed, number)
    np.testing.assert_array_equal(files.read("model.embed_tokens.weight"), expected)
    q = files.read("model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_array_equal(q, expected.reshape(2, 8, 2, 256).swapaxes(1, 2).reshape(32, 256))
    assert not np.array_equal(q, expected)


def test_the_tensor_that_was_read_last_is_kept_and_no_other(tmp_path, rng):
    write_gguf(tmp_path / "model.gguf", random_weights(rng))
    files = open_tensors(tmp_path)
    embed = files.read("model.embed_tokens.weight")
    assert files.read("model.embed_tokens.weight") is embed
    assert not embed.flags.writeable
    files.read("model.norm.weight")
    again = files.read("model.embed_tokens.weight")
    assert again is not embed
    np.testing.assert_array_equal(again, embed)


def test_one_tensor_at_a_time_is_in_memory(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(gguf_files, "PIECE", 1 << 14)
    weights = {"model.embed_tokens.weight": (4096, 256), "lm_head.weight": (4096, 256)}
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in weights.items()}
    write_gguf(tmp_path / "model.gguf", weights, kind="Q8_0")
    files = open_tensors(tmp_path)
    sums = []
    tracemalloc.start()
    for name in weights:
        sums.append(files.read(name).sum())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = weights["lm_head.weight"].nbytes
    assert size <= peak < 1.5 * size
    assert sums[0] != sums[1]


def test_the_config_is_that_of_a_llama(tmp_path, rng):
    path = tmp_path / "model.gguf"
    roles = {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.padding_token_id": 5}
    write_gguf(path, random_weights(rng, tied=False, biased=True), metadata={**METADATA, **roles})
    assert gguf_config(path) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "intermediate_size": 160,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": float(np.float32(1e-5)),
        "vocab_size": 64,
        "rope_theta": 50_000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "bos_token_id": 3,
        "eos_token_id": 4,
        "pad_token_id": 5,
    }


def divisors(factor, theta=50_000.0):
    """As convert_hf_to_gguf.py computes them for Llama 3."""
    found = []
    for frequency in 1.0 / (theta ** (np.arange(0, WIDTH, 2, dtype=np.float32) / WIDTH)):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            found.append(1.0)
        elif wavelength > 8192 / 1.0:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_scalings_of_rope_are_mapped_or_refused(tmp_path, rng):
    path, weights = tmp_path / "model.gguf", random_weights(rng)
    write_gguf(path, weights, extra={FREQUENCIES: divisors(32.0)})
    assert gguf_config(path)["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert FREQUENCIES not in open_tensors(tmp_path).infos
    write_gguf(path, weights, extra={FREQUENCIES: divisors(32.0) * np.float32(1.01)})
    with pytest.raises(InputError, match="rope_freqs.weight is not Llama 3's scaling"):
        gguf_config(path)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(path, weights, metadata={**METADATA, **linear})
    assert gguf_config(path)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    write_gguf(path, weights, metadata={**METADATA, "llama.rope.scaling.type": "yarn"})
    with pytest.raises(InputError, match="rope.scaling.type 'yarn' is not read"):
        gguf_config(path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"llama.attention.sliding_window": 64}, "not understood.*\n  llama.attention.sliding_window: 64"),
        ({"llama.expert_count": 8}, "a mixture of experts"),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, "heads of 16 numbers of which 8 are"),
        ({"llama.attention.value_length": 8}, "its values have as many"),
        ({"llama.context_length": None}, "one number for llama.context_length, which is missing"),
        ({"llama.feed_forward_length": [160, 80]}, "one number for llama.feed_forward_length, which is \\[160, 80\\]"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count, which is 0"),
    ],
)
def test_metadata_that_a_llama_does_not_have_is_refused_by_name(tmp_path, rng, changes, what):
    metadata = {key: value for key, value in {**METADATA, **changes}.items() if value is not None}
    write_gguf(tmp_path / "model.gguf", random_weights(rng), metadata=metadata)
    with pytest.raises(InputError, match=what):
        gguf_config(tmp_path / "model.gguf")


def test_models_and_tensors_that_are_not_a_llamas_are_refused(tmp_path, rng):
    path, weights = tmp_path / "model.gguf", random_weights(rng)
    write_gguf(path, weights, architecture="qwen2")
    for read in (gguf_config, GGUFFile):
        with pytest.raises(InputError, match="general.architecture is 'qwen2'; GGUF files of the type 'llama'"):
            read(path)
    write_gguf(path, weights, extra={"blk.0.ffn_gate_inp.weight": np.zeros((4, 96), np.float32)})
    with pytest.raises(InputError, match="it has the tensor blk.0.ffn_gate_inp.weight, which a dense Llama does not"):
        GGUFFile(path)
    write_gguf(path, weights, extra={"blk.9.attn_v.weight": np.zeros((4, 96), np.int32)})
    with pytest.raises(InputError, match="tensors of the type I32, which the gguf package cannot dequantise"):
        GGUFFile(path)
    write_gguf(path, weights, metadata={**METADATA, "llama.attention.head_count": 7})
    with pytest.raises(InputError, match="q_proj.weight has 96 rows, which are not 7 heads of even width"):
        GGUFFile(path)
    del weights["model.embed_tokens.weight"]
    write_gguf(path, weights)
    with pytest.raises(InputError, match="no token_embd.weight; a file in parts has to be merged"):
        GGUFFile(path)
