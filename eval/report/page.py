"""The report of a run, and of several runs side by side, as one HTML page with charts and summaries.

Everything on it comes from `manifest.json` and `eval/results.json`; the same input gives the same bytes.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from quantpress.core.errors import BadInput
from quantpress.core.files import whole_file
from quantpress.core.text import shortened
from quantpress.recipe.methods import METHODS

from ..measure import formatting
from ..measure.gates import limit_name, show_interval, show_limit
from ..measure.metrics import METRICS, Metric
from ..measure.sections import TaskResult
from . import page_text
from .charts import charts
from .figures import divergence_axis, png, recovery_axis, recovery_ticks, svg
from .heatmap import DARK, LIGHT, HeatScale
from .measured_run import LeftOut, MeasuredRun, comparable, find_runs, labelled, open_run
from .standing import judge_runs
from .table import as_csv, as_parquet, rows
from .verdict import choose, verdict

_SPEED = "Speed against quality"
_OPTIONAL = ("speed", "recovery", "divergence", "tasks")  # charts that not every report has


def write_report(run: Path) -> Path:
    """Write RUN/report: index.html, each chart as PNG and SVG, summary.md, summary.json; returns index.html.

    Raises BadInput when RUN lacks manifest.json or eval/results.json, or they cannot be read.
    """
    one = open_run(run)
    document = {"summary": _figures(one), "headline": formatting.plain(one.headline)}
    return _write(run / "report", "report", [one], f"{one.manifest.name}: size against quality", document)


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write the same files for several runs (or a folder of them) of one model; returns the path of index.html.

    Raises BadInput for fewer than two runs, and for runs whose evaluation text, windows or original differ.
    """
    several, left_out = find_runs(runs) if runs else ([], [])
    if len(several) + len(left_out) < 2:
        raise BadInput(f"compare: two or more different runs are needed, got {', '.join(map(str, runs)) or 'none'}")
    return _write_several(several, out, left_out)


def _write_several(several: Sequence[MeasuredRun], out: Path, left_out: Sequence[LeftOut]) -> Path:
    for other in several[1:]:
        comparable(several[0], other)
    several = labelled(sorted(several, key=lambda r: (r.size, r.artifact.perplexity, r.manifest.name)))
    choice = choose(several, left_out)
    summary = [
        _figures(one.run) | {"label": one.run.label, "pareto": one.beaten is None, "beaten": one.beaten}
        for one in choice.judged
    ]
    document: dict[str, Any] = {
        "take": choice.take and choice.take.run.label, "best": choice.best and choice.best.run.label,
        "headline": choice.headline, "runs": summary,
    }  # fmt: skip
    document |= {"failed": [vars(one) for one in left_out]} if left_out else {}
    template = "report" if len(several) == 1 else "compare"
    return _write(out, template, several, "Size against quality", document, left_out)


def write_sweep(out: Path, runs: Sequence[Path], failed: Sequence[LeftOut] = ()) -> Path | None:
    """Write OUT/report for the finished runs of a sweep and those that failed; None when no run finished."""
    if not runs:
        return None
    return _write_several([open_run(folder) for folder in runs], out / "report", failed)


def chart(run: MeasuredRun) -> bytes:
    """The trade-off chart of one run as PNG."""
    plot = charts(judge_runs([run]))[0].wide
    heading = f"{run.label}: size against quality"
    return png(svg(templates(), "tradeoff", run.manifest.model.caveat or "", plot=plot, heading=heading))


def render(template: str, **context: Any) -> str:
    """A rendered Markdown template, with the number formats of the page."""
    return templates().get_template(template).render(context)


def _links(runs: Sequence[MeasuredRun], folder: Path) -> dict[str, str | None]:
    """By label, each run's own page as seen from `folder`; None where it has none yet."""
    pages = {run.label: run.folder / "report" / "index.html" for run in runs}
    return {
        label: quote(os.path.relpath(page, folder).replace(os.sep, "/")) if page.is_file() else None
        for label, page in pages.items()
    }


def _figures(run: MeasuredRun) -> dict[str, Any]:
    """One run in summary.json; shares are fractions, sizes bytes."""
    told = verdict(run)
    return {
        "name": run.manifest.name,
        "model": run.manifest.model.model_dump(exclude={"files"}),
        "verdict": run.results.gates.verdict,
        "standing": {"level": told.level, "reason": told.reason, "todo": list(told.todo)},
        "size_ratio": run.ratio,
        "size": run.manifest.artifact.model_dump(),
        "perplexity_increase": run.increase,
        **run.results.model_dump(include={"text", "original", "artifact", "divergence", "repeats", "gates"}),
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
    told = {key: values for key, values in rows.items() if len(set(values)) > 1}
    return {key: values for key, values in told.items() if not _of_the_method(key, flat)}


def _of_the_method(key: str, recipes: Sequence[dict[str, Any]]) -> bool:
    """Whether it is a setting that only some of the methods have, which all that have it leave as it is."""
    part, _, name = key.partition(".")
    have = [recipe for recipe in recipes if key in recipe]
    if part != "method" or len(have) == len(recipes):
        return False
    fields = (METHODS[recipe["method.name"]].model_fields.get(name) for recipe in have)
    return all(field is not None and field.default == recipe[key] for field, recipe in zip(fields, have, strict=True))


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


def _fenced(text: str, language: str) -> str:
    """A block of code in Markdown, which no run of backticks in the text closes."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _yaml(value: Any, flow: bool = False) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100, default_flow_style=flow)
    return text.removesuffix("...\n").strip()


def _write(
    folder: Path,
    template: str,
    runs: list[MeasuredRun],
    heading: str,
    summary: dict[str, Any],
    failed: Sequence[LeftOut] = (),
) -> Path:
    caveat, model = runs[0].manifest.model.caveat, runs[0].manifest.model.id
    scale = HeatScale.of([run.heat for run in runs])
    choice = choose(runs, failed)
    drawn = charts(choice.judged)
    context = {
        "runs": runs, "run": runs[0], "choice": choice, "verdict": verdict(runs[0]), "charts": drawn, "scale": scale,
        "differences": _differences(runs), "columns": _columns(runs), "glossary": _glossary(runs),
        "colors": list(zip(LIGHT, DARK, strict=True)), "left_out": failed, "links": _links(runs, folder),
    }  # fmt: skip
    pages = templates()
    caption = f"{model}: {caveat}" if caveat else model
    tasks = [(f"{r.label}: {t.task} {t.metric}" if len(runs) > 1 else f"{t.task} {t.metric}", t)
             for r in runs for t in r.results.tasks if t.recovery is not None]  # fmt: skip
    figures = {
        one.name: svg(pages, "tradeoff", caption, plot=one.wide, heading=_SPEED if one.name == "speed" else heading)
        for one in drawn
    }
    figures["layers"] = svg(pages, "layers", caption, runs=runs, scale=scale)
    if all(run.divergence.confidence for run in runs):
        figures["divergence"] = svg(pages, "divergence", caption, runs=runs)
    if tasks:
        figures["tasks"] = svg(pages, "tasks", caption, rows=tasks)
    table = rows(choice)
    parquet = as_parquet(table) if len(runs) > 1 else None
    files = {f"{name}.svg": drawing.encode() for name, drawing in figures.items()}
    files |= {f"{name}.png": png(drawing) for name, drawing in figures.items()}
    files |= {
        "summary.md": pages.get_template(f"{template}.md").render(context).encode("utf-8", "replace"),
        "summary.json": (json.dumps(_finite({"schema": 1} | summary), indent=2) + "\n").encode(),
        **({"runs.csv": as_csv(table)} if len(runs) > 1 else {}),
        "index.html": pages.get_template(f"{template}.html").render(context).encode("utf-8", "replace"),
    }
    if parquet is not None:
        files["runs.parquet"] = parquet
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot write the report there: {error.strerror}") from None
    for name in (f"{chart}.{kind}" for chart in _OPTIONAL for kind in ("png", "svg")):
        if name not in files:
            (folder / name).unlink(missing_ok=True)  # left by an earlier report
    for name, content in files.items():
        with whole_file(folder / name) as file:
            file.write(content)
    return folder / "index.html"


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def templates() -> Environment:
    """The page's and the charts' templates, with what they call."""
    folder = resources.files(__package__) / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=lambda name: name is not None and name.endswith((".html", ".svg")),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    formats = {name: getattr(module, name) for module in (formatting, page_text) for name in module.__all__}
    environment.globals |= formats | {
        "axis": recovery_axis,
        "divergence_axis": divergence_axis,
        "ticks": recovery_ticks,
    }
    environment.filters |= formats | {
        "gate": show_limit, "gate_name": limit_name, "gate_interval": show_interval, "yaml": _yaml, "fenced": _fenced,
        "estimate": Metric.told, "changed": Metric.told_change, "by_task": _by_task, "shortened": shortened,
    }  # fmt: skip
    return environment
