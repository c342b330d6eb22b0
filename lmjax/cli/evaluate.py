"""``lmjax evaluate``."""

from typing import Annotated, Any

import typer

from lmjax.cli.arguments import AsJson, Overrides
from lmjax.cli.model import ModelArgument, OpenModel, open_model
from lmjax.cli.table import print_json, print_table
from lmjax.errors import InputError

HEEDED = ("mesh", "precision", "data.path", "train.attention_kernel")


def evaluate(
    model: ModelArgument,
    overrides: Overrides = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Score this file as one document.")] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens by which the windows advance over a file longer than model.max_length, half of which is the "
            "default; 1 gives every token the longest possible context.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well a trained model predicts a file, or the held-out rows of its dataset.

    A file is taken as it is, as UTF-8, with the tokenizer's BOS and without EOS, and every token but the first is
    scored once: nll is the sum in nats. Without --text, evaluate.max_rows rows of the validation split are scored
    as in training. KEY=VALUE may be of mesh, precision, data.path, train.attention_kernel, evaluate.max_rows.

    Example: lmjax evaluate runs/quickstart --text README.md --json
    """
    import jax

    if text is None and stride is not None:
        raise InputError("--stride is about the windows over a file; give it together with --text FILE")
    if text is None:
        opened = open_model(model, overrides or (), (*HEEDED, "evaluate.max_rows"))
        if opened.step is None:
            raise InputError(f"{model}: no run of lmjax, so there is no held-out data; give a file with --text")
        result = {"step": opened.step, **score_validation(opened)}
    else:
        content = read_text(text)
        result = score_file(open_model(model, overrides or (), HEEDED), content, text, stride)
    if jax.process_index() != 0:
        return
    if as_json:
        print_json(result)
    else:
        print_table(f"{model} on {text or 'the validation split'}", list(result), [list(result.values())])


def read_text(file: str) -> str:
    """The content of ``file``, no byte changed. Raises InputError where it is missing or not UTF-8."""
    from etils import epath

    path = epath.Path(file)
    if not path.exists() or path.is_dir():
        what = "a directory" if path.exists() else "no such file"
        raise InputError(f"{file}: {what}; give a text file to score")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); convert it first") from None


def score_file(opened: OpenModel, content: str, name: str, stride: int | None) -> dict[str, Any]:
    """nll, tokens and perplexity of a text."""
    from lmjax.generate.score import Scorer, document_tokens

    tokens = document_tokens(opened.tokenizer, content)
    if len(tokens) < 2:
        raise InputError(f"{name}: {len(tokens)} token(s), and the first is not scored; give a longer text")
    score = Scorer(opened.blueprint, opened.execution).score(opened.params, tokens, stride=stride)
    return {"nll": score.nll, "tokens": score.tokens, "perplexity": score.perplexity}


def score_validation(opened: OpenModel) -> dict[str, Any]:
    """What an evaluation row of metrics.jsonl has, from the same rows."""
    import dataclasses

    from lmjax.cli.run_directory import to_job
    from lmjax.mesh import batch_shards
    from lmjax.ops.cross_entropy import LossOptions
    from lmjax.train.evaluate import make_evaluator
    from lmjax.train.held_out import evaluation_batches
    from lmjax.train.job import open_dataset

    blueprint, train = opened.blueprint, opened.config.train
    shards = batch_shards(blueprint.mesh.shape)
    rows = -(-train.global_batch_size // train.accumulation // shards) * shards
    rows_of_mesh = dataclasses.replace(train, global_batch_size=rows, accumulation=1)
    job = to_job(dataclasses.replace(opened.config, train=rows_of_mesh))
    dataset = open_dataset(job)
    if dataset.evaluation is None:
        raise InputError(
            f"{dataset.directory}: no document was held out (data.validation_fraction), so there is nothing to "
            "evaluate on. Give a file with --text."
        )
    options = LossOptions(chunk_tokens=train.loss_chunk_tokens)
    evaluator = make_evaluator(blueprint, opened.execution, options, dataset.index.token_counts)
    return evaluator(opened.params, evaluation_batches(dataset, job, blueprint.mesh))._asdict()
