"""``lmjax tokenizer``: train a tokenizer."""

from typing import Annotated

import typer

from lmjax.cli.arguments import ConfigFile, Overrides

MEASURED_BYTES = 2**20
"""Text on which the length of a token is measured."""


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(metavar="FILE", help="The model to write; it must not be there yet.")] = (
        "tokenizer.model"
    ),
) -> None:
    """Train the tokenizer of a config on its sources, to look at it or to share it between datasets.

    `lmjax data prepare` trains its own where tokenizer.kind is sentencepiece. To use this one, set
    tokenizer={kind: sentencepiece_file, path: FILE}.

    Example: lmjax tokenizer train configs/quickstart.yaml tokenizer.vocab_size=8192 --output code.model
    """
    from lmjax.config import load
    from lmjax.data.sample import sample_texts, train_tokenizer
    from lmjax.data.sources import list_files

    run = load(config, overrides or [])
    tokenizer = train_tokenizer(run.data, run.tokenizer, output)
    texts = sample_texts(list_files(run.data.sources), run.data, MEASURED_BYTES)
    num_tokens = sum(len(tokens) for tokens in tokenizer.encode_batch(texts))
    num_bytes = sum(len(text.encode()) for text in texts)
    print(f"{output}: {tokenizer.vocab_size:,} tokens, {num_bytes / num_tokens:.2f} bytes of text a token")
