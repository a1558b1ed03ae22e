"""The charts as PNG (two pixels per px) and SVG, in light colours, for places that cannot show the page.

Each function draws one figure; `files` gives it in both formats, the same bytes every time.
"""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..measure.formatting import confidence, share, small
from ..measure.results import Divergence, TaskResult
from .heatmap import LEVELS, LIGHT, Cell, Heat, HeatScale
from .page_text import shorten
from .tradeoff import FONT, Box, Plot

_SERIES = ("#2459c4", "#cd6049", "#2f8f6b", "#8a5bb0", "#b58a1b", "#5b6470")
_INK, _MUTED, _LINE, _ACCENT = "#1b1f24", "#5b6470", "#d9dde2", "#2459c4"


def tradeoff_figure(plot: Plot, heading: str, footer: str) -> Figure:
    """The trade-off chart; footer: the model and its caveat."""
    lines = textwrap.wrap(footer, plot.width // 6)
    top, bottom = 34, 12 + 14 * len(lines)
    figure, axes = _canvas(plot.width, plot.height + top + bottom, -top)
    _text(axes, 14, -top + 24, heading, size=14, weight="bold")
    _footer(axes, plot.height + 12, lines)
    left, upper, right, lower = plot.frame
    for y, text in plot.y_ticks:
        axes.plot([left, right], [y, y], color=_LINE, lw=0.6)
        _text(axes, left - 8, y + 4, text, ha="right", color=_MUTED)
    for x, text in plot.x_ticks:
        axes.plot([x, x], [lower, lower + 4], color=_MUTED, lw=0.6)
        _text(axes, x, lower + 18, text, ha="center", color=_MUTED)
    axes.plot([left, right], [lower, lower], color=_MUTED, lw=0.8)
    _text(axes, (left + right) / 2, lower + 40, plot.x_title, ha="center", color=_MUTED)
    _text(axes, left - 44, upper - 16, plot.y_title, color=_MUTED)
    if plot.front:
        axes.plot(*zip(*plot.front, strict=True), color=_ACCENT, lw=1.2, alpha=0.55)
    for mark in plot.marks:
        color = {"original": _INK, "front": _ACCENT, "dominated": "#9aa3ae"}[mark.role]
        if mark.whisker:
            axes.plot([mark.x, mark.x], mark.whisker, color=color, lw=1, alpha=0.5)
        if mark.label.leader:
            axes.plot([mark.x, mark.label.leader[0]], [mark.y, mark.label.leader[1]], color=_MUTED, lw=0.5)
        shape = ">" if mark.off_axis else "s" if mark.role == "original" else "o"
        axes.plot([mark.x], [mark.y], shape, ms=6.5, color=color, mec="white", mew=0.8, zorder=3)
        align = {"start": "left", "middle": "center", "end": "right"}[mark.label.anchor]
        _text(axes, mark.label.x, mark.label.y, mark.label.text, ha=align,
              color=_MUTED if mark.role == "dominated" else _INK)  # fmt: skip
    return figure


def layers_figure(heats: Mapping[str, Heat], scale: HeatScale | None, footer: str) -> Figure:
    """One heatmap per run, on a common colour scale."""
    cell, left, width = 17, 150, 860
    heights = [len(h.kinds) * cell + 62 for h in heats.values()]
    lines = textwrap.wrap(footer, width // 6)
    height = sum(heights) + 84 + 14 * len(lines)
    figure, axes = _canvas(width, height, 0)
    _text(axes, 14, 24, "Relative error by layer (log scale)", size=14, weight="bold")
    top = 34
    for (name, h), tall in zip(heats.items(), heights, strict=True):
        _text(axes, 14, top + 16, shorten(name, 90), weight="bold")
        wide = min(28.0, (width - left - 24) / max(1, len(h.blocks)))
        for row, kind in enumerate(h.kinds):
            _text(axes, left - 8, top + 26 + row * cell + 12, shorten(kind, 18), ha="right", color=_MUTED)
            for c in h.of(kind):
                at = (left + h.blocks.index(c.block) * wide, top + 26 + row * cell)
                _paint(axes, (*at, wide - 1, cell - 1), c, scale)
        base = top + 26 + len(h.kinds) * cell + 12
        for i, block in enumerate(h.blocks):
            if i % max(1, math.ceil(len(h.blocks) / 16)) == 0:
                _text(axes, left + (i + 0.5) * wide, base, str(block), ha="center", size=10, color=_MUTED)
        _text(axes, left - 8, base, "block", ha="right", size=10, color=_MUTED)
        top += tall
    if scale:
        for i, color in enumerate(LIGHT):
            axes.add_patch(Rectangle((left + i * 34, top), 34, 12, color=color, lw=0))
        for i, edge in list(enumerate(scale.edges()))[::3]:
            align = "left" if i == 0 else "right" if i == LEVELS else "center"
            _text(axes, left + i * 34, top + 26, f"{100 * edge:.2g} %", ha=align, size=10, color=_MUTED)
    _text(axes, left + LEVELS * 34 + 40, top + 10, "hatched: left in 16 bit; grey: not measured", size=10, color=_MUTED)
    _footer(axes, top + 52, lines)
    return figure


def _paint(axes: Any, box: Box, cell: Cell, scale: HeatScale | None) -> None:
    x, y, w, h = box
    if cell.worst is not None and scale and cell.quantized:
        patch = Rectangle((x, y), w, h, facecolor=LIGHT[scale.level(cell.worst)], lw=0)
    else:
        patch = Rectangle((x, y), w, h, facecolor="#f1f3f5", edgecolor="#9aa3ae", lw=0.3,
                          hatch="" if cell.quantized else "/////")  # fmt: skip
    axes.add_patch(patch)


def _canvas(width: int, height: int, top: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width / 100, height / 100), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(top + height, top)
    axes.axis("off")
    return figure, axes


def _text(axes: Any, x: float, y: float, text: str, size: float = FONT, color: str = _INK, **style: Any) -> None:
    # 1 px is 0.72 points; a dollar sign in a name does not start a formula
    axes.text(x, y, text, fontsize=0.72 * size, color=color, family="DejaVu Sans", parse_math=False, **style)


def _footer(axes: Any, top: float, lines: list[str]) -> None:
    for i, line in enumerate(lines):
        _text(axes, 14, top + 14 * i, line, size=10, color=_MUTED)


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def files(name: str, figure: Figure) -> dict[str, bytes]:
    """NAME.png and NAME.svg, with text kept as text."""
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "quantpress"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return {f"{name}.png": png(figure), f"{name}.svg": out.getvalue()}


def divergence_figure(away: Mapping[str, Divergence], footer: str) -> Figure:
    """Mean KL divergence by the original's confidence: a group of bars per bucket, a bar per run."""
    width, left, top = 860, 150, 52
    buckets = len(next(iter(away.values())).confidence)
    bar = 13 if len(away) > 1 else 18
    group = bar * len(away) + 14
    lines = textwrap.wrap(footer, width // 6)
    base = top + group * buckets
    figure, axes = _canvas(width, base + 62 + 16 * len(away) * (len(away) > 1) + 14 * len(lines), 0)
    _text(axes, 14, 24, "KL divergence by the original's confidence in its most likely token", size=14, weight="bold")
    values = [b.kl_mean for d in away.values() for b in d.confidence if math.isfinite(b.kl_mean)]
    most = max(values, default=1.0) or 1.0
    for k in range(buckets):
        one = next(iter(away.values())).confidence[k]
        _text(axes, left - 8, top + k * group + (group - 14) / 2 + 4, confidence(one.low, one.high), ha="right",
              color=_MUTED)  # fmt: skip
        for i, d in enumerate(away.values()):
            value = d.confidence[k].kl_mean
            y, w = top + k * group + i * bar, (width - left - 110) * (value / most if math.isfinite(value) else 0)
            axes.add_patch(Rectangle((left, y), w, bar - 2, color=_SERIES[i % len(_SERIES)], lw=0))
            _text(axes, left + w + 6, y + bar - 4, small(value), size=10, color=_MUTED)
    if len(away) > 1:
        for i, name in enumerate(away):
            axes.add_patch(Rectangle((left, base + 8 + 16 * i), 10, 10, color=_SERIES[i % len(_SERIES)], lw=0))
            _text(axes, left + 18, base + 17 + 16 * i, shorten(name, 70), size=11)
    _footer(axes, base + 44 + 16 * len(away) * (len(away) > 1), [*lines])
    return figure


def tasks_figure(tasks: Mapping[str, Sequence[TaskResult]], footer: str) -> Figure:
    """Each task's recovery with its 95 % interval, around the line at 100 %."""
    width, left, row = 860, 250, 22
    rows = [(task, name, one) for task in tasks for name, one in ((t.metric, t) for t in tasks[task])]
    lines = textwrap.wrap(footer, width // 6)
    figure, axes = _canvas(width, 92 + row * len(rows) + 14 * len(lines), 0)
    _text(axes, 14, 24, "Recovery of the original's score, with 95 % intervals", size=14, weight="bold")
    at = recovery_axis([one for _, _, one in rows], left, width - 90)
    axes.plot([at(1.0)] * 2, [40, 52 + row * len(rows)], color=_MUTED, lw=0.8)
    _text(axes, at(1.0), 66 + row * len(rows), "100 %", ha="center", size=10, color=_MUTED)
    for i, (label, _, one) in enumerate(rows):
        y = 54 + row * i
        _text(axes, left - 12, y + 4, shorten(label, 38), ha="right", color=_MUTED)
        if one.recovery_interval:
            axes.plot([at(end) for end in one.recovery_interval], [y, y], color=_ACCENT, lw=1.4, alpha=0.6)
        axes.plot([at(one.recovery or 0.0)], [y], "o", ms=5.5, color=_ACCENT, mec="white", mew=0.8)
        _text(axes, width - 78, y + 4, share(one.recovery or 0.0))
    _footer(axes, 84 + row * len(rows), lines)
    return figure


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
