"""The layout of a chart of size, or speed, against quality in pixels; the page's template and `figures` draw it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from quantpress.core.text import byte_unit, shortened

FONT = 12  # px
_EM = 0.6  # assumed mean width of a character over the font size, wide for common fonts

Box = tuple[float, float, float, float]  # left, top, right, bottom in px


Side = Literal["right", "top", "bottom"]
Role = Literal["original", "front", "dominated", "broken"]


@dataclass(frozen=True)
class Point:
    """One model on the chart. x: bytes on disk, or tokens per second; y: its quality, with its 95 % interval.

    role: `broken` and what is not finite is drawn at the worse edge, off the axis, so that the others have room.
    """

    label: str
    x: float
    y: float
    interval: tuple[float, float] | None = None
    role: Role = "front"


@dataclass(frozen=True)
class Axes:
    """What the axes are. x_title: None for bytes. rate: more of x is better. rises: more of y is better.

    limit: a value of y that is drawn as a line, and its name.
    """

    y_title: str
    x_title: str | None = None
    rate: bool = False
    rises: bool = False
    limit: tuple[float, str] | None = None
    percent: bool = False


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
    """A point as drawn; title: its tooltip. off_axis: the side of the frame beyond which it lies, where it does."""

    x: float
    y: float
    role: Role
    whisker: tuple[float, float] | None  # y of the interval's ends
    off_axis: Side | None
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
    limit: tuple[float, str] | None = None  # y and name


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

    def clamped(self, value: float) -> float:
        """The place of a value, at most the axis' ends."""
        return self(min(max(value, self.low), self.high))

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


def pareto(points: Sequence[Point], axes: Axes) -> list[int]:
    """Indices, by x, of the points that no other beats in x and y; broken and non-finite ones never are."""
    across, up = -1 if axes.rate else 1, -1 if axes.rises else 1
    finite = [i for i, p in enumerate(points) if _on_axis(p)]
    front: list[int] = []
    for i in sorted(finite, key=lambda i: (across * points[i].x, up * points[i].y)):
        last = points[front[-1]] if front else None
        if last is None or up * points[i].y < up * last.y or (points[i].x, points[i].y) == (last.x, last.y):
            front.append(i)
    return front


def _on_axis(point: Point) -> bool:
    return point.role != "broken" and math.isfinite(point.y)


def tradeoff(
    points: Sequence[Point], size: tuple[int, int], axes: Axes, title: Callable[[Point], str], number_only: bool = False
) -> Plot:
    """Lay out `points` (the original first) in `size` px; title: the tooltip of a mark.

    With several artifacts, an original much larger than all of them is drawn at the right edge, off the axis, so that
    the artifacts have room. number_only: label artifacts 1, 2, … where names do not fit.
    """
    width, height = size
    frame = (58.0, 34.0, width - 22.0, height - 50.0)
    xs = [p.x for p in points if p.role != "original"]
    several = len(points) > 2
    first = points[0] if points[0].role == "original" else None
    far = first is not None and not axes.rate and several and bool(xs) and first.x > 1.6 * max(xs)
    x = _x_axis(xs if far else [p.x for p in points], several, frame, far)
    y = _y_axis(points, axes, frame)

    def spot(p: Point) -> tuple[float, float]:
        worse = frame[3] if axes.rises else frame[1]
        up = y.clamped(p.y) if _on_axis(p) else worse
        return (frame[2] if far and p is first else x(p.x)), up

    spots = [spot(p) for p in points]
    worthy = [i for i, p in enumerate(points) if p.role in ("front", "original")]
    worth = [spots[worthy[k]] for k in pareto([points[i] for i in worthy], axes)]
    steps = _staircase(sorted(worth, key=lambda s: (s[0], s[1] if axes.rises else -s[1])), axes) if several else []
    texts = [str(i) if number_only and p is not first else shortened(p.label, 30) for i, p in enumerate(points)]
    whiskers = [_whisker(p, y) for p in points]
    bars = [_pad((at[0], ends[0], at[0], ends[1]), 2) for at, ends in zip(spots, whiskers, strict=True) if ends]
    limit = None if axes.limit is None else (y(axes.limit[0]), axes.limit[1])
    obstacles = [_pad(a + b, 3) for a, b in pairwise(steps)] + bars
    if limit is not None:  # its name stands on the line, at the left
        obstacles += [(frame[0] + 4, limit[0] - 18, frame[0] + 8 + _EM * FONT * len(limit[1]), limit[0])] * 4
    labels = _place(spots, texts, frame, obstacles)
    marks = []
    for p, place, ends, label in zip(points, spots, whiskers, labels, strict=True):
        beyond: Side | None = None if _on_axis(p) else "bottom" if axes.rises else "top"
        marks.append(Mark(*place, p.role, ends, "right" if far and p is first else beyond, label, title(p)))
    unit, name = (1.0, "") if axes.x_title else byte_unit(x.high)
    shown = 100.0 if axes.percent else 1.0
    return Plot(
        width, height, frame,
        [(x(t), f"{t / unit:g}") for t in x.ticks(max(3, width // 130))],
        [(y(t), f"{shown * t:,.10g}") for t in y.ticks(5)],
        axes.x_title or f"Weights on disk, {name}", axes.y_title + (", log scale" if y.log else ""), marks, steps,
        limit,
    )  # fmt: skip


def _whisker(point: Point, y: "_Axis") -> tuple[float, float] | None:
    if point.interval is None or not _on_axis(point) or not all(map(math.isfinite, point.interval)):
        return None
    ends = y.clamped(point.interval[0]), y.clamped(point.interval[1])
    return ends if abs(ends[0] - ends[1]) > 1 else None


def _x_axis(sizes: Sequence[float], several: bool, frame: Box, far: bool) -> _Axis:
    low, high = (float(min(sizes)), float(max(sizes))) if sizes else (0.0, 1.0)
    if several:
        pad = max(0.12 * (high - low), 0.03 * high)
        low, high = max(0.0, low - pad), high + pad
    else:
        low, high = 0.0, high * 1.12
    return _Axis(low, high, frame[0], frame[2] - (46 if far else 0))


def _y_axis(points: Sequence[Point], axes: Axes, frame: Box) -> _Axis:
    """Over all that is on the axis and the limit. A quality of 0 on a log scale is drawn at its lower end."""
    shown = [p for p in points if _on_axis(p)]
    held = [v for p in shown for v in (p.y, *(p.interval or ())) if math.isfinite(v)]
    held += [] if axes.limit is None else [axes.limit[0]]
    low, high = min(held, default=0.0), max(held, default=1.0)
    above = [v for v in ([p.y for p in shown] + ([] if axes.limit is None else [axes.limit[0]])) if v > 0]
    if not axes.rises and above and high / min(above) > 3:
        start = min(above)
        pad = (high / start) ** 0.12
        return _Axis(start / pad, high * pad, frame[3], frame[1], log=True)
    pad = max(0.15 * (high - low), 0.01 * abs(high), 1e-6)
    return _Axis(low if low == 0 else low - pad, high + pad, frame[3], frame[1])


def _staircase(spots: list[tuple[float, float]], axes: Axes) -> list[tuple[float, float]]:
    """The Pareto front as a staircase: right, then on to the next point; with a rate the other way round."""
    out = spots[:1]
    for (x0, y0), (x1, y1) in pairwise(spots):
        out += [(x0, y1) if axes.rate else (x1, y0), (x1, y1)]
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
