"""From text files to shards with a tokenizer that is there: ``lmjax data prepare`` against the tokenizer alone.

    python -m benchmarks.prepare [--tokenizer tokenizer.model]

The corpus is the standard library of Python, as prose, with a line in each document that is not ASCII, so that ftfy
and the Unicode form have work. The peer has all texts in memory and encodes them one by one in a plain loop, on one
core. We read, clean, split, find duplicates, encode, write shards with checksums and plan the packing, on one core
without and with ftfy, and on two. All run one after the other in each round, every one in a process of its own that
is started and has imported what it needs before its clock runs; workers start while it runs. ``ratio`` is the median
of the peer's seconds by ours, on one core without ftfy; ``two_cores`` is the median of our seconds on one core, the
mean of a run before and one after, since a shared machine's speed drifts, by those on two, and ``two_cores_by_peer``
of the peer's seconds by those. Where other work shares the machine, the same of the seconds that the processors worked
says more: ``ratio_cpu``, and ``two_cores_cpu``, which is under 1 by what two cores cost each other. Then the peak
memory of one process is taken on a quarter of the corpus and on ten times that. Without --tokenizer, SentencePiece
trains one of 8,192 tokens first. The last line is one JSON object.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.data.config import DataConfig, FilesSource
from lmjax.data.prepare import prepare
from lmjax.data.sample import sample_texts, train_model
from lmjax.data.sources import list_files
from lmjax.data.tokenizer import HuggingFaceFile, SentencePieceFile, SentencePieceTrained, load_tokenizer

LINE = "\nA naïve résumé of the café — “quoted”, as people write it … 10 €\n"
GROWTH = 10


class Measured(NamedTuple):
    """What one process did."""

    seconds: float
    cpu_seconds: float
    """Of the process and its children."""
    peak_bytes: int
    """Resident memory of the process at its peak."""
    tokens: int


def write_corpus(directory: Path, num_bytes: int) -> None:
    """Files of about so many bytes together, all different."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path for path in sorted(root.rglob("*.py")) if not {"site-packages", "test", "encodings"} & {*path.parts}]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in names]
    directory.mkdir()
    written = 0
    while written < num_bytes:
        for number, text in enumerate(texts):
            content = f"Copy {written} of {number}{LINE}{text}".encode()
            (directory / f"{written:012d}.txt").write_bytes(content)
            written += len(content)
            if written >= num_bytes:
                return


def data_config(corpus: Path, output: Path, *, num_workers: int, ftfy: bool) -> DataConfig:
    return DataConfig(
        path=str(output),
        sources=(FilesSource(path=str(corpus)),),
        sequence_length=1024,
        num_workers=num_workers,
        ftfy=ftfy,
    )


def peer(corpus: Path, tokenizer: Path) -> Measured:
    """The tokenizer alone, as its package has it."""
    texts = [path.read_bytes().decode() for path in sorted(corpus.iterdir())]
    encode: Callable[[str], Any]
    if tokenizer.suffix == ".json":
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import tokenizers

        package = tokenizers.Tokenizer.from_file(str(tokenizer))
        package.no_truncation()
        package.no_padding()
        encode = lambda text: package.encode(text, add_special_tokens=False).ids  # noqa: E731
    else:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        encode = lambda text: processor.encode(text, num_threads=1)  # noqa: E731
    return measured(lambda: sum(len(encode(text)) for text in texts))


def ours(corpus: Path, tokenizer: Path, num_workers: int, ftfy: bool) -> Measured:
    """``lmjax data prepare`` into a directory that is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=corpus.parent) as folder:
        data = data_config(corpus, Path(folder) / "dataset", num_workers=num_workers, ftfy=ftfy)
        kind = HuggingFaceFile if tokenizer.suffix == ".json" else SentencePieceFile
        said = []
        return measured(
            lambda: sum(shard.tokens for shard in prepare(data, kind(path=str(tokenizer)), announce=said.append).shards)
        )


def measured(work: Callable[[], int]) -> Measured:
    before, began = cpu_seconds(), time.perf_counter()
    tokens = work()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Measured(seconds, cpu_seconds() - before, peak, tokens)


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def alone(num_cores: int, function: Callable[..., Measured], *arguments: Any) -> Measured:
    """In a process of its own, on so many cores."""
    cores = sorted(os.sched_getaffinity(0))[-num_cores:]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, os.sched_setaffinity, (0, cores)) as executor:
        return executor.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--mebibytes", type=float, default=128, help="size of the corpus")
    parser.add_argument("--tokenizer", type=Path, help="a .model or tokenizer.json file; else one is trained")
    arguments = parser.parse_args()
    size = int(arguments.mebibytes * 2**20)
    smaller = size // 4
    rounds: list[dict[str, Measured]] = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        write_corpus(corpus, size)
        tokenizer = arguments.tokenizer or Path(folder) / "tokenizer.model"
        if arguments.tokenizer is None:
            data = data_config(corpus, Path(folder) / "none", num_workers=1, ftfy=False)
            texts = sample_texts(list_files(data.sources), data, 2 * 2**20)
            tokenizer.write_bytes(train_model(SentencePieceTrained(vocab_size=8192), texts))
        for number in range(arguments.rounds):
            found = {
                "ours_ftfy": alone(1, ours, corpus, tokenizer, 1, True),
                "peer": alone(1, peer, corpus, tokenizer),
                "ours": alone(1, ours, corpus, tokenizer, 1, False),
                "ours_two_cores": alone(2, ours, corpus, tokenizer, 2, False),
                "ours_again": alone(1, ours, corpus, tokenizer, 1, False),
            }
            rounds.append(found)
            print(
                f"round {number}: "
                + ", ".join(f"{name} {row.seconds:.2f} s ({row.cpu_seconds:.2f} CPU)" for name, row in found.items()),
                flush=True,
            )
        shutil.rmtree(corpus)
        peaks = []
        for factor in (1, GROWTH):
            grown = Path(folder) / f"corpus-{factor}"
            write_corpus(grown, smaller * factor)
            peaks.append(alone(1, ours, grown, tokenizer, 1, False).peak_bytes)
            print(f"{factor * smaller / 2**20:g} MiB of text: {peaks[-1] / 2**20:.0f} MiB at the peak", flush=True)
            shutil.rmtree(grown)
        loaded = load_tokenizer(tokenizer)

    def ratio(over: str, under: str, field: str = "seconds") -> float:
        return round(statistics.median(getattr(row[over], field) / getattr(row[under], field) for row in rounds), 3)

    def scaling(field: str) -> float:
        of_rounds = [{name: getattr(found, field) for name, found in row.items()} for row in rounds]
        return round(
            statistics.median((row["ours"] + row["ours_again"]) / 2 / row["ours_two_cores"] for row in of_rounds), 3
        )

    result = {
        "name": "prepare",
        "ratio": ratio("peer", "ours"),
        "ratio_cpu": ratio("peer", "ours", "cpu_seconds"),
        "ratio_ftfy": ratio("peer", "ours_ftfy"),
        "ratio_ftfy_cpu": ratio("peer", "ours_ftfy", "cpu_seconds"),
        "two_cores": scaling("seconds"),
        "two_cores_cpu": scaling("cpu_seconds"),
        "two_cores_by_peer": ratio("peer", "ours_two_cores"),
        "peak_mebibytes": [round(peak / 2**20) for peak in peaks],
        "peak_growth": round(peaks[1] / peaks[0], 3),
        "tokens_per_second": round(statistics.median(row["ours"].tokens / row["ours"].seconds for row in rounds)),
        "run": f"{arguments.mebibytes:g} MiB of text (memory: a quarter, and {GROWTH} times that), "
        f"{loaded.kind} tokenizer of {loaded.vocab_size} tokens, {arguments.rounds} rounds",
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("sentencepiece", "tokenizers", "ftfy")},
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
