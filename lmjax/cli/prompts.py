"""A file of prompts."""

import json

from lmjax.errors import InputError


def read_prompts(file: str) -> list[str]:
    """The lines of a text file, or the ``prompt`` of every line of a .jsonl file, both UTF-8.

    Raises InputError for a file that is missing, empty, or has a line with no prompt.
    """
    from etils import epath

    path = epath.Path(file)
    if not path.exists() or path.is_dir():
        what = "a directory" if path.exists() else "no such file"
        raise InputError(f"{file}: {what}; give a file of prompts, one a line")
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); convert it first") from None
    lines = content.split("\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"{file}: no prompt in it; write one a line")
    read = _of_json if path.suffix == ".jsonl" else _of_text
    return [read(line.removesuffix("\r"), f"{file}:{number}") for number, line in enumerate(lines, start=1)]


def _of_text(line: str, where: str) -> str:
    if not line:
        raise InputError(
            f'{where}: an empty line; remove it, or write the prompts as JSON ({{"prompt": ""}}) in a .jsonl file'
        )
    return line


def _of_json(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); each line of a .jsonl file is one object") from None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str):
        raise InputError(f'{where}: no text under "prompt"; write {{"prompt": "…"}}')
    return prompt
