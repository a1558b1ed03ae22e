"""How numbers and names read on the page: units, signs, how many digits."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from quantpress.recipe import Recipe

NBSP = "\u00a0"  # a number and its unit stay on one line


def size(count: float) -> str:
    """Bytes in a decimal unit, three digits."""
    unit, name = byte_unit(count)
    value = count / unit
    return f"{value:,.{0 if value >= 100 or unit == 1 else 1 if value >= 10 else 2}f}{NBSP}{name}"


def number(value: float) -> str:
    """A perplexity: two decimals, fewer when it is large."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.1e}"


def small(value: float) -> str:
    """Three significant digits, never an exponent above 1e-5."""
    if not math.isfinite(value):
        return "not finite"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:.{max(0, digits)}f}" if abs(value) >= 1e-5 or not value else f"{value:.1e}"


def spread(value: float) -> str:
    """A standard error: two significant digits."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def change(fraction: float) -> str:
    """A signed percentage; thousands of percent as a factor."""
    if not math.isfinite(fraction):
        return "not finite"
    percent = 100 * fraction
    if percent >= 1000:
        return f"{1 + fraction:,.0f}× as high"
    text = f"{percent:+.1f}{NBSP}%" if abs(percent) >= 0.1 else f"{percent:+.2f}{NBSP}%"
    return text.replace("-", "−")


def share(fraction: float) -> str:
    """A percentage, three significant digits; 100 % only when it is."""
    percent = 100 * fraction
    if not math.isfinite(percent):
        return "not finite"
    text = "100" if percent == 100 else f"{min(percent, 99.99):.4g}" if 99.9 < percent < 100 else small(percent)
    return f"{text}{NBSP}%"


def confidence(low: float, high: float) -> str:
    """A range of probabilities."""
    return f"{100 * low:.0f} to {100 * high:.0f}{NBSP}%"


def score(value: float) -> str:
    """A task's score, or an error of it, in hundredths: 61.3."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "not finite"


def interval(ends: tuple[float, float], how: Callable[[float], str]) -> str:
    """A 95% interval, each end as `how` writes it."""
    low, high = how(ends[0]), how(ends[1])
    unit = f"{NBSP}%"
    return f"{low.removesuffix(unit)} to {high}" if low.endswith(unit) and high.endswith(unit) else f"{low} to {high}"


def gate_name(name: str) -> str:
    """`max_perplexity_increase` reads as «perplexity increase», `min_recovery.arc_easy` as «recovery of arc_easy»."""
    what, _, task = name.removeprefix("max_").removeprefix("min_").partition(".")
    words = what.replace("_", " ")
    known = {"kl": "mean KL divergence", "kl p99": "KL divergence, 99 %", "top1 agreement": "same next token"}
    words = (known | {"bytes": "size on disk", "tokens per second": "tokens a second"}).get(words, words)
    return f"{words} of {task}" if task else words


def sentence(text: str) -> str:
    """With a capital at its start; a name such as vLLM stays as it is."""
    return text if text[1:2].isupper() else text[:1].upper() + text[1:]


def points(fraction: float) -> str:
    """A signed difference of scores in hundredths."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def program(name: str) -> str:
    """What a server of the smoke test is called."""
    return {"vllm": "vLLM", "transformers": "transformers serve", "url": "a running server"}.get(name, name)


def given(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says that does not go without saying: read again, it is the same recipe."""
    out: dict[str, Any] = _beyond(dict(recipe), Recipe().model_dump(mode="json"))
    return out


def _beyond(value: Any, default: Any) -> Any:
    """`value` without what `default` has too, and without nulls where that says nothing; another method stays whole."""
    if isinstance(value, list):
        return [_beyond(item, None) for item in value]
    if not isinstance(value, dict):
        return value
    known = default if isinstance(default, dict) else {}
    said = {k: v for k, v in value.items() if v != known.get(k) or (k == "name" and v is not None)}
    return {k: v if _is_another(v, known.get(k)) else _beyond(v, known.get(k)) for k, v in said.items()}


def _is_another(value: Any, default: Any) -> bool:
    """Whether `value` is another method than the default one, so that equal keys need not mean the same."""
    both = isinstance(value, dict) and isinstance(default, dict) and "name" in default
    return both and value.get("name") != default["name"]


def gate(value: float | None, name: str) -> str:
    """A gate's limit or value in the unit its name calls for."""
    if value is None:
        return "not measured"
    if "increase" in name:
        return change(value)
    return (
        share(value) if "agreement" in name or "recovery" in name else size(value) if "bytes" in name else small(value)
    )


def seconds(value: float) -> str:
    """A duration: seconds, minutes or hours."""
    if value < 120:
        return f"{value:.1f}{NBSP}s" if value < 10 else f"{value:.0f}{NBSP}s"
    return f"{value / 60:.1f}{NBSP}min" if value < 7200 else f"{value / 3600:.1f}{NBSP}h"


def cell(text: str) -> str:
    """Text that stays inside one cell of a Markdown table and is not taken for markup."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def byte_unit(size: float) -> tuple[float, str]:
    """The decimal unit `size` bytes read best in."""
    return next((u for u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u[0]), (1.0, "bytes"))


def first_word(text: str) -> str:
    """The first word of a text with the space before it; only space where there is no word."""
    found = re.match(r"\s*\S+|\s+", text)
    return found.group() if found else ""


def squeezed(text: str) -> str:
    """At most one blank line in a row, and no line of spaces alone: a broken model writes hundreds."""
    return re.sub(r"\n[ \t]*(?:\n\s*)+\n", "\n\n", text)


def shorten(text: str, most: int = 30) -> str:
    """At most `most` characters, the last an ellipsis when some are missing."""
    return text if len(text) <= most else text[: most - 1] + "…"
