"""Import or export a model in a process that is ended when it takes more memory than a limit.

python -m tests.convert.convert_under_limit import|export SOURCE OUT BUDGET LIMIT
"""

import sys
from pathlib import Path

from lmjax.checkpoint.slices import open_step
from lmjax.convert.exporting import export_model
from lmjax.convert.importing import CHECKPOINTS, HUGGING_FACE, MODEL_FILE, import_model
from tests.convert.large_model import Watch


def main(direction: str, source: Path, out: Path, budget: int, limit: int) -> None:
    watch = Watch(limit)
    if direction == "import":
        import_model(source, out, memory_budget=budget)
    else:
        from lmjax.config import load_model

        config = load_model(str(source / MODEL_FILE))
        with open_step(source / CHECKPOINTS) as step:
            export_model(step, config, out, huggingface=source / HUGGING_FACE, memory_budget=budget)
    print(watch.peak)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
