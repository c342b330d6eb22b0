"""Tokenizers of each kind that a tokenizer.json can hold, trained on a few lines, as ``tokenizers`` itself has them."""

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "The quick brown fox jumps over the lazy dog, and the naïve café opens at 10:30.",
    "def function(value, other):\n    for index in range(10):\n        total += value * index\n    return total\n",
    "日本語のテキスト 日本 café <a/>",
] * 3


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|begin|>", "<|pad|>"]
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral have it."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        LINES[:2], trainers.BpeTrainer(vocab_size=400, special_tokens=special + byte_tokens, show_progress=False)
    )
    tree = json.loads(made.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in special]
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


def word_piece() -> tokenizers.Tokenizer:
    """As BERT has it."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    made.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    return made


def unigram() -> tokenizers.Tokenizer:
    """As T5 has it."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    made.train_from_iterator(
        LINES,
        trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=special, show_progress=False),
    )
    return made


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_piece": word_piece, "unigram": unigram}


@functools.cache
def content_of(kind: str) -> str:
    """The tokenizer.json of a kind."""
    return KINDS[kind]().to_str()
