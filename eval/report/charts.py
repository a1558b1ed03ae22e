"""The charts of a page: quality against size, by KL divergence first, and against speed where a server was timed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..measure.formatting import change, number, share, size, small
from ..measure.sections import Interval
from ..measure.statistics import around
from .measured_run import MeasuredRun
from .standing import FINE_KL, Judged
from .tradeoff import Axes, Plot, Point, Role, tradeoff

_WIDE, _NARROW = (940, 400), (350, 340)  # px; the page shows one of them, depending on the window's width
_SPEED = "Tokens per second from a server (higher is better)"


@dataclass(frozen=True)
class Chart:
    """One chart for wide and for narrow windows. name: of its files; word: what the page's switch calls it."""

    name: str
    word: str
    wide: Plot
    narrow: Plot
    summary: str  # for those who do not see it


def charts(judged: Sequence[Judged]) -> list[Chart]:
    """The charts that the runs have figures for, KL against size first."""
    runs = [one.run for one in judged]
    out = [
        _chart("tradeoff", "KL divergence", judged, _kl(judged), lambda y: f"KL {small(y)}"),
        _chart("perplexity", "perplexity", judged, _perplexity(judged), lambda y: f"perplexity {number(y)}"),
    ]
    if all(one.recovery.questions for one in judged):
        out.append(_chart("recovery", "tasks", judged, _tasks(judged), share))
    if _one_server(runs):
        points = [Point(one.run.label, one.run.tokens_per_second or 0.0, one.kl, one.kl_interval, _role(one))
                  for one in judged]  # fmt: skip
        axes = Axes("KL divergence (lower is better)", _SPEED, rate=True, limit=_kl_limit(runs))
        out.append(_chart("speed", "tokens per second", judged, (axes, points), lambda y: f"KL {small(y)}"))
    return out


def _chart(
    name: str, word: str, judged: Sequence[Judged], what: tuple[Axes, list[Point]], shown: Callable[[float], str]
) -> Chart:
    axes, points = what
    schemes = {one.run.label: f" ({one.run.scheme})" for one in judged if one.run.scheme}
    runs = sum(point.role != "original" for point in points)

    def title(point: Point) -> str:
        x = f"{number(point.x)} tokens/s" if axes.rate else size(point.x)
        sure = f" ({shown(point.interval[0])} to {shown(point.interval[1])})" if point.interval else ""
        return f"{point.label}{schemes.get(point.label, '')}: {x}, {shown(point.y)}{sure}"

    wide = tradeoff(points, _WIDE, axes, title, runs > 12)
    narrow = tradeoff(points, _NARROW, axes, title, runs > 1)
    against = "Speed" if axes.rate else "Size"
    summary = f"{against} against {word} of {len(points)} models; the tables have the values."
    return Chart(name, word, wide, narrow, summary)


def _role(one: Judged) -> Role:
    if one.standing.level in ("broken", "void"):
        return "broken"
    return "front" if one.beaten is None else "dominated"


_Quality = Callable[[Judged], tuple[float, Interval | None]]


def _points(judged: Sequence[Judged], of: _Quality, original: float) -> list[Point]:
    """The original, of that quality, and every run by size."""
    first = Point("original", judged[0].run.manifest.artifact.original_bytes, original, None, "original")
    return [first, *(Point(one.run.label, one.run.size, *of(one), _role(one)) for one in judged)]


def _kl(judged: Sequence[Judged]) -> tuple[Axes, list[Point]]:
    axes = Axes("KL, nats per token (lower is better)", limit=_kl_limit([one.run for one in judged]))
    return axes, _points(judged, lambda one: (one.kl, one.kl_interval), 0.0)


def _kl_limit(runs: Sequence[MeasuredRun]) -> tuple[float, str] | None:
    """The gate of the runs; the soft limit where none of them has gates."""
    if all(run.results.gates.verdict == "NONE" for run in runs):
        return FINE_KL, f"look closer above {FINE_KL:g}"
    limit = _shared_limit(runs, "max_kl")
    return None if limit is None else (limit, f"limit {small(limit)}")


def _shared_limit(runs: Sequence[MeasuredRun], name: str) -> float | None:
    """A limit that all runs have alike."""
    found = {next((c.limit for c in run.results.gates.checks if c.name == name), None) for run in runs}
    return found.pop() if len(found) == 1 else None


def _perplexity(judged: Sequence[Judged]) -> tuple[Axes, list[Point]]:
    before = judged[0].run.original.perplexity

    def of(one: Judged) -> tuple[float, Interval | None]:
        run, rise = one.run, one.run.results.perplexity_increase_interval
        if rise is not None:  # paired, so narrower than the two models' own
            return run.artifact.perplexity, (before * (1 + rise[0]), before * (1 + rise[1]))
        return run.artifact.perplexity, around(run.artifact.perplexity, run.artifact.stderr)

    limit = _shared_limit([one.run for one in judged], "max_perplexity_increase")
    line = None if limit is None else (before * (1 + limit), f"limit {change(limit)}")
    return Axes("Perplexity (lower is better)", limit=line), _points(judged, of, before)


def _tasks(judged: Sequence[Judged]) -> tuple[Axes, list[Point]]:
    axes = Axes("Recovery of the tasks' mean score, % (higher is better)", rises=True, percent=True)
    return axes, _points(judged, lambda one: (one.recovery.value, one.recovery.interval), 1.0)


def _one_server(runs: Sequence[MeasuredRun]) -> bool:
    """Whether several runs were timed on one server: the same program, version and device."""
    servers = {run.serving and (run.serving.server, run.serving.version, run.serving.device) for run in runs}
    timed = all(run.tokens_per_second is not None and math.isfinite(run.tokens_per_second) for run in runs)
    return len(runs) > 1 and len(servers) == 1 and timed
