"""The report of a run, and several runs side by side: one page a stakeholder reads in a minute, an engineer in ten.

Everything comes from `manifest.json` and `eval/results.json`; the same input gives the same bytes.
"""

import json
import math
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from quantpress.quantize.errors import BadInput

from .heat import DARK, LIGHT, HeatScale
from .png import layers_png, tradeoff_png
from .runs import Run, comparable, labelled, open_run
from .tradeoff import Plot, Point, pareto, tradeoff
from .wording import NBSP, cell, change, gate, gate_name, interval, number, score, seconds, share, size, small

_WIDE, _NARROW = (940, 400), (350, 340)  # px: the page shows one of them, by the width of the window


def write_report(run: Path) -> Path:
    """Write RUN/report: index.html, tradeoff.png, layers.png, summary.md, summary.json; the path of index.html.

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
    """Write the same files for several runs of one model on one text into `out`; the path of index.html.

    Raises BadInput for fewer than two runs, and for runs whose evaluation text, windows or original differ.
    """
    if len({run.resolve() for run in runs}) < max(2, len(runs)):
        raise BadInput(f"compare: two or more different runs are needed, got {', '.join(map(str, runs)) or 'none'}")
    several = [open_run(folder) for folder in runs]
    for other in several[1:]:
        comparable(several[0], other)
    several = labelled(sorted(several, key=lambda r: (r.size, r.artifact.perplexity, r.manifest.name)))
    front = _front(several)
    summary = [_figures(r) | {"label": r.label, "pareto": r.label in front} for r in several]
    return _write(out, "compare", several, "Size against quality", {"runs": summary})


def write_sweep(out: Path, runs: Sequence[Path]) -> Path | None:
    """Write OUT/report for the runs of a sweep and those that failed; None when there is not one to show."""
    if not runs:
        return None
    if len(runs) == 1:
        return write_report(runs[0])
    return write_comparison(runs, out / "report")


def chart(run: Run) -> bytes:
    """The trade-off chart of one run as PNG."""
    plot = tradeoff(_points([run]), _WIDE, _hover)
    return tradeoff_png(plot, f"{run.label}: size against quality", run.manifest.model.caveat or "")


def render(template: str, **context: Any) -> str:
    """A Markdown template with the page's number formats."""
    return _environment().get_template(template).render(context)


def _points(runs: Sequence[Run]) -> list[Point]:
    first = runs[0]
    original = Point("original", first.manifest.artifact.original_bytes, first.original.perplexity,
                     first.original.stderr, original=True)  # fmt: skip
    return [original, *(Point(r.label, r.size, r.artifact.perplexity, r.artifact.stderr) for r in runs)]


def _front(runs: Sequence[Run]) -> set[str]:
    """Labels of the runs that neither another run nor the original beats in size and perplexity."""
    points = _points(runs)
    return {points[i].label for i in pareto(points) if i}


def _figures(run: Run) -> dict[str, Any]:
    """What summary.json says about one run; shares are fractions, sizes bytes."""
    return {
        "name": run.manifest.name,
        "model": run.manifest.model.model_dump(exclude={"files"}),
        "verdict": run.results.gates.verdict,
        "size_ratio": run.ratio,
        "size": run.manifest.artifact.model_dump(),
        "perplexity_increase": run.increase,
        **run.results.model_dump(include={"text", "original", "artifact", "divergence", "gates"}),
        "timing": run.manifest.timing.model_dump(exclude={"per_block_seconds"}),
        "warnings": run.warnings,
    }


def _differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The recipe keys, dotted, whose values differ between runs, with each run's value."""
    flat = [_flatten(run.manifest.recipe) for run in runs]
    keys = [key for key in dict.fromkeys(k for f in flat for k in f) if key != "name"]
    rows = {key: [_yaml(f[key], flow=True) if key in f else "" for f in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        nested = isinstance(item, dict) and item
        out |= _flatten(item, f"{prefix}{key}.") if nested else {f"{prefix}{key}": item}
    return out


def _yaml(value: Any, flow: bool = False) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100, default_flow_style=flow)
    return text.removesuffix("...\n").strip()


def _write(folder: Path, template: str, runs: list[Run], heading: str, summary: dict[str, Any]) -> Path:
    points, caveat = _points(runs), runs[0].manifest.model.caveat
    scale = HeatScale.of([run.heat for run in runs])
    plots: list[Plot] = [
        tradeoff(points, size, _hover, number_only=len(runs) > 1 and (size is _NARROW or len(runs) > 12))
        for size in (_WIDE, _NARROW)
    ]
    context = {
        "runs": runs, "run": runs[0], "front": _front(runs), "plots": plots, "scale": scale, "points": points,
        "differences": _differences(runs), "colors": list(zip(LIGHT, DARK, strict=True)),
    }  # fmt: skip
    footer = f"{runs[0].manifest.model.id}: {caveat}" if caveat else runs[0].manifest.model.id
    pages = _environment()
    files = {
        "tradeoff.png": tradeoff_png(plots[0], heading, footer),
        "layers.png": layers_png({run.label: run.heat for run in runs}, scale, footer),
        "summary.md": pages.get_template(f"{template}.md").render(context).encode("utf-8", "replace"),
        "summary.json": (json.dumps(_finite({"schema": 1} | summary), indent=2) + "\n").encode(),
        "index.html": pages.get_template(f"{template}.html").render(context).encode("utf-8", "replace"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot write the report there: {error.strerror}") from None
    for name, content in files.items():
        beside = folder / f".{name}.{os.getpid()}.tmp"
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(folder / name)
        finally:
            beside.unlink(missing_ok=True)
    return folder / "index.html"


def _hover(point: Point) -> str:
    return f"{point.label}: {size(point.size)}, perplexity {number(point.perplexity)}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment() -> Environment:
    folder = resources.files("quantpress.eval") / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"change": change, "share": share}
    environment.filters |= {
        "size": size, "number": number, "change": change, "share": share, "gate": gate, "gate_name": gate_name,
        "small": small, "yaml": _yaml, "cell": cell, "seconds": seconds, "interval": interval, "score": score,
    }  # fmt: skip
    return environment
