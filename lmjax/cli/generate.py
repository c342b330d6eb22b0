"""``lmjax generate``."""

import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from lmjax.cli.arguments import AsJson, Overrides
from lmjax.cli.model import ModelArgument, OpenModel, open_model
from lmjax.cli.prompts import read_prompts
from lmjax.cli.table import print_json
from lmjax.errors import InputError

MARK = "prompt> "


def generate(
    model: ModelArgument,
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Texts to continue: one a line, or the prompt of each line of a .jsonl file."
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Continue each line that is typed, until the input ends (Ctrl-D).")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token every time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the fewest tokens that have this probability together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens at least this share as probable as the most probable one.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End a text before this string; may be given several times.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="Report each token's log-probability, and those of so many best ones in its place."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers; each prompt has its own.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 16,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write one JSON object a sample to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts with a trained model.

    Without prompts, each line that is typed at a terminal is continued; with no terminal, a text is made from its
    beginning. A sample depends on its prompt and the seed, not on the prompts beside it. KEY=VALUE may be of mesh,
    precision and data.path.

    Example: lmjax generate runs/quickstart --prompt "def main(" --max-tokens 100
    """
    from lmjax.generate.options import Options

    options = Options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        num_samples=num_samples,
        stop=tuple(stop or ()),
        logprobs=logprobs,
        seed=seed,
    )
    sources = {"--prompt": prompt, "--prompts": prompts, "--interactive": interactive}
    given = [name for name, value in sources.items() if value]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: give one of them; each says where the prompts come from")
    if output is not None and as_json:
        raise InputError("--output and --json: give one of them; the lines of --output are JSON")
    if batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; take 1 prompt at a time or more")
    reported = as_json or output is not None
    if not given and not reported and sys.stdin.isatty():
        interactive = True
    if interactive and reported:
        raise InputError(f"--interactive: no effect of {'--json' if as_json else '--output'}; give --prompts FILE")
    if logprobs is not None and not reported:
        raise InputError("--logprobs: they are printed with --json and written with --output; give one of the two")
    texts = read_prompts(prompts) if prompts else prompt or [""]
    opened = open_model(model, overrides or (), ("mesh", "precision", "data.path"))
    import jax

    from lmjax.generate.decode import Generator

    generator = Generator(opened.blueprint, opened.execution, opened.tokenizer, opened.end_ids)
    if interactive:
        if jax.process_count() > 1:
            raise InputError(f"--interactive: one process reads a terminal, and these are {jax.process_count()}")
        _talk(generator, opened, options)
        return
    ids = [generator.encode(text) for text in texts]
    if len(texts) == 1 and num_samples == 1 and not reported:
        _print_as_it_comes(generator, opened, texts[0], ids[0], options)
        return
    found = generator.generate_batches(opened.params, ids, options, batch_size)
    if output is not None:
        _write(output, _records(opened, texts, found))
        return
    records = list(_records(opened, texts, found))
    if jax.process_index() != 0:
        return
    if as_json:
        print_json({"step": opened.step, "samples": records})
        return
    for record in records:
        sample = f", sample {record['sample']}" if num_samples > 1 else ""
        print(f"--- prompt {record['number']}{sample} ---")
        print(record["prompt"] + record["text"])


def _print_as_it_comes(generator: Any, opened: OpenModel, prompt: str, ids: Sequence[int], options: Any) -> None:
    import jax

    first = jax.process_index() == 0

    def show(number: int, sample: int, piece: str) -> None:
        if first:
            print(piece, end="", flush=True)

    generator.check([ids], options)
    if first:
        print(prompt, end="", flush=True)
    generator.generate(opened.params, [ids], options, show)
    if first:
        print()


def _talk(generator: Any, opened: OpenModel, options: Any) -> None:
    """Continue every line of the standard input; one that cannot be continued is refused, and the next one read."""
    while True:
        try:
            line = input(MARK if sys.stdin.isatty() else "")
        except EOFError:
            return
        try:
            ids = generator.encode(line)
            generator.check([ids], options)
        except InputError as error:
            print(f"lmjax: {error}", file=sys.stderr)
            continue
        if options.num_samples == 1:
            _print_as_it_comes(generator, opened, line, ids, options)
            continue
        (samples,) = generator.generate(opened.params, [ids], options)
        for number, sample in enumerate(samples, start=1):
            print(f"--- sample {number} ---\n{line}{sample.text}", flush=True)


def _records(opened: OpenModel, prompts: Sequence[str], found: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """What is reported of every sample, in the order of the prompts."""

    def named(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": opened.tokenizer.decode([token]), "logprob": logprob}

    for number, (prompt, samples) in enumerate(zip(prompts, found, strict=True), start=1):
        for sample, new in enumerate(samples, start=1):
            record = {
                "number": number,
                "sample": sample,
                "prompt": prompt,
                "text": new.text,
                "tokens": len(new.tokens),
                "token_ids": new.tokens,
                "finish_reason": new.finish_reason,
                "finished": new.finish_reason != "length",
            }
            if new.logprobs is not None:
                record["logprobs"] = [
                    named(one.token, one.logprob) | {"best": [named(*other) for other in one.best]}
                    for one in new.logprobs
                ]
            yield record


def _write(output: str, records: Iterator[dict[str, Any]]) -> None:
    """One record a line, as they come. Every process takes part in making them, and the first one writes."""
    import contextlib
    import json

    import jax
    from etils import epath

    first = jax.process_index() == 0
    with epath.Path(output).open("w") if first else contextlib.nullcontext() as file:
        for record in records:
            if file is not None:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
