"""The charts as files, for places that cannot show the page: SVG in the page's light colours, and PNG made from it."""

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

import resvg_py
from jinja2 import Environment

from ..measure.sections import TaskResult
from .heatmap import LIGHT
from .measured_run import MeasuredRun

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_FOLDER = resources.files(__package__)


def svg(pages: Environment, chart: str, caption: str, **what: Any) -> str:
    """Draw `chart`, a macro of figures.svg that is given `what`, with `caption` below it."""
    template = pages.get_template("figures.svg", globals={"chart_style": _style()})
    drawn = getattr(template.module, chart)(textwrap.wrap(caption, 140), **what)
    return _NOT_XML.sub("\ufffd", str(drawn))


@lru_cache(maxsize=32)
def png(drawing: str) -> bytes:
    """Two pixels per px, in a font of ours: the same bytes on every machine.

    What was drawn a moment ago is not drawn again: a page is written anew with every run of a sweep.
    """
    fonts = _FOLDER / "fonts"
    return resvg_py.svg_to_bytes(
        svg_string=drawing, zoom=2, skip_system_fonts=True, sans_serif_family="DejaVu Sans",
        font_files=[str(fonts / "DejaVuSans.ttf"), str(fonts / "DejaVuSans-Bold.ttf")],
    )  # fmt: skip


def _style() -> str:
    """The rules of style.css for drawings, its variables replaced by their light colours."""
    css = (_FOLDER / "templates" / "style.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--([\w-]+): (#\w+);", css.partition("@media")[0]))
    rules = [line for line in css.splitlines() if line.startswith(("svg ", ".forest "))]
    rules += [f".h{i} {{ fill: {color}; }}" for i, color in enumerate(LIGHT)]
    return re.sub(r"var\(--([\w-]+)\)", lambda name: light[name[1]], "\n".join(rules))


def divergence_axis(runs: Sequence[MeasuredRun]) -> Callable[[float], float]:
    """A bar's length as a share of the longest, for a KL divergence; 0 where it is not finite."""
    values = [bucket.kl_mean for run in runs for bucket in run.divergence.confidence]
    most = max((v for v in values if math.isfinite(v)), default=0.0) or 1.0
    return lambda value: value / most if math.isfinite(value) else 0.0


def recovery_axis(tasks: Sequence[TaskResult], start: float, stop: float) -> Callable[[float], float]:
    """A linear axis for recoveries that covers every interval and 100 %; values beyond are clamped to its ends."""
    ends = [end for task in tasks for end in (*(task.recovery_interval or ()), task.recovery or 1.0, 1.0)]
    finite = [end for end in ends if math.isfinite(end)]
    low, high = min(finite, default=0.9), max(finite, default=1.1)
    pad = max(0.01, 0.06 * (high - low))

    def at(value: float) -> float:
        place = (min(max(value, low), high) - low + pad) / (high - low + 2 * pad)
        return start + place * (stop - start)

    return at


def recovery_ticks(at: Callable[[float], float]) -> list[float]:
    """Round recoveries for the scale of an axis, 40 px or more apart: 100 % and those to either side."""
    for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        if at(1.0 + step) - at(1.0) >= 40 or at(1.0) - at(1.0 - step) >= 40:
            break
    found = [1.0 + step * k for k in range(-5, 6)]
    return [value for value in found if value >= 0 and (value == 1.0 or at(value) not in (at(-9.0), at(9.0)))]
