"""A family's table against transformers, by the files: names, shapes, config, logits, gradients, and the way back.

``check_family`` makes a tiny transformers model with every tensor random, saves it, and compares all that with what the
table makes of the files. What the parts of it raise where a table is wrong is shown in test_pieces.py.
"""

import dataclasses
import inspect
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from lmjax.convert.family import Family
from lmjax.convert.layouts import Table
from lmjax.convert.pieces import Piece, is_ignored, pieces
from lmjax.convert.settings import WITHOUT_EFFECT, read_config_file
from lmjax.convert.source import find_family, read_model
from lmjax.models.block import whole_sequences
from lmjax.models.decoder import DecoderConfig
from lmjax.nn.moe import MoEConfig
from lmjax.train.state import abstract_decoder
from lmjax.train.step import DeviceBatch, loss_sums
from tests import tiny
from tests.models.families.family import Family as Twin
from tests.models.families.family import layer_types, max_positions
from tests.models.families.moe import is_separated

Tensors = dict[str, np.ndarray]

torch.set_num_threads(1)  # a thread that waits for another takes longer than these products do

TOLERANCE = 1e-4
NUM_PADS = 3
NUM_SHARDS = 2
"""At least so many files, so that tensors are looked for in more than one."""
OF_TRANSFORMERS_ONLY = {"_name_or_path", "transformers_version", "_attn_implementation_autoset"}


@dataclasses.dataclass(frozen=True)
class Example:
    """A directory of transformers' and what is in it."""

    directory: Path
    model: Any
    """The transformers model, in evaluation mode."""
    config: DecoderConfig
    """What config.json says, with heads resolved and the shortest pattern of layers."""
    rows: list[np.ndarray]
    """Token ids of rows of several lengths, the shortest first."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a family's table makes of a directory."""

    family: Family
    config: DecoderConfig
    tensors: Tensors
    """Every tensor of the files, by its name there, which may differ from that in memory."""
    pieces: list[Piece]
    graphdef: Any
    abstract: Any
    """Our parameters as ShapeDtypeStructs with shardings."""
    mesh: jax.sharding.Mesh

    def parameters(self) -> dict[str, np.ndarray]:
        """Our parameters by path, filled slice by slice from the files; a slice that no tensor holds is NaN."""
        found = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in leaves(self.abstract).items()}
        for piece in self.pieces:
            shapes = [part.shape for part in piece.parts]
            for number, part in enumerate(piece.parts):
                found[part.path][part.index] = piece.layout.read(self.tensors[piece.name], shapes, number)
        return found

    def written(self, parameters: Mapping[str, np.ndarray]) -> Tensors:
        """The tensors of the files that hold ``parameters``."""
        return {
            piece.name: np.ascontiguousarray(
                piece.layout.write([parameters[part.path][part.index] for part in piece.parts])
            )
            for piece in self.pieces
        }

    def placed(self, parameters: Mapping[str, np.ndarray]) -> Any:
        """The tree that the decoder is made of."""

        def place(path, like):
            return jax.device_put(parameters[path_name(path)], like.sharding)

        return jax.tree_util.tree_map_with_path(place, self.abstract)


def read(directory: Path, family: Family | None = None) -> Reading:
    """The files of ``directory``, with the table of the family that config.json names, or with another one."""
    named, config = read_values(read_config_file(directory), str(directory))
    family = family or named
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) >= NUM_SHARDS
    tensors = {name: tensor for file in files for name, tensor in safetensors.numpy.load_file(file).items()}
    mesh = tiny.mesh_of(1, 1, 1)
    return Reading(family, config, tensors, pieces(family, config), *abstract_decoder(config, mesh), mesh)


def read_values(values: Mapping[str, Any], place: str = "config.json") -> tuple[Family, DecoderConfig]:
    """The family that a config.json names, and the decoder that it describes."""
    family = find_family(values, place)
    return family, read_model(family, values, place)


def check_family(
    twin: Twin, changes: Mapping[str, Any], rng: np.random.Generator, directory: Path, **reads: Any
) -> None:
    """All checks of one tiny model, ``twin.config`` with ``changes``.

    ``reads`` are fields of the config that the files do not have and that are read as these values instead.
    """
    example = make_example(twin, changes, rng, directory, **reads)
    reading = read(example.directory)
    check_config(reading, example)
    check_names(reading)
    check_bits(reading)
    logits = check_logits(reading, example)
    check_export(reading, example, logits, directory / "exported")
    check_noticed(example, next(name for name in reading.tensors if name.endswith(twin.perturbed)), logits)


def make_example(
    twin: Twin, changes: Mapping[str, Any], rng: np.random.Generator, directory: Path, **reads: Any
) -> Example:
    """Writes the files of a model with every tensor random, in several shards, below ``directory``."""
    config = tiny.with_changes(twin.config, **changes)
    model = twin.model(config).eval()
    lengths = (twin.length - 5, twin.length)
    for _ in range(5):
        randomise(model, rng, around=0.0 if config.norm_unit_offset else 1.0)
        rows = [rng.integers(0, config.vocab_size, length).astype(np.int32) for length in lengths]
        if config.moe is None or all(is_separated(model, row[None], config.moe) for row in rows):
            break
    else:
        raise AssertionError("routers of all draws have two logits that are nearly equal")
    source = directory / "source"
    num_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(source, max_shard_size=num_bytes // NUM_SHARDS)
    read = resolved(dataclasses.replace(config, max_length=max_positions(config), **reads))
    return Example(source, model, read, rows)


def randomise(model: Any, rng: np.random.Generator, around: float) -> None:
    """Every tensor random; the scales of norms about ``around``."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.from_numpy(around + 0.3 * values if is_scale else 0.2 * values))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.from_numpy(0.2 * rng.standard_normal(tuple(buffer.shape)).astype(np.float32)))


def resolved(config: DecoderConfig) -> DecoderConfig:
    """The same decoder with heads as numbers, and layers as the shortest pattern."""
    kinds = tuple(kind.removesuffix("_attention") for kind in layer_types(config))
    lengths = range(1, len(kinds) + 1)
    shortest = next(n for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return dataclasses.replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_width,
        layer_pattern=kinds[:shortest],
        query_scale=config.attention("full").query_scale,
        init="gpt2",
        moe=None if config.moe is None else resolved_experts(config, config.moe),
    )


def resolved_experts(config: DecoderConfig, moe: MoEConfig) -> MoEConfig:
    """With the fewest blocks before and in the pattern, and one name for weights that are divided by their sum."""
    kinds = tuple(kind.mlp for kind in config.blocks)
    lengths = itertools.product(range(len(kinds)), range(1, len(kinds) + 1))
    dense_first, length = min(
        ((first, n) for first, n in lengths if spelled(kinds, first, n) == kinds), key=lambda found: (sum(found), found)
    )
    return dataclasses.replace(
        moe,
        expert_dim=config.expert_dim if "dense" in kinds else None,
        dense_first=dense_first,
        pattern=kinds[dense_first : dense_first + length],
        softmax_over="all",
        renormalize=moe.renormalize or moe.softmax_over == "chosen",
    )


def spelled(kinds: tuple[str, ...], dense_first: int, length: int) -> tuple[str, ...]:
    """Dense layers, and a pattern of so many of ``kinds`` after them, over the depth."""
    pattern = itertools.cycle(kinds[dense_first : dense_first + length])
    return tuple(itertools.islice(itertools.chain(["dense"] * dense_first, pattern), len(kinds)))


def check_config(reading: Reading, example: Example) -> None:
    assert resolved(reading.config) == example.config


def check_names(reading: Reading) -> None:
    """The files have the names and shapes of the table, and nothing else."""
    expected = {piece.name: piece.shape for piece in reading.pieces}
    tied = {f"{reading.family.head}.weight"} if reading.config.tie_embeddings else set()
    found = {name: tensor.shape for name, tensor in reading.tensors.items() if not is_ignored(reading.family, name)}
    assert {name: shape for name, shape in found.items() if name not in tied} == expected


def check_bits(reading: Reading) -> None:
    """HF to ours and back gives every tensor bit by bit, but rows of a table that are never read."""
    written = reading.written(reading.parameters())
    for piece in reading.pieces:
        first = piece.layout.before if isinstance(piece.layout, Table) else 0
        found, expected = written[piece.name], reading.tensors[piece.name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found[first:].tobytes() == expected[first:].tobytes(), piece.name


def check_logits(reading: Reading, example: Example) -> list[np.ndarray]:
    """Ours equal theirs, which are returned, in rows with padding. A slice that is not filled shows as NaN."""
    expected = their_logits(example.model, example.rows)
    assert max(np.abs(logits).max() for logits in expected) > 1
    for ours, theirs in zip(our_logits(reading, example.rows), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    return expected


def their_logits(model: Any, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Of rows that are padded on their left with tokens that count, were they seen.

    Each row is run by itself, since some rotary scalings go by the longest row of a batch there.
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    found = []
    for row in rows:
        tokens = torch.from_numpy(np.concatenate([row[-NUM_PADS:], row]))[None].long()
        mask = torch.ones_like(tokens)
        mask[:, :NUM_PADS] = 0
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes_positions else {}
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask, use_cache=False, **positions).logits
        found.append(logits[0, NUM_PADS:].numpy())
    return found


def our_logits(reading: Reading, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Of the same rows in one batch, as they are packed: the shorter ones end in padding."""
    batch = batch_of(rows)

    @jax.jit
    def logits(params, tokens, positions, segments):
        decoder = nnx.merge(reading.graphdef, params)
        hidden = whole_sequences(decoder.hidden(tokens, positions, segments, tiny.FLOAT32))
        return decoder.logits(hidden, jax.P(("data", "fsdp", "expert"), None, "tensor"))

    with jax.set_mesh(reading.mesh):
        arrays = tiny.by_rows(reading.mesh, batch.tokens, batch.positions, batch.segment_ids)
        found = np.asarray(logits(reading.placed(reading.parameters()), *arrays))
    return [found[i, : len(row), : reading.config.vocab_size] for i, row in enumerate(rows)]


def check_export(reading: Reading, example: Example, logits: list[np.ndarray], directory: Path) -> None:
    """The files of the way back load in transformers, all of them and nothing beside, as the same model."""
    family = reading.family
    original = read_config_file(example.directory)
    kept = {key: value for key, value in original.items() if key in WITHOUT_EFFECT}
    named = {"model_type": family.model_type, "architectures": [family.architecture]}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(kept | named | family.write_config(reading.config)))
    written = reading.written(reading.parameters())
    safetensors.numpy.save_file(written, directory / "model.safetensors", {"format": "pt"})
    found = transformers.AutoConfig.from_pretrained(directory)
    check_same_settings(compared(found), compared(example.model.config))
    for values in (read_config_file(directory), found.to_dict()):  # in our spelling, and in that of transformers 5
        assert resolved(read_values(values)[1]) == example.config
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation=example.model.config._attn_implementation
    )
    assert not any(report.values()), report
    assert type(model) is type(example.model)
    for one, other in zip(their_logits(model.eval(), example.rows), logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def check_same_settings(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    keys = found.keys() | expected.keys()
    differ = {key: (found.get(key), expected.get(key)) for key in keys if found.get(key) != expected.get(key)}
    assert not differ, differ


def compared(config: Any) -> dict[str, Any]:
    """All that a transformers config says, without what is only the old name of something beside the new one."""
    values = {key: value for key, value in config.to_dict().items() if key not in OF_TRANSFORMERS_ONLY}
    if isinstance(rope := values.get("rope_parameters"), dict):
        values["rope_parameters"] = {key: value for key, value in rope.items() if key != "type"}
        if values.get("partial_rotary_factor") == rope.get("partial_rotary_factor"):
            values.pop("partial_rotary_factor", None)
    return values


def check_noticed(example: Example, name: str, logits: list[np.ndarray]) -> None:
    """That the comparison of logits sees the signs of this tensor turned."""
    parameter = example.model.get_parameter(name)
    with torch.no_grad():
        parameter.neg_()
        found = their_logits(example.model, example.rows)
        parameter.neg_()
    assert max(np.abs(one - other).max() for one, other in zip(found, logits, strict=True)) > 5 * TOLERANCE


def check_gradients(example: Example) -> None:
    """The gradient of the mean loss of a row, tensor by tensor under the names of the files, equals transformers'."""
    reading = read(example.directory)
    row = example.rows[-1]
    loss, gradients = our_gradients(reading, row)
    tokens = torch.from_numpy(row)[None].long()
    expected = example.model(tokens, labels=tokens, use_cache=False).loss
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    theirs = {name: parameter.grad.numpy() for name, parameter in example.model.named_parameters()}
    ours = reading.written(gradients)
    assert_same_gradients(ours, theirs)
    name = max(theirs, key=lambda name: np.linalg.norm(theirs[name]))
    with pytest.raises(AssertionError, match=name):
        assert_same_gradients(ours | {name: ours[name] * 1.001}, theirs)


def assert_same_gradients(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum(float(np.sum(np.square(gradient))) for gradient in theirs.values()))
    for name, gradient in theirs.items():
        allowed = TOLERANCE * np.linalg.norm(gradient) + 1e-7 * whole  # that of a bias of keys is rounding alone
        assert np.linalg.norm(ours[name] - gradient) <= allowed, name


def our_gradients(reading: Reading, row: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The mean loss of the row, and its gradient by path."""
    batch = batch_of([row])

    @jax.jit
    def value_and_grad(params, batch):
        def loss(params):
            decoder = nnx.merge(reading.graphdef, params)
            return loss_sums(decoder, batch, tiny.FLOAT32, tiny.LOSS)[0].loss / (len(row) - 1)

        return jax.value_and_grad(loss)(params)

    with jax.set_mesh(reading.mesh):
        placed = DeviceBatch(*tiny.by_rows(reading.mesh, *batch))
        loss, gradients = value_and_grad(reading.placed(reading.parameters()), placed)
    return float(loss), {path: np.asarray(leaf) for path, leaf in leaves(gradients).items()}


def batch_of(rows: list[np.ndarray]) -> DeviceBatch:
    """The rows with padding behind them, each of whose tokens has the next one as its target."""
    shape = (len(rows), max(map(len, rows)))
    tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        targets[i, : len(row) - 1] = row[1:]
        segments[i, : len(row)] = 1
        positions[i, : len(row)] = np.arange(len(row))
        weights[i, : len(row) - 1] = 1
    return DeviceBatch(tokens, targets, segments, positions, weights)


def leaves(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
