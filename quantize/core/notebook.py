"""How results show themselves in a notebook: a small table, escaped, in the notebook's own colours."""

from collections.abc import Iterable, Sequence
from html import escape


def table(title: str, rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """HTML of a heading, a row for each of `rows` (its first cell is the row's heading) and a line for each note."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(str(first))}</th>"
        + "".join(f"<td style='text-align:left'>{escape(str(cell))}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    lines = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return f"<div><strong>{escape(title)}</strong><table>{cells}</table>{lines}</div>"
