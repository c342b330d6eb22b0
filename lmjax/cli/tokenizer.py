"""``lmjax tokenizer``: train a tokenizer."""

from lmjax.cli.arguments import ConfigFile, Overrides


def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train the tokenizer of a config on its sources, without preparing the rest of the dataset.

    Example: lmjax tokenizer train configs/quickstart.yaml tokenizer.vocab_size=8192
    """
