"""The layout of the size-against-perplexity chart in pixels; the page's template and `figures` draw it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantpress.core.text import byte_unit

from ..measure.metrics import METRICS
from .page_text import shorten

_QUALITY, _SIZE = (next(m for m in METRICS if m.name == name) for name in ("perplexity", "bytes"))
FONT = 12  # px
_EM = 0.6  # assumed mean width of a character over the font size, wide for common fonts

Box = tuple[float, float, float, float]  # left, top, right, bottom in px


@dataclass(frozen=True)
class Point:
    """One model on the chart. size: bytes on disk, or a rate in tokens per second; stderr: of the perplexity."""

    label: str
    size: float
    perplexity: float
    stderr: float
    original: bool = False


@dataclass(frozen=True)
class Label:
    """The name beside a mark; anchor: which end of the text is at x."""

    x: float
    y: float  # baseline
    anchor: str  # start, middle or end
    text: str
    box: Box
    leader: tuple[float, float] | None  # start of a line to the mark, for a label far from it


@dataclass(frozen=True)
class Mark:
    """A point as drawn; title: its tooltip."""

    x: float
    y: float
    role: str  # original, front or dominated
    whisker: tuple[float, float] | None  # y of value ± standard error
    off_axis: bool
    label: Label
    title: str


@dataclass(frozen=True)
class Plot:
    """A laid-out chart, all positions in px from the top left."""

    width: int
    height: int
    frame: Box
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_title: str
    y_title: str
    marks: list[Mark]
    front: list[tuple[float, float]]


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, about: int) -> list[float]:
        """About `about` round values inside the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                ticks = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(ticks) <= about + 2:
                    break
            if len(ticks) >= 2:
                return ticks[:: 1 + len(ticks) // (about + 3)]
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def pareto(points: Sequence[Point], rate: bool = False) -> list[int]:
    """Indices, by size, of the Pareto-optimal points in size and perplexity; non-finite points never are.

    A smaller size is better, or with `rate` a larger one.
    """
    sign = -1 if rate else 1
    finite = [i for i, p in enumerate(points) if math.isfinite(p.perplexity)]
    front: list[int] = []
    for i in sorted(finite, key=lambda i: (sign * points[i].size, points[i].perplexity)):
        last = points[front[-1]] if front else None
        if last is None or points[i].perplexity < last.perplexity or _same(points[i], last):
            front.append(i)
    return front


def _same(a: Point, b: Point) -> bool:
    return (a.size, a.perplexity) == (b.size, b.perplexity)


def tradeoff(
    points: Sequence[Point],
    size: tuple[int, int],
    title: Callable[[Point], str],
    number_only: bool = False,
    rate: bool = False,
) -> Plot:
    """Lay out `points` (the original first) in `size` px; title: the tooltip of a mark.

    With several artifacts, an original much larger than all of them is drawn at the right edge, off the axis, so that
    the artifacts have room. number_only: label artifacts 1, 2, … where names do not fit. rate: the horizontal axis is
    tokens per second, not bytes.
    """
    width, height = size
    frame = (58.0, 34.0, width - 22.0, height - 50.0)
    shown = [(i, p) for i, p in enumerate(points) if math.isfinite(p.perplexity)]
    sizes = [p.size for _, p in shown if not p.original]
    several = len(points) > 2
    far = not rate and several and bool(sizes) and points[0].size > 1.6 * max(sizes)
    x = _x_axis(sizes if far else [p.size for _, p in shown], several, frame, far)
    y = _y_axis([p for _, p in shown], several, frame)

    on_front = set(pareto(points, rate))
    spots = [(frame[2] if far and p.original else x(p.size), y(p.perplexity)) for _, p in shown]
    steps = [spots[k] for k, (i, _) in enumerate(shown) if i in on_front]
    steps = _staircase(sorted(steps, key=lambda s: (s[0], -s[1])), rate) if several else []
    obstacles = [_pad(a + b, 3) for a, b in pairwise(steps)]
    texts = [str(i) if number_only and not p.original else shorten(p.label) for i, p in shown]
    labels = _place(spots, texts, frame, obstacles)
    marks = []
    for (i, p), spot, label in zip(shown, spots, labels, strict=True):
        role = "original" if p.original else "front" if i in on_front else "dominated"
        whisker = None if several or p.stderr <= 0 else (y(p.perplexity + p.stderr), y(p.perplexity - p.stderr))
        marks.append(Mark(*spot, role, whisker, far and p.original, label, title(p)))
    unit, name = (1.0, "") if rate else byte_unit(x.high)
    x_title = "Tokens per second from a server (higher is better)" if rate else f"{_SIZE.title}, {name}"
    return Plot(
        width, height, frame,
        [(x(t), f"{t / unit:g}") for t in x.ticks(max(3, width // 130))],
        [(y(t), f"{t:,.10g}") for t in y.ticks(5)],
        x_title, f"{_QUALITY.title} ({_QUALITY.better} is better)" + (", log scale" if y.log else ""),
        marks, steps,
    )  # fmt: skip


def _x_axis(sizes: Sequence[float], several: bool, frame: Box, far: bool) -> _Axis:
    low, high = (float(min(sizes)), float(max(sizes))) if sizes else (0.0, 1.0)
    if several:
        pad = max(0.12 * (high - low), 0.03 * high)
        low, high = max(0.0, low - pad), high + pad
    else:
        low, high = 0.0, high * 1.12
    return _Axis(low, high, frame[0], frame[2] - (46 if far else 0))


def _y_axis(points: list[Point], several: bool, frame: Box) -> _Axis:
    room = [0.0 if several else p.stderr for p in points]
    low = min((p.perplexity - r for p, r in zip(points, room, strict=True)), default=1.0)
    high = max((p.perplexity + r for p, r in zip(points, room, strict=True)), default=2.0)
    log = low > 0 and high / low > 3
    if log:
        pad = (high / low) ** 0.12
        return _Axis(low / pad, high * pad, frame[3], frame[1], log=True)
    pad = max(0.15 * (high - low), 0.01 * abs(high))
    return _Axis(low - pad, high + pad, frame[3], frame[1])


def _staircase(spots: list[tuple[float, float]], rate: bool) -> list[tuple[float, float]]:
    """The Pareto front as a staircase: right, then down to the next point; with a rate up first, then right."""
    out = spots[:1]
    for (x0, y0), (x1, y1) in pairwise(spots):
        out += [(x0, y1) if rate else (x1, y0), (x1, y1)]
    return out


def _pad(box: tuple[float, ...], by: float) -> Box:
    x0, y0, x1, y1 = box
    return min(x0, x1) - by, min(y0, y1) - by, max(x0, x1) + by, max(y0, y1) + by


def overlap(a: Box, b: Box) -> float:
    """The area two boxes share, px²."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _place(spots: list[tuple[float, float]], texts: list[str], frame: Box, obstacles: list[Box]) -> list[Label]:
    """A label per spot, placed so that it covers no other label and as few marks and lines as possible."""
    marks = [_pad((x, y, x, y), 7) for x, y in spots]
    placed: dict[int, Label] = {}
    for i in sorted(range(len(spots)), key=lambda i: spots[i]):
        best: tuple[float, Label] | None = None
        for radius in (12, 20, 32, 46, 62, 80, 100, 124, 152, 184, 220):
            for turn in (-45, 0, 45, -90, 90, -135, 180, 135, -20, 20, -70, 70, -110, 110, 160, -160):
                label = _label(spots[i], texts[i], radius, math.radians(turn))
                box = label.box
                inside = overlap(box, (4.0, frame[1] - 12, frame[2] + 18, frame[3] - 2))
                cost = float(radius) + 1e4 * (not math.isclose(inside, (box[2] - box[0]) * (box[3] - box[1])))
                cost += 1e3 * sum(overlap(_pad(box, 1), other.box) > 0 for other in placed.values())
                cost += 30 * sum(overlap(box, mark) > 0 for mark in marks)
                cost += 14 * sum(overlap(box, obstacle) > 0 for obstacle in obstacles)
                if best is None or cost < best[0]:
                    best = cost, label
        assert best is not None
        placed[i] = best[1]
    return [placed[i] for i in range(len(spots))]


def _label(spot: tuple[float, float], text: str, radius: float, angle: float) -> Label:
    x, y = spot[0] + radius * math.cos(angle), spot[1] + radius * math.sin(angle)
    width = _EM * FONT * len(text)
    anchor = "start" if math.cos(angle) > 0.3 else "end" if math.cos(angle) < -0.3 else "middle"
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    box = (left, y - FONT / 2 - 1, left + width, y + FONT / 2 + 1)
    gap = 4 if anchor != "middle" else 0
    leader = (x - math.copysign(gap, math.cos(angle)), y - 7 * math.sin(angle) * (anchor == "middle"))
    return Label(x, y + 0.35 * FONT, anchor, text, box, leader if radius > 24 else None)
