"""The report of a run, and several runs side by side: one page a stakeholder reads in a minute, an engineer in ten.

Everything comes from `manifest.json` and `eval/results.json`; the same input gives the same bytes.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from quantpress.quantize.errors import BadInput

from .heat import DARK, LIGHT, Heat, HeatScale, heat
from .png import layers_png, tradeoff_png
from .records import Check, Divergence, EvaluationText, Manifest, Quality, Results, read
from .tradeoff import Plot, Point, pareto, tradeoff
from .wording import NBSP, cell, change, gate, gate_name, number, seconds, share, size, small

_WIDE, _NARROW = (940, 400), (350, 340)  # px: the page shows one of them, by the width of the window


@dataclass(frozen=True)
class Run:
    """One run folder as the report sees it; `label` is what the charts call it."""

    folder: Path
    manifest: Manifest
    results: Results
    label: str

    @property
    def text(self) -> EvaluationText:
        assert self.results.text is not None  # as _run saw to, here and below
        return self.results.text

    @property
    def original(self) -> Quality:
        assert self.results.original is not None
        return self.results.original

    @property
    def artifact(self) -> Quality:
        assert self.results.artifact is not None
        return self.results.artifact

    @property
    def divergence(self) -> Divergence:
        assert self.results.divergence is not None
        return self.results.divergence

    @property
    def increase(self) -> float:
        """Of the perplexity, as a fraction."""
        return math.nan if self.results.perplexity_increase is None else self.results.perplexity_increase

    @property
    def size(self) -> int:
        return self.manifest.artifact.bytes

    @property
    def ratio(self) -> float:
        """How many times smaller than the original the weights are on disk."""
        return self.manifest.artifact.original_bytes / max(1, self.size)

    @property
    def smaller(self) -> str:
        return f"{self.ratio:.1f}× smaller" if self.ratio >= 1 else f"{1 / self.ratio:.1f}× larger"

    @property
    def original_bits(self) -> float:
        return self.manifest.artifact.original_bytes * 8 / max(1, self.manifest.artifact.parameters)

    @cached_property
    def heat(self) -> Heat:
        return heat(self.manifest.layers)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.results.gates.checks if check.verdict == "REGRESSION"]

    @property
    def verdict(self) -> str:
        """The gates' answer in plain words."""
        count = len(self.results.gates.checks)
        if self.results.gates.verdict == "NONE":
            return "Not judged: the recipe sets no gates."
        if self.results.gates.verdict == "ACCEPT":
            return (
                "Accepted: the gate passed."
                if count == 1
                else f"Accepted: {'both' if count == 2 else f'all {count}'} gates passed."
            )
        if self.results.gates.verdict == "INCONCLUSIVE":
            return f"Inconclusive: {self.results.gates.reason}."
        reasons = "; ".join(f"{gate_name(c.name)} {gate(c.value, c.name)}, limit {gate(c.limit, c.name)}"
                            for c in self.failed)  # fmt: skip
        return f"Regression: {len(self.failed)} of {count} gates failed ({reasons})."

    @property
    def headline(self) -> str:
        artifact = self.manifest.artifact
        return (
            f"{self.smaller} weights: {size(artifact.original_bytes)} → {size(artifact.bytes)}. "
            f"Perplexity {number(self.original.perplexity)} → {number(self.artifact.perplexity)} "
            f"({change(self.increase)}). The same next token as the original "
            f"{share(self.divergence.top1_agreement)} of the time."
        )

    @property
    def warnings(self) -> list[str]:
        out = list(self.manifest.fallbacks)
        if not math.isfinite(self.artifact.perplexity):
            out.insert(0, "The artifact's perplexity is not a finite number: it does not work as a language model.")
        calibration = self.manifest.calibration
        if calibration and calibration.sha256 == self.text.sha256:
            out.append("Calibrated on the text it is evaluated on: the quality shown flatters the artifact.")
        return out


def write_report(run: Path) -> Path:
    """Write RUN/report: index.html, tradeoff.png, layers.png, summary.md, summary.json; the path of index.html.

    Raises BadInput when RUN lacks manifest.json or eval/results.json, or they cannot be read.
    """
    one = _run(run)
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
    several = [_run(folder) for folder in runs]
    for other in several[1:]:
        _comparable(several[0], other)
    several = _labelled(sorted(several, key=lambda r: (r.size, r.artifact.perplexity, r.manifest.name)))
    front = _front(several)
    summary = [_figures(r) | {"label": r.label, "pareto": r.label in front} for r in several]
    return _write(out, "compare", several, "Size against quality", {"runs": summary})


def _run(folder: Path) -> Run:
    manifest, results = read(folder)
    if results.text is None or results.original is None or results.artifact is None or results.divergence is None:
        raise BadInput(f"{folder}: eval/results.json holds no perplexity and divergence; quantpress eval {folder}")
    return Run(folder, manifest, results, manifest.name)


def _comparable(a: Run, b: Run) -> None:
    """Raise BadInput, naming the difference, unless both runs judged one original on one text."""
    for key in ("sha256", "tokens", "windows", "window", "stride", "bos"):
        one, two = getattr(a.text, key), getattr(b.text, key)
        if one != two:
            raise BadInput(f"cannot compare {a.folder} and {b.folder}: evaluation text differs, {key} {one} and {two}")
    one_model, two_model = a.manifest.model, b.manifest.model
    if one_model.files != two_model.files or (not one_model.files and one_model.id != two_model.id):
        names = sorted(one_model.files.keys() | two_model.files.keys())
        file = next((n for n in names if one_model.files.get(n) != two_model.files.get(n)), "id")
        raise BadInput(
            f"cannot compare {a.folder} and {b.folder}: different originals, {one_model.id} and {two_model.id} "
            f"({file} differs)"
        )


def _labelled(runs: Sequence[Run]) -> list[Run]:
    """Runs that share a name are told apart by their folders."""
    names = [run.manifest.name for run in runs]
    folders = [run.folder.resolve() for run in runs]
    out = []
    for run, name, folder in zip(runs, names, folders, strict=True):
        if names.count(name) > 1:
            twins = [f.name for f, n in zip(folders, names, strict=True) if n == name]
            where = folder.name if twins.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}"
            name = where if where.endswith(name) else f"{name} ({where})"
        out.append(Run(run.folder, run.manifest, run.results, name))
    return out


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
    environment.filters |= {
        "size": size, "number": number, "change": change, "share": share, "gate": gate, "gate_name": gate_name,
        "small": small, "yaml": _yaml, "cell": cell, "seconds": seconds,
    }  # fmt: skip
    return environment
