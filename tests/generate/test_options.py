"""Options that cannot be, or would have no effect."""

import dataclasses
import re

import pytest

from lmjax.errors import InputError
from lmjax.generate.options import Options

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "the number of new tokens is 0; ask for 1 or more"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it has to be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.5}, "min_p is -0.5"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": ("end", "")}, "a stop string is empty"),
        ({"temperature": 0.0, "top_k": 3, "min_p": 0.1}, "top_k, min_p: no effect at temperature 0"),
        ({"temperature": 0.0, "num_samples": 2}, "num_samples: no effect at temperature 0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Options(**options)


def test_more_than_the_vocabulary_is_refused():
    Options(top_k=90, logprobs=90).check_vocabulary(90)
    for name in ("top_k", "logprobs"):
        with pytest.raises(InputError, match=f"{name} is 91, but the vocabulary has 90 tokens; ask for at most 90"):
            dataclasses.replace(Options(), **{name: 91}).check_vocabulary(90)
