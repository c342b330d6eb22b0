"""``lmjax generate``."""

from typing import Annotated

import typer

from lmjax.cli.arguments import AsJson, Overrides
from lmjax.cli.model import ModelArgument, open_model
from lmjax.cli.table import print_json


def generate(
    model: ModelArgument,
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token every time.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the random numbers; each prompt has its own.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Continue prompts with a trained model.

    Without --prompt, a text is made from its beginning. KEY=VALUE may be of mesh, precision and data.path.

    Example: lmjax generate runs/quickstart --prompt "def main(" --max-tokens 100
    """
    opened = open_model(model, overrides or (), ("mesh", "precision", "data.path"))
    import jax

    from lmjax.generate.decode import Generator

    prompts = prompt or [""]
    generator = Generator(opened.blueprint, opened.execution, opened.tokenizer)
    ids = [generator.encode(text) for text in prompts]
    found = generator.generate(opened.params, ids, max_tokens=max_tokens, temperature=temperature, seed=seed)
    samples = []
    for text, tokens, new in zip(prompts, ids, found, strict=True):
        added = generator.text(tokens, new.tokens)
        samples.append({"prompt": text, "text": added, "tokens": len(new.tokens), "finished": new.finished})
    if jax.process_index() != 0:
        return
    if as_json:
        print_json({"step": opened.step, "samples": samples})
        return
    for number, sample in enumerate(samples, start=1):
        if len(samples) > 1:
            print(f"--- prompt {number} ---")
        print(sample["prompt"] + sample["text"])
