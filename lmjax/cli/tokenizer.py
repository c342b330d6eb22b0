"""``lmjax tokenizer``: train a tokenizer, and measure one on texts."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmjax.cli.arguments import AsJson, ConfigFile, Overrides
from lmjax.cli.table import print_json, print_table

if TYPE_CHECKING:
    from lmjax.config import RunConfig
    from lmjax.data.config import Source
    from lmjax.data.tokenizer import Tokenizer

MEASURED_BYTES = 2**20
"""Text on which the length of a token is measured."""
CONFIG_FILES = (".gin", ".yaml", ".yml")


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
    from lmjax.data.tokenizer_report import fertility

    run = load(config, overrides or [])
    tokenizer = train_tokenizer(run.data, run.tokenizer, output)
    found = fertility(tokenizer, "all", sample_texts(list_files(run.data.sources), run.data, MEASURED_BYTES))
    print(f"{output}: {tokenizer.vocab_size:,} tokens, {found.bytes_per_token:.2f} bytes of text a token")


def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|DIR|TOKENIZER",
            help="YAML file of an experiment, a dataset directory, or a .model or tokenizer.json file.",
        ),
    ],
    overrides: Overrides = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="File, directory or glob, a source of its own each time; else those of the config."
        ),
    ] = None,
    sample_bytes: Annotated[int, typer.Option(min=1, help="Bytes of text that each source gives.")] = MEASURED_BYTES,
    as_json: AsJson = False,
) -> None:
    """Show how many tokens texts take, by source: bytes a token, tokens a word, and how often the vocabulary has none.

    Texts are cleaned as for a dataset; the sample is the same each time. The last row is all of them together.

    Example: lmjax tokenizer report data/quickstart --text docs/ --text README.md
    """
    from lmjax.data.config import DataConfig
    from lmjax.data.tokenizer import load_tokenizer
    from lmjax.data.tokenizer_report import report_fertility
    from lmjax.errors import InputError

    if not source.endswith(CONFIG_FILES):
        if overrides:
            raise InputError(f"{overrides[0]}: overrides apply to a config, and {source} is none")
        if not text:
            raise InputError(f"{source}: a tokenizer alone has no text; give some with --text PATH")
        tokenizer = load_tokenizer(source)
        data = DataConfig(path=source, sources=_sources(text), sequence_length=2, validation_fraction=0.0)
    else:
        from lmjax.config import load

        run = load(source, overrides or [])
        tokenizer = _tokenizer_of(run)
        data = dataclasses.replace(run.data, sources=_sources(text), weights_by_step=()) if text else run.data
    rows = report_fertility(tokenizer, data, sample_bytes)
    if as_json:
        entries = [
            {
                **dataclasses.asdict(row),
                "bytes_per_token": row.bytes_per_token,
                "tokens_per_word": row.tokens_per_word,
                "fallback_share": row.fallback_share,
            }
            for row in rows
        ]
        described = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
        print_json({"tokenizer": described, "sources": entries[:-1], "all": entries[-1]})
        return
    print_table(
        f"{tokenizer.kind} tokenizer of {tokenizer.vocab_size:,} tokens",
        ["source", "documents", "bytes", "tokens", "bytes a token", "tokens a word", "bytes or unknown"],
        [
            [
                row.source,
                row.documents,
                row.bytes,
                row.tokens,
                None if row.bytes_per_token is None else f"{row.bytes_per_token:.3f}",
                None if row.tokens_per_word is None else f"{row.tokens_per_word:.3f}",
                None if row.fallback_share is None else f"{row.fallback_share:.3%}",
            ]
            for row in rows
        ],
    )


def _sources(paths: list[str]) -> "tuple[Source, ...]":
    from lmjax.data.config import CsvSource, FilesSource, JsonlSource, ParquetSource

    kinds = {".csv": CsvSource, ".jsonl": JsonlSource, ".parquet": ParquetSource}
    plain = [path.removesuffix(".gz").removesuffix(".zst") for path in paths]
    return tuple(kinds.get(Path(name).suffix, FilesSource)(path=path) for name, path in zip(plain, paths, strict=True))


def _tokenizer_of(run: "RunConfig") -> "Tokenizer":
    """That of the prepared dataset, or else the one that the config names."""
    from lmjax.data.index import INDEX_FILE
    from lmjax.data.tokenizer import SentencePieceTrained, load_tokenizer, open_tokenizer
    from lmjax.errors import InputError

    if (Path(run.data.path) / INDEX_FILE).is_file():
        return load_tokenizer(run.data.path)
    if isinstance(run.tokenizer, SentencePieceTrained):
        raise InputError(
            f"{run.data.path}: no prepared dataset here, so that the config's tokenizer is not trained yet; run "
            "`lmjax data prepare` first, or train one with `lmjax tokenizer train` and name its file"
        )
    return open_tokenizer(run.tokenizer)
