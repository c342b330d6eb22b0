"""GGUF files of Llama-type models, with the names, the layout and the config.json that Hugging Face has for them."""

import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.convert.gguf_header import Header, Packed, read_header
from lmjax.convert.mapped_files import TensorInfo
from lmjax.errors import InputError

ARCHITECTURE = "llama"
OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCIES = "rope_freqs.weight"
"""What each frequency is divided by: how the file says Llama 3's scaling."""
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
WITHOUT_EFFECT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
"""Keys that repeat what the tensors say, or say how they were made."""
PIECE = 1 << 20
"""Numbers that are dequantised at a time: what it takes beside the tensor is some times this."""


def find_gguf(path: Path) -> Path | None:
    """The .gguf file that ``path`` is, or the one in that directory. Raises InputError where there are several."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{path}: several GGUF files: {names}; give the path of one (a file in parts is not read)")
    return found[0] if found else None


class GGUFFile:
    """The tensors of a GGUF file, each dequantised when it is read."""

    def __init__(self, path: Path):
        """Raises InputError for a damaged file, another type of model, and tensors that no Llama has."""
        header = _read_llama(path)
        self._heads = _heads(header)
        self._packed = {_name(path, name): packed for name, packed in header.tensors.items() if name != FREQUENCIES}
        self._recent: tuple[str, np.ndarray] | None = None
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(packed.shape, np.dtype(np.float32), path.name) for name, packed in self._packed.items()
        }
        _check_kinds(path, self._packed)
        for name, packed in self._packed.items():
            heads = self._heads.get(name.split(".")[-2])
            if heads is not None and packed.shape[0] % (2 * heads):
                raise InputError(
                    f"{path}: {name} has {packed.shape[0]} rows, which are not {heads} heads of even width"
                )
        with path.open("rb") as file:
            self._content: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32, in Hugging Face's order of rows. The one that was read last is kept: a caller may take
        it part by part."""
        recent = self._recent
        if recent is None or recent[0] != name:
            self._recent = recent = None  # before the next one is made, so that there is one at a time
            recent = (name, self._dequantised(name))
            recent[1].flags.writeable = False
            self._recent = recent
        return recent[1]

    def _dequantised(self, name: str) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        assert self._content is not None, "the file is closed"
        packed = self._packed[name]
        count = math.prod(packed.shape[:-1])
        rows = np.ndarray((count, packed.row_bytes), np.uint8, buffer=self._content, offset=packed.offset)
        array = np.empty((count, packed.shape[-1]), np.float32)
        step = max(1, PIECE // packed.shape[-1])
        order = self._order(name, packed.shape[0])
        # A vector is one row; its order is that of its numbers.
        order_of_rows = np.arange(count) if order is None or array.shape != packed.shape else order
        for start in range(0, count, step):
            chosen = rows[order_of_rows[start : start + step]]
            array[start : start + step] = dequantize(chosen, GGMLQuantizationType[packed.kind])
        array = array.reshape(packed.shape)
        return array[order] if order is not None and array.ndim == 1 else array

    def close(self) -> None:
        self._content = None
        self._recent = None

    def _order(self, name: str, length: int) -> np.ndarray | None:
        """Of queries and keys: llama.cpp rotates neighbours, and its files have the halves of a head interleaved."""
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return None
        return np.arange(length).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def gguf_config(path: Path) -> dict[str, Any]:
    """The config.json of the model in a GGUF file, as Hugging Face has it for a Llama.

    Raises InputError for a file of another type of model, for metadata that is missing, and for metadata of which it
    is not known what it does.
    """
    header = _read_llama(path)
    prefix = f"{ARCHITECTURE}."
    left = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    for key in WITHOUT_EFFECT:
        left.pop(key, None)

    def take(key: str, default: float | None = None) -> Any:
        value = left.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            found = "missing" if value is None else repr(value)
            raise InputError(f"{path}: its metadata has to have one number for {prefix}{key}, which is {found}")
        return value

    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= {theirs: take(key) for key, theirs in KEYS.items()}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = take("attention.head_count_kv", heads)
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["rope_theta"] = take("rope.freq_base", 10_000.0)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    rotated = take("rope.dimension_count", config["hidden_size"] // heads)
    width = take("attention.key_length", rotated)
    if (width, width) != (rotated, take("attention.value_length", width)):
        raise InputError(
            f"{path}: heads of {width} numbers of which {rotated} are rotated; a Llama rotates all, and its values "
            "have as many: this model is not one"
        )
    config["head_dim"] = width
    config |= _scaling(header, left, config)
    for role in ("bos", "eos", "padding"):
        number = header.metadata.get(f"tokenizer.ggml.{role}_token_id")
        if number is not None:
            config[f"{'pad' if role == 'padding' else role}_token_id"] = number
    experts = {left.pop("expert_count", 0), left.pop("expert_used_count", 0)}
    if experts != {0}:
        raise InputError(f"{path}: a mixture of experts; GGUF files of dense models are read")
    if left:
        lines = [f"  {prefix}{key}: {value}" for key, value in left.items()]
        raise InputError("\n".join([f"{path}: this metadata is not understood, and may change the model:", *lines]))
    return config


def _scaling(header: Header, left: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The scaling of rope, in the old spelling. Raises InputError for one that is not known."""
    kind = left.pop("rope.scaling.type", "none")
    factor = left.pop("rope.scaling.factor", None)
    if FREQUENCIES in header.tensors:
        if kind != "none":
            raise InputError(f"{header.path}: both {FREQUENCIES} and rope.scaling.type {kind!r}; one is expected")
        left.pop("rope.scaling.original_context_length", None)
        return {"rope_scaling": _llama3_scaling(header, config)}
    if kind == "none":
        return {}
    if kind == "linear" and factor:
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    raise InputError(f"{header.path}: rope.scaling.type {kind!r} is not read from GGUF; take the safetensors files")


def _llama3_scaling(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    """Find the scaling again from what it does: the file has the divisors alone."""
    packed = header.tensors[FREQUENCIES]
    if packed.kind != "F32":
        raise InputError(f"{header.path}: {FREQUENCIES} is of the type {packed.kind}, and has to be F32")
    divisors = np.fromfile(header.path, "<f4", packed.shape[-1], offset=packed.offset)
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    places = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    turns = 8192 / (2 * math.pi) / config["rope_theta"] ** places
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(
            f"{header.path}: {FREQUENCIES} is not Llama 3's scaling with its low and high factors 1 and 4 from 8192 "
            "tokens; take the safetensors files"
        )
    return scaling


def _read_llama(path: Path) -> Header:
    header = read_header(path)
    found = header.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise InputError(
            f"{path}: general.architecture is {found!r}; GGUF files of the type {ARCHITECTURE!r} are read; take the "
            "model's safetensors files"
        )
    if "token_embd.weight" not in header.tensors:
        raise InputError(f"{path}: it has no token_embd.weight; a file in parts has to be merged with llama-gguf-split")
    return header


def _heads(header: Header) -> dict[str, int]:
    key = f"{ARCHITECTURE}.attention.head_count"
    heads: Any = header.metadata.get(key)
    key_heads: Any = header.metadata.get(f"{key}_kv", heads)
    if not all(isinstance(number, int) and number > 0 for number in (heads, key_heads)):
        raise InputError(f"{header.path}: {key} is {heads}, and {key}_kv {key_heads}; each has to be one number")
    return {"q_proj": heads, "k_proj": key_heads}


def _name(path: Path, name: str) -> str:
    """Hugging Face's name of a tensor."""
    stem, _, kind = name.rpartition(".")
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if kind in ("weight", "bias"):
        if stem in OUTSIDE:
            return f"{OUTSIDE[stem]}.{kind}"
        if found and found[2] in BLOCK:
            return f"model.layers.{int(found[1])}.{BLOCK[found[2]]}.{kind}"
    raise InputError(f"{path}: it has the tensor {name}, which a dense Llama does not; take the safetensors files")


def _check_kinds(path: Path, tensors: Mapping[str, Packed]) -> None:
    """Raises InputError for types of numbers that the gguf package does not dequantise."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    unknown = []
    for kind, row_bytes in {packed.kind: packed.row_bytes for packed in tensors.values()}.items():
        try:
            dequantize(np.zeros((1, row_bytes), np.uint8), GGMLQuantizationType[kind])
        except NotImplementedError:
            unknown.append(kind)
    if unknown:
        raise InputError(f"{path}: tensors of the type {', '.join(unknown)}, which the gguf package cannot dequantise")
