"""Numbers as text: units, signs and how many digits. A number and its unit are joined by a no-break space."""

import math
from collections.abc import Callable

from quantpress.core import text

__all__ = [
    "change", "confidence", "interval", "number", "percent_error", "plain", "points", "score", "seconds", "share",
    "size", "small", "spread",
]  # fmt: skip

NBSP = "\u00a0"  # a number and its unit stay on one line


def size(count: float) -> str:
    """Bytes in a decimal unit, three digits."""
    return text.size(count).replace(" ", NBSP)


def number(value: float) -> str:
    """A perplexity: two decimals, fewer when it is large."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.1e}"


def plain(text: str) -> str:
    """The text with ordinary spaces, for records and programs."""
    return text.replace(NBSP, " ")


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
    return f"{value:,.{max(0, 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"


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
    """A percentage, three significant digits or more; 100 % only when it is."""
    percent = 100 * fraction
    if not math.isfinite(percent):
        return "not finite"
    text = "100" if percent == 100 else small(percent)
    if 99.9 < percent < 100 or 100 < percent < 101:
        text = f"{min(percent, 99.99):.4g}" if percent < 100 else f"{max(percent, 100.1):.1f}"
    return f"{text}{NBSP}%"


def percent_error(fraction: float) -> str:
    """The standard error of a percentage, two digits."""
    return f"{spread(100 * fraction)}{NBSP}%"


def confidence(low: float, high: float) -> str:
    """A range of probabilities."""
    return f"{100 * low:.0f} to {100 * high:.0f}{NBSP}%"


def score(value: float) -> str:
    """A task's score, or an error of it, in hundredths: 61.3."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "not finite"


def points(fraction: float) -> str:
    """A signed difference of scores in hundredths."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def seconds(value: float) -> str:
    """A duration: seconds, minutes or hours."""
    if value < 120:
        return f"{value:.1f}{NBSP}s" if value < 10 else f"{value:.0f}{NBSP}s"
    return f"{value / 60:.1f}{NBSP}min" if value < 7200 else f"{value / 3600:.1f}{NBSP}h"


def interval(ends: tuple[float, float], how: Callable[[float], str]) -> str:
    """A 95% interval, each end as `how` writes it."""
    low, high = how(ends[0]), how(ends[1])
    unit = next((unit for unit in (f"{NBSP}%", "× as high") if low.endswith(unit) and high.endswith(unit)), "")
    return f"{low.removesuffix(unit)} to {high}"
