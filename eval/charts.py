"""Charts as geometry: one layout in pixels, painted as SVG by the page's template and as PNG here.

`tradeoff` lays out size against perplexity; `heat` arranges the layers' errors by kind and block.
"""

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pydantic import BaseModel, ConfigDict

LIGHT = ("#fbefd0", "#f8dca2", "#f4c272", "#eea356", "#e2814b", "#cd6049", "#ab4450", "#832f55", "#571f4f")
DARK = ("#372634", "#4d2c40", "#6b3448", "#8c3f4a", "#ad514a", "#cb694a", "#e38a4f", "#f2b269", "#fbe0a0")
LEVELS = len(LIGHT)
_INK, _MUTED, _LINE, _ACCENT = "#1b1f24", "#5b6470", "#d9dde2", "#2459c4"
_EM = 0.6  # mean width of a character over the font size, on the wide side of common fonts
_FONT = 12  # px
_KINDS = ("qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down")  # the order rows are drawn in

Box = tuple[float, float, float, float]  # left, top, right, bottom in px


@dataclass(frozen=True)
class Point:
    """One model on the trade-off chart: `size` in bytes of weights on disk, perplexity and its standard error."""

    label: str
    size: int
    perplexity: float
    stderr: float
    original: bool = False


@dataclass(frozen=True)
class Label:
    x: float
    y: float  # baseline
    anchor: str  # start, middle or end
    text: str
    box: Box
    leader: tuple[float, float] | None  # where a line to the mark starts, when the label is far from it


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    role: str  # original, front or dominated
    whisker: tuple[float, float] | None  # y of both ends of the standard error
    off_axis: bool
    label: Label
    title: str


@dataclass(frozen=True)
class Plot:
    """A laid-out trade-off chart, all positions in px from the top left."""

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
        """Round values inside the axis, roughly `about` of them."""
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


def pareto(points: Sequence[Point]) -> list[int]:
    """Indices, by size, of the points that no other point beats in size and perplexity; non-finite never."""
    finite = [i for i, p in enumerate(points) if math.isfinite(p.perplexity)]
    front: list[int] = []
    for i in sorted(finite, key=lambda i: (points[i].size, points[i].perplexity)):
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
) -> Plot:
    """Lay out `points` (the original first) in `size` px; `title` is the text that hovers over a mark.

    With several artifacts an original much larger than all of them is drawn at the right edge, off the axis, so that
    the artifacts keep the room. `number_only` labels artifacts 1, 2, … where names do not fit.
    """
    width, height = size
    frame = (58.0, 34.0, width - 22.0, height - 50.0)
    shown = [(i, p) for i, p in enumerate(points) if math.isfinite(p.perplexity)]
    sizes = [p.size for _, p in shown if not p.original]
    several = len(points) > 2
    far = several and bool(sizes) and points[0].size > 1.6 * max(sizes)
    x = _x_axis(sizes if far else [p.size for _, p in shown], several, frame, far)
    y = _y_axis([p for _, p in shown], several, frame)

    on_front = set(pareto(points))
    spots = [(frame[2] if far and p.original else x(p.size), y(p.perplexity)) for _, p in shown]
    steps = [spots[k] for k, (i, _) in enumerate(shown) if i in on_front]
    steps = _staircase(sorted(steps, key=lambda s: (s[0], -s[1]))) if several else []
    obstacles = [_pad(a + b, 3) for a, b in pairwise(steps)]
    texts = [str(i) if number_only and not p.original else _shorten(p.label) for i, p in shown]
    labels = _place(spots, texts, frame, obstacles)
    marks = []
    for (i, p), spot, label in zip(shown, spots, labels, strict=True):
        role = "original" if p.original else "front" if i in on_front else "dominated"
        whisker = None if several or p.stderr <= 0 else (y(p.perplexity + p.stderr), y(p.perplexity - p.stderr))
        marks.append(Mark(*spot, role, whisker, far and p.original, label, title(p)))
    unit, name = byte_unit(x.high)
    return Plot(
        width, height, frame,
        [(x(t), f"{t / unit:g}") for t in x.ticks(max(3, width // 130))],
        [(y(t), f"{t:,.10g}") for t in y.ticks(5)],
        f"Weights on disk, {name}", "Perplexity (lower is better)" + (", log scale" if y.log else ""),
        marks, steps,
    )  # fmt: skip


def byte_unit(size: float) -> tuple[float, str]:
    """The decimal unit `size` bytes read best in."""
    return next((u for u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u[0]), (1.0, "bytes"))


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


def _staircase(spots: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """What the front reaches: right at one perplexity, then down to the next."""
    out = spots[:1]
    for (_, y0), (x1, y1) in pairwise(spots):
        out += [(x1, y0), (x1, y1)]
    return out


def _shorten(text: str, most: int = 30) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _pad(box: tuple[float, ...], by: float) -> Box:
    x0, y0, x1, y1 = box
    return min(x0, x1) - by, min(y0, y1) - by, max(x0, x1) + by, max(y0, y1) + by


def overlap(a: Box, b: Box) -> float:
    """The area two boxes share, px²."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _place(spots: list[tuple[float, float]], texts: list[str], frame: Box, obstacles: list[Box]) -> list[Label]:
    """A label a spot, where it covers no other label and as few marks and lines as can be."""
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
    width = _EM * _FONT * len(text)
    anchor = "start" if math.cos(angle) > 0.3 else "end" if math.cos(angle) < -0.3 else "middle"
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    box = (left, y - _FONT / 2 - 1, left + width, y + _FONT / 2 + 1)
    gap = 4 if anchor != "middle" else 0
    leader = (x - math.copysign(gap, math.cos(angle)), y - 7 * math.sin(angle) * (anchor == "middle"))
    return Label(x, y + 0.35 * _FONT, anchor, text, box, leader if radius > 24 else None)


def tradeoff_png(plot: Plot, heading: str, footer: str) -> bytes:
    """The chart as PNG at two pixels a px, always light; `footer` carries the caveat that must not get lost."""
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
    return _png(figure)


class Linear(BaseModel):
    """A linear layer of the manifest; `relative_error` is output error over output power, None when not measured."""

    model_config = ConfigDict(frozen=True)

    name: str
    block: int | None
    shape: tuple[int, ...] = ()
    bits: float
    scheme: str
    relative_error: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Cell:
    """The linears of one kind in one block: one, or all experts."""

    kind: str
    block: int
    layers: tuple[Linear, ...]

    @property
    def worst(self) -> float | None:
        return max((e for layer in self.layers if (e := layer.relative_error) is not None), default=None)

    @property
    def median(self) -> float | None:
        errors = [e for layer in self.layers if (e := layer.relative_error) is not None]
        return statistics.median(errors) if errors else None

    @property
    def quantized(self) -> bool:
        return any(layer.bits < 16 for layer in self.layers)

    @property
    def scheme(self) -> str:
        return ", ".join(dict.fromkeys(layer.scheme for layer in self.layers))

    @property
    def note(self) -> str:
        return "; ".join(dict.fromkeys(layer.note for layer in self.layers if layer.note))


@dataclass(frozen=True)
class Heat:
    """Cells by kind (rows) and block (columns); `outside` are linears that belong to no block."""

    kinds: tuple[str, ...]
    blocks: tuple[int, ...]
    cells: tuple[Cell, ...]
    outside: tuple[Linear, ...]

    def of(self, kind: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == kind]

    def worst(self, most: int = 10) -> list[Cell]:
        """The cells with the largest error, worst first."""
        known = [cell for cell in self.cells if cell.worst is not None]
        return sorted(known, key=lambda c: -(c.worst or 0.0))[:most]


@dataclass(frozen=True)
class HeatScale:
    """A logarithmic colour scale of LEVELS steps, at least one decade wide."""

    low: float
    high: float

    @classmethod
    def of(cls, heats: Sequence[Heat]) -> "HeatScale | None":
        errors = [e for heat in heats for cell in heat.cells if (e := cell.worst) is not None and 0 < e < math.inf]
        if not errors:
            return None
        low, high = math.log10(min(errors)), math.log10(max(errors))
        spare = max(0.0, 1.0 - (high - low)) / 2
        return cls(10 ** (low - spare), 10 ** (high + spare))

    def level(self, error: float) -> int:
        if not error > 0:
            return 0
        step = math.log(error / self.low) / math.log(self.high / self.low) * LEVELS if error < math.inf else LEVELS
        return min(LEVELS - 1, max(0, math.floor(step)))

    def edges(self) -> list[float]:
        """The LEVELS + 1 errors at which the colour changes."""
        return [self.low * (self.high / self.low) ** (i / LEVELS) for i in range(LEVELS + 1)]


def heat(linears: Sequence[Linear]) -> Heat:
    """Group linears by kind and block; numbers inside a name (experts) fall together."""
    paths: dict[tuple[str, int], list[Linear]] = {}
    for linear in linears:
        if linear.block is not None and linear.block >= 0:
            paths.setdefault((_path(linear.name, linear.block), linear.block), []).append(linear)
    short = _short_names(list(dict.fromkeys(path for path, _ in paths)))
    order = {kind: i for i, kind in enumerate(_KINDS)}
    kinds = sorted(dict.fromkeys(short.values()), key=lambda k: order.get(k, len(order)))
    cells = [Cell(short[path], block, tuple(group)) for (path, block), group in paths.items()]
    cells.sort(key=lambda c: (kinds.index(c.kind), c.block))
    outside = tuple(linear for linear in linears if linear.block is None or linear.block < 0)
    return Heat(tuple(kinds), tuple(sorted({c.block for c in cells})), tuple(cells), outside)


def _path(name: str, block: int) -> str:
    """`model.layers.3.mlp.experts.7.up_proj` in block 3 is `mlp.experts.up_proj`."""
    parts = name.split(".")
    inner = parts[parts.index(str(block)) + 1 :] if str(block) in parts else parts
    return ".".join(part for part in inner if not part.isdigit()) or name


def _short_names(paths: list[str]) -> dict[str, str]:
    """The shortest tail of each path that no other path shares, without `_proj` where the rest is a known kind."""
    out: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        for n in range(1, len(parts) + 1):
            tail = [_stem(part) for part in parts[-n:]]
            if sum([_stem(part) for part in other.split(".")[-n:]] == tail for other in paths) == 1:
                break
        out[path] = " ".join(tail)
    return out


def _stem(part: str) -> str:
    return part.removesuffix("_proj") if part.removesuffix("_proj") in _KINDS else part


def layers_png(heats: Mapping[str, Heat], scale: HeatScale | None, footer: str) -> bytes:
    """One heat strip a run, on one colour scale, as PNG."""
    cell, left, width = 17, 150, 860
    heights = [len(h.kinds) * cell + 62 for h in heats.values()]
    lines = textwrap.wrap(footer, width // 6)
    height = sum(heights) + 84 + 14 * len(lines)
    figure, axes = _canvas(width, height, 0)
    _text(axes, 14, 24, "Output error by layer (share of output power, log scale)", size=14, weight="bold")
    top = 34
    for (name, h), tall in zip(heats.items(), heights, strict=True):
        _text(axes, 14, top + 16, _shorten(name, 90), weight="bold")
        wide = min(28.0, (width - left - 24) / max(1, len(h.blocks)))
        for row, kind in enumerate(h.kinds):
            _text(axes, left - 8, top + 26 + row * cell + 12, _shorten(kind, 18), ha="right", color=_MUTED)
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
            _text(axes, left + i * 34, top + 26, f"{100 * edge:.2g} %", ha="center", size=10, color=_MUTED)
    _text(axes, left + LEVELS * 34 + 40, top + 10, "hatched: left in 16 bit; grey: not measured", size=10, color=_MUTED)
    _footer(axes, top + 52, lines)
    return _png(figure)


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


def _text(axes: Any, x: float, y: float, text: str, size: float = _FONT, color: str = _INK, **style: Any) -> None:
    # A font size in px is 0.72 of it in points, and a dollar sign in a name is not mathematics.
    axes.text(x, y, text, fontsize=0.72 * size, color=color, family="DejaVu Sans", parse_math=False, **style)


def _footer(axes: Any, top: float, lines: list[str]) -> None:
    for i, line in enumerate(lines):
        _text(axes, 14, top + 14 * i, line, size=10, color=_MUTED)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
