"""A config.json being read: every key of it is understood, known to leave a trained model as it is, or refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.errors import InputError

CONFIG_FILE = "config.json"

_NAMES = """
_name_or_path _attn_implementation_autoset architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder
is_encoder_decoder label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups
num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unk_token_id use_bfloat16
use_cache pretraining_tp attn_implementation cache_implementation attention_dropout attn_pdrop classifier_dropout
emb_pdrop embd_pdrop embed_dropout hidden_dropout hidden_dropout_prob attention_dropout_prob layerdrop
resid_pdrop dropout activation_dropout output_router_logits router_aux_loss_coef
router_jitter_noise transformers.js_config unsloth_fixed unsloth_version _model_name_or_path
"""
WITHOUT_EFFECT = frozenset(_NAMES.split())
"""Keys that change nothing in how a trained model computes: generation's defaults, labels, how weights were drawn, how
the class runs, and what is a setting of training: dropout (``model.dropout``), and the router's losses and noise
(``model.moe``)."""

_ABSENT = object()


class Settings:
    """The keys of a config.json, marked as they are read."""

    def __init__(self, values: Mapping[str, Any], place: str):
        """``place`` is named in messages: the file."""
        self._values = values
        self._defaults: dict[str, Any] = {}
        self._read: set[str] = set()
        self.place = place

    def take(self, key: str, default: Any = _ABSENT) -> Any:
        """The value of ``key``.

        Raises InputError where it is absent and has no default, and where it is of another kind than that.
        """
        self._read.add(key)
        default = self._defaults.get(key, default)
        value = self._values.get(key, default)
        if value is _ABSENT:
            raise InputError(f"{self.place}: {key} is missing; a config.json of this family has it")
        if default is not _ABSENT and None not in (default, value) and _kind(value) != _kind(default):
            raise InputError(f"{self.place}: {key} is {json.dumps(value)}; it has to be {_kind(default)}")
        return value

    def expect(self, key: str, *allowed: Any, default: Any = None) -> None:
        """Raises InputError where ``key`` has a value that the decoder has no switch for."""
        value = self.take(key, default)
        if value not in allowed:
            shown = ", ".join(json.dumps(choice) for choice in allowed)
            raise InputError(
                f"{self.place}: {key} is {json.dumps(value)}, which is not supported; it has to be {shown}"
            )

    def inside(self, key: str) -> "Settings":
        """The keys of the dictionary at ``key``; none where it is absent."""
        return Settings(self.take(key, None) or {}, f"{self.place}: {key}")

    def fill(self, defaults: Mapping[str, Any]) -> None:
        """Takes these values for keys that the file lacks, as transformers' class of the family does."""
        self._defaults |= defaults

    def ignore(self, *keys: str) -> None:
        """Marks keys that leave this family's models as they are, whatever their values."""
        self._read.update(keys)

    def rename(self, names: Mapping[str, str]) -> None:
        """Takes the keys of ``names`` for other spellings of its values, as transformers' ``attribute_map`` does.

        Raises InputError where a file has both, with different values.
        """
        values = dict(self._values)
        for other, usual in names.items():
            found = values.pop(other, None)
            if found is not None and values.setdefault(usual, found) != found:
                raise InputError(
                    f"{self.place}: {other} is {json.dumps(found)} and {usual} is {json.dumps(values[usual])}; they "
                    "are two names of one number, so remove the wrong one"
                )
        self._values = values

    def refuse_rest(self) -> None:
        """Raises InputError that names the keys that nobody read and that may change the model."""
        rest = {
            key: value
            for key, value in self._values.items()
            if key not in self._read and key not in WITHOUT_EFFECT and value is not None
        }
        if rest:
            lines = [f"  {key}: {json.dumps(value)}" for key, value in rest.items()]
            first = f"{self.place}: these keys are not understood, and may change what the model computes:"
            raise InputError(
                "\n".join([first, *lines]) + "\nRemove those that have no effect from the file, and convert again."
            )


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, int | float) else f"a JSON {type(value).__name__}"


def read_config_file(directory: Path) -> dict[str, Any]:
    """The content of ``config.json``. Raises InputError where it is missing or is not an object."""
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{directory}: not a Hugging Face directory: it has no {CONFIG_FILE}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); fetch the file anew") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: found {type(values).__name__}, where a JSON object is expected; fetch the file anew")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file such as ``config.json``, as transformers writes it."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
