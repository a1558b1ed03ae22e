"""Text: sizes in bytes, durations, beginnings, how far two texts agree, and which name was meant."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def size(count: float) -> str:
    """Bytes in a decimal unit, three digits, such as 1.20 GB."""
    unit, name = byte_unit(count)
    value = count / unit
    return f"{value:,.{0 if value >= 100 or unit == 1 else 1 if value >= 10 else 2}f} {name}"


def byte_unit(size: float) -> tuple[float, str]:
    """The decimal unit `size` bytes read best in."""
    return next((u for u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u[0]), (1.0, "bytes"))


def duration(seconds: float) -> str:
    """An estimate of time in the unit a person would use: 20 minutes, 3.5 hours, 5.7 days."""
    unit, name = (60, "minute") if seconds < 2 * 3600 else (3600, "hour") if seconds < 2 * 86400 else (86400, "day")
    count = seconds / unit
    shown = f"{count:.1f}".removesuffix(".0") if name != "minute" and count < 10 else f"{max(1.0, count):,.0f}"
    return f"{shown} {name}{'' if shown == '1' else 's'}"


def meant(typed: str, known: Iterable[str]) -> str:
    """ ", did you mean 'gptq'?": the known name nearest to the one that was typed; "" where none is near."""
    near = difflib.get_close_matches(typed, list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def printable(text: str) -> str:
    """`text` with what a terminal would act on, or a reader not see, as Python writes it: \\x1b, \\u202e, \\ud800."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(text: str, most: int) -> str:
    """`text`; where it is longer than `most` characters, so much of it with an ellipsis at the end."""
    return text if len(text) <= most else text[: most - 1] + "…"


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading characters, or items, two texts or lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
