"""One HTML file that needs no other: a page of tables and pictures."""

import base64
import html
import io
from collections.abc import Sequence

from etils import epath
from matplotlib.figure import Figure

from lmjax.errors import InputError
from lmjax.paths import is_remote, write_object

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
.curves img { width: 100%; height: auto; } .curves img:first-child { grid-column: 1 / -1; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; }
td { font-variant-numeric: tabular-nums; border-top: 1px solid #ddd; overflow-wrap: anywhere; }
pre { background: #f6f6f4; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; }
pre b { color: #06c; } .note { color: #666; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole file; ``parts`` are markup."""
    title, body = html.escape(title), "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{STYLE}</style></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text, not markup."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join(["<table>", *lines, "</table>"])


def images(pictures: Sequence[tuple[str, bytes]]) -> str:
    """Pictures, each a description and a PNG; the first over the whole width."""
    shown = [
        f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for alt, png in pictures
    ]
    return "\n".join(['<div class="curves">', *shown, "</div>"])


def to_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    # No version or date in the file: the same picture gives the same bytes.
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()


def write_page(path: epath.Path, text: str, option: str) -> None:
    """Raises InputError where the directory does not exist, or the store of an object cannot be used."""
    if is_remote(path):
        write_object(path, text.encode())
        return
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.parent}. Make it, or name another {option}.")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
