"""The report of a run, and of several runs side by side, as one HTML page with charts and summaries.

Everything on it comes from `manifest.json` and `eval/results.json`; the same input gives the same bytes.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from quantpress.core.errors import BadInput
from quantpress.core.files import whole_file

from ..measure import formatting
from ..measure.formatting import NBSP, change, interval, number, size
from ..measure.metrics import METRICS, Metric, MetricValue
from ..measure.results import TaskResult
from . import page_text
from .figures import divergence_axis, png, recovery_axis, svg
from .heatmap import DARK, LIGHT, HeatScale
from .measured_run import MeasuredRun, comparable, gate_name, gate_value, labelled, open_run, open_runs
from .tradeoff import Plot, Point, pareto, tradeoff

_WIDE, _NARROW = (940, 400), (350, 340)  # px; the page shows one of them, depending on the window's width


@dataclass(frozen=True)
class FailedRun:
    """A recipe of a sweep that could not be run, with the reason in one line."""

    name: str
    reason: str


def write_report(run: Path) -> Path:
    """Write RUN/report: index.html, each chart as PNG and SVG, summary.md, summary.json; returns index.html.

    Raises BadInput when RUN lacks manifest.json or eval/results.json, or they cannot be read.
    """
    one = open_run(run)
    heading = f"{one.manifest.name}: size against quality"
    return _write(
        run / "report",
        "report",
        [one],
        heading,
        {"summary": _figures(one), "headline": one.headline.replace(NBSP, " ")},
    )


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write the same files for several runs (or a folder of them) of one model; returns the path of index.html.

    Raises BadInput for fewer than two runs, and for runs whose evaluation text, windows or original differ.
    """
    several = open_runs(runs) if runs else []
    if len(several) < 2:
        raise BadInput(f"compare: two or more different runs are needed, got {', '.join(map(str, runs)) or 'none'}")
    return _write_several(several, out, [])


def _write_several(several: Sequence[MeasuredRun], out: Path, failed: Sequence[FailedRun]) -> Path:
    for other in several[1:]:
        comparable(several[0], other)
    several = labelled(sorted(several, key=lambda r: (r.size, r.artifact.perplexity, r.manifest.name)))
    front = _front(several)
    summary = [_figures(r) | {"label": r.label, "pareto": r.label in front} for r in several]
    document = {"runs": summary} | ({"failed": [vars(one) for one in failed]} if failed else {})
    template = "report" if len(several) == 1 else "compare"
    return _write(out, template, several, "Size against quality", document, failed)


def write_sweep(out: Path, runs: Sequence[Path], failed: Sequence[FailedRun] = ()) -> Path | None:
    """Write OUT/report for the finished runs of a sweep and those that failed; None when no run finished."""
    if not runs:
        return None
    return _write_several([open_run(folder) for folder in runs], out / "report", failed)


def chart(run: MeasuredRun) -> bytes:
    """The trade-off chart of one run as PNG."""
    plot = tradeoff(_points([run]), _WIDE, _hover([run]))
    heading = f"{run.label}: size against quality"
    return png(svg(_environment(), "tradeoff", run.manifest.model.caveat or "", plot=plot, heading=heading))


def render(template: str, **context: Any) -> str:
    """A rendered Markdown template, with the number formats of the page."""
    return _environment().get_template(template).render(context)


def _points(runs: Sequence[MeasuredRun]) -> list[Point]:
    first = runs[0]
    original = Point("original", first.manifest.artifact.original_bytes, first.original.perplexity,
                     first.original.stderr, original=True)  # fmt: skip
    return [original, *(Point(r.label, r.size, r.artifact.perplexity, r.artifact.stderr) for r in runs)]


def _rates(runs: Sequence[MeasuredRun]) -> list[Point]:
    """Points by tokens per second; none unless one server, the same for all runs, was measured."""
    servers = {run.serving and (run.serving.server, run.serving.version, run.serving.device) for run in runs}
    if len(runs) < 2 or len(servers) != 1 or any(run.tokens_per_second is None for run in runs):
        return []
    return [Point(r.label, r.tokens_per_second or 0.0, r.artifact.perplexity, r.artifact.stderr) for r in runs]


def _front(runs: Sequence[MeasuredRun]) -> set[str]:
    """Labels of the Pareto-optimal runs in size and perplexity, the original included."""
    points = _points(runs)
    return {points[i].label for i in pareto(points) if i}


def _figures(run: MeasuredRun) -> dict[str, Any]:
    """One run in summary.json; shares are fractions, sizes bytes."""
    return {
        "name": run.manifest.name,
        "model": run.manifest.model.model_dump(exclude={"files"}),
        "verdict": run.results.gates.verdict,
        "size_ratio": run.ratio,
        "size": run.manifest.artifact.model_dump(),
        "perplexity_increase": run.increase,
        **run.results.model_dump(include={"text", "original", "artifact", "divergence", "gates"}),
        "timing": run.manifest.timing.model_dump(exclude={"per_block_seconds"}),
        "metrics": {metric.name: asdict(value) for metric, value in run.metrics},
        "warnings": run.warnings,
    }


def _glossary(runs: Sequence[MeasuredRun]) -> list[Metric]:
    """The metrics that any of the runs has."""
    return [metric for metric in METRICS if any(run.value(metric) is not None for run in runs)]


def _columns(runs: Sequence[MeasuredRun]) -> list[Metric]:
    """The metrics that a comparison of the runs shows."""
    return [metric for metric in _glossary(runs) if metric.compared]


def _differences(runs: Sequence[MeasuredRun]) -> dict[str, list[str]]:
    """The recipe keys, dotted, whose values differ between runs, with each run's value; without the smoke test."""
    left_out = ("name", "description", "smoke")
    flat = [_flatten({k: v for k, v in run.manifest.recipe.items() if k not in left_out}) for run in runs]
    keys = list(dict.fromkeys(k for f in flat for k in f))
    rows = {key: [_yaml(f[key], flow=True) if key in f else "" for f in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _by_task(runs: Sequence[MeasuredRun]) -> list[tuple[tuple[str, str], list[TaskResult | None]]]:
    """For each task and metric, the result of every run."""
    found = [{(task.task, task.metric): task for task in run.results.tasks} for run in runs]
    return [(key, [of.get(key) for of in found]) for key in dict.fromkeys(key for of in found for key in of)]


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        nested = isinstance(item, dict) and item
        out |= _flatten(item, f"{prefix}{key}.") if nested else {f"{prefix}{key}": item}
    return out


def _yaml(value: Any, flow: bool = False) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100, default_flow_style=flow)
    return text.removesuffix("...\n").strip()


def _write(
    folder: Path,
    template: str,
    runs: list[MeasuredRun],
    heading: str,
    summary: dict[str, Any],
    failed: Sequence[FailedRun] = (),
) -> Path:
    caveat, model = runs[0].manifest.model.caveat, runs[0].manifest.model.id
    scale = HeatScale.of([run.heat for run in runs])
    plots, speeds = _plots(runs, _points(runs), rate=False), _plots(runs, _rates(runs), rate=True)
    context = {
        "runs": runs, "run": runs[0], "front": _front(runs), "plots": plots, "speeds": speeds, "scale": scale,
        "differences": _differences(runs), "columns": _columns(runs), "glossary": _glossary(runs),
        "colors": list(zip(LIGHT, DARK, strict=True)), "failed": failed,
    }  # fmt: skip
    pages = _environment()
    caption = f"{model}: {caveat}" if caveat else model
    tasks = [(f"{r.label}: {t.task} {t.metric}" if len(runs) > 1 else f"{t.task} {t.metric}", t)
             for r in runs for t in r.results.tasks if t.recovery is not None]  # fmt: skip
    figures = {
        "tradeoff": svg(pages, "tradeoff", caption, plot=plots[0], heading=heading),
        "layers": svg(pages, "layers", caption, runs=runs, scale=scale),
    }
    if speeds:
        figures["speed"] = svg(pages, "tradeoff", caption, plot=speeds[0], heading="Speed against quality")
    if all(run.divergence.confidence for run in runs):
        figures["divergence"] = svg(pages, "divergence", caption, runs=runs)
    if tasks:
        figures["tasks"] = svg(pages, "tasks", caption, rows=tasks)
    files = {f"{name}.svg": drawing.encode() for name, drawing in figures.items()}
    files |= {f"{name}.png": png(drawing) for name, drawing in figures.items()}
    files |= {
        "summary.md": pages.get_template(f"{template}.md").render(context).encode("utf-8", "replace"),
        "summary.json": (json.dumps(_finite({"schema": 1} | summary), indent=2) + "\n").encode(),
        "index.html": pages.get_template(f"{template}.html").render(context).encode("utf-8", "replace"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot write the report there: {error.strerror}") from None
    for name in (f"{chart}.{kind}" for chart in ("speed", "divergence", "tasks") for kind in ("png", "svg")):
        if name not in files:
            (folder / name).unlink(missing_ok=True)  # left by an earlier report
    for name, content in files.items():
        with whole_file(folder / name) as file:
            file.write(content)
    return folder / "index.html"


def _plots(runs: Sequence[MeasuredRun], points: Sequence[Point], *, rate: bool) -> list[Plot]:
    """The chart for wide and for narrow windows; none without points."""
    return [
        tradeoff(points, size, _hover(runs, rate), len(runs) > 1 and (size is _NARROW or len(runs) > 12), rate)
        for size in (_WIDE, _NARROW)
        if points
    ]


def _hover(runs: Sequence[MeasuredRun], rate: bool = False) -> Callable[[Point], str]:
    """The tooltip of a mark: the scheme and both values."""
    schemes = {run.label: f" ({run.scheme})" for run in runs if run.scheme}

    def title(point: Point) -> str:
        x = f"{number(point.size)} tokens/s" if rate else size(point.size)
        return f"{point.label}{schemes.get(point.label, '')}: {x}, perplexity {number(point.perplexity)}"

    return title


def _estimate(metric: Metric, value: float | None, error: float | None) -> str:
    """A value of the metric with its standard error; empty where there is no value."""
    if value is None:
        return ""
    return metric.show(value) + ("" if error is None else f" ± {metric.show_error(error)}")


def _changed(metric: Metric, value: MetricValue) -> str:
    """The artifact against the original, with the interval of the change where there is one."""
    told = metric.show_change(value)
    return f"{told} ({interval(value.interval, change)})" if metric.limits_change and value.interval else told


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment() -> Environment:
    folder = resources.files(__package__) / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=lambda name: name is not None and name.endswith((".html", ".svg")),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    formats = {name: getattr(module, name) for module in (formatting, page_text) for name in module.__all__}
    environment.globals |= formats | {"axis": recovery_axis, "divergence_axis": divergence_axis}
    environment.filters |= formats | {
        "gate": gate_value, "gate_name": gate_name, "yaml": _yaml, "estimate": _estimate, "changed": _changed,
        "by_task": _by_task,
    }  # fmt: skip
    return environment
