"""A tiny Hugging Face directory with random parameters and a tokenizer of bytes, made without transformers."""

import json
from pathlib import Path

import numpy as np

from lmjax.convert.families import FAMILIES
from lmjax.convert.pieces import pieces
from lmjax.convert.safetensors_files import SafetensorsWriter
from lmjax.convert.source import read_model
from lmjax.convert.tokenizer import huggingface_files
from lmjax.data.tokenizer import ByteTokenizer

SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_model(directory: Path, rng: np.random.Generator, **changes: object) -> Path:
    settings = SETTINGS | changes
    family = FAMILIES[settings["model_type"]]
    wanted = pieces(family, read_model(family, settings, "config.json"))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    writer = SafetensorsWriter(
        directory, [(piece.name, piece.shape) for piece in wanted], dtype=settings["torch_dtype"], shard_bytes=20_000
    )
    for piece in wanted:
        values = rng.standard_normal(piece.shape).astype(np.float32)
        writer.write(piece.name, 1 + 0.3 * values if len(piece.shape) == 1 else 0.3 * values)
    writer.finish()
    for name, content in huggingface_files(ByteTokenizer()).items():
        (directory / name).write_bytes(content)
    return directory
