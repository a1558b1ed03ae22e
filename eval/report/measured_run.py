"""Evaluated run folders, as the report, the model card and the recommendation read them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quantpress.artifact.manifest import RunManifest, read_run_manifest
from quantpress.core.errors import BadInput
from quantpress.exports.serving.record import Serving
from quantpress.exports.serving.record import read as read_serving

from ..measure.formatting import change, interval, number, points, share, size
from ..measure.metrics import Metric, MetricValue, measured
from ..measure.repeats import folded
from ..measure.results import Results, read_results
from ..measure.sections import Divergence, DomainResult, EvaluationText, Quality
from .heatmap import Heat, heat, measure_in_words
from .page_text import program, sentence

SWEEP_STATE = "sweep.json"  # how each run of a sweep ended
REPEATS = "repeats"  # further runs of the same recipe, with other seeds


@dataclass(frozen=True)
class MeasuredRun:
    """An evaluated run folder. label: its name in charts and tables; serving: the record of its smoke test, if any.

    results: the means over the recipe's runs where it has several; own: this artifact's. text, original, artifact,
    divergence: those of `results`, which are there.
    """

    folder: Path
    manifest: RunManifest
    results: Results
    own: Results
    label: str
    serving: Serving | None
    text: EvaluationText
    original: Quality
    artifact: Quality
    divergence: Divergence

    @property
    def increase(self) -> float:
        """Increase of the perplexity, as a fraction."""
        return math.nan if self.results.perplexity_increase is None else self.results.perplexity_increase

    @property
    def size(self) -> int:
        """Bytes of weights on disk."""
        return self.manifest.artifact.bytes

    @property
    def ratio(self) -> float:
        """Size of the original on disk over that of the artifact."""
        return self.manifest.artifact.original_bytes / max(1, self.size)

    @property
    def smaller(self) -> str:
        return f"{self.ratio:.1f}× smaller" if self.ratio >= 1 else f"{1 / self.ratio:.1f}× larger"

    @cached_property
    def heat(self) -> Heat:
        return heat(self.manifest.layers)

    @property
    def error_in_words(self) -> str:
        """What the relative error of its layers is the error of."""
        return measure_in_words(self.manifest.error_measure)

    @property
    def scheme(self) -> str:
        """The most common scheme of its quantized layers, and the method."""
        schemes = [layer.scheme for layer in self.manifest.layers if layer.bits < 16]
        method = self.manifest.recipe.get("method") or {}
        name = method.get("name") if isinstance(method, dict) else None
        most = max(dict.fromkeys(schemes), key=schemes.count, default="")
        return ", ".join(part for part in (most, name) if part)

    @property
    def tokens_per_second(self) -> float | None:
        """The highest rate that the smoke test measured on a server; None without a smoke test.

        Not the timing in the results: that is of the dequantized model, which is equally fast for every format.
        """
        return None if self.serving is None else max(self.serving.tokens_per_second.values(), default=None)

    @cached_property
    def metrics(self) -> list[tuple[Metric, MetricValue]]:
        """Every metric that was measured, with its value."""
        return measured(self.results)

    def value(self, metric: Metric) -> MetricValue | None:
        return metric.read(self.results)

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
    def by_text(self) -> list[DomainResult]:
        """The figures on every text, the first text among them."""
        results, away = self.results, self.divergence
        first = DomainResult(
            name="evaluation", text=self.text, original_perplexity=self.original.perplexity,
            artifact_perplexity=self.artifact.perplexity, perplexity_increase=self.increase,
            perplexity_increase_interval=results.perplexity_increase_interval, kl_mean=away.kl_mean,
            kl_interval=away.kl_interval, top1_agreement=away.top1_agreement, top1_interval=away.top1_interval,
        )  # fmt: skip
        return [first, *results.domains]

    @property
    def served(self) -> str:
        """The outcome of the smoke test in a sentence; empty without one."""
        if self.serving is None:
            return ""
        made = [check for check in self.serving.checks if check.status != "skip"]
        wrong = [check.name for check in made if check.status == "fail"]
        who = sentence(program(self.serving.server)) + (f" ({self.serving.version})" if self.serving.version else "")
        if self.serving.verdict == "FAILED":
            return f"{who} failed {', '.join(wrong) or 'the smoke test'}."
        agrees = "; its answers agree with our own forward pass over these files" if self.serving.agreement else ""
        checks = "the one check that applies" if len(made) == 1 else f"the {len(made)} checks that apply"
        return f"{who} loads it and passes {checks}{agrees}."

    @property
    def findings(self) -> list[str]:
        """A sentence each about tasks and server, where there are any."""
        return [line for line in (self._scores, self.served) if line]

    @property
    def _scores(self) -> str:
        """The tasks with a significantly worse score, or that there are none."""
        paired = [task for task in self.results.tasks if task.difference_interval and task.difference is not None]
        if not paired:
            return ""
        lower = []
        for task in paired:
            low, high = task.difference_interval or (0.0, 0.0)
            worse = high < 0 if task.higher_is_better else low > 0
            if worse:
                lower.append(f"{task.task} ({task.metric}) by {interval((low, high), points)} points")
        if lower:
            return f"Significantly worse than the original (95 % CI): {', '.join(lower)}."
        scores = "The task score is not" if len(paired) == 1 else f"None of the {len(paired)} task scores is"
        return f"{scores} significantly worse than the original's (95 % CI)."

    @property
    def warnings(self) -> list[str]:
        """What a reader has to know before using the numbers, the worst first."""
        out = [*self.results.warnings, *grouped(self.manifest.fallbacks), *self.results.notes]
        if not math.isfinite(self.artifact.perplexity):
            out.insert(0, "The artifact's perplexity is not a finite number: it does not work as a language model.")
        if not self.results.complete:
            out.insert(0, "The evaluation was interrupted: sections are missing.")
        calibration = self.manifest.calibration
        if calibration and calibration.sha256 == self.text.sha256:
            out.append("Calibrated on the text it is evaluated on: the quality shown is too good.")
        return out


def grouped(fallbacks: Sequence[str]) -> list[str]:
    """Notes on layers, `name: note` each, with those that say the same as one."""
    names: dict[str, list[str]] = {}
    for line in fallbacks:
        name, mark, note = line.partition(": ")
        names.setdefault(note if mark else line, []).append(name if mark else "")
    few = {note: [f"{name}: {note}" if name else note for name in of] for note, of in names.items() if len(of) < 4}
    return [line for note, of in names.items() for line in few.get(note, [f"{of[0]} and {len(of) - 1} more: {note}"])]


def open_run(folder: Path) -> MeasuredRun:
    """The run in `folder`; raises BadInput when there is none, or it was not evaluated against its original."""
    manifest, own = read_run_manifest(folder), read_results(folder)
    results = _with_repeats(folder, manifest, own)
    text, original, artifact, away = results.text, results.original, results.artifact, results.divergence
    if text is None or original is None or artifact is None or away is None:
        raise BadInput(f"{folder}: eval/results.json holds no perplexity and divergence; quantpress eval {folder}")
    serving = read_serving(folder)
    return MeasuredRun(folder, manifest, results, own, manifest.name, serving, text, original, artifact, away)


def _with_repeats(folder: Path, manifest: RunManifest, own: Results) -> Results:
    """The figures over all finished runs of the recipe on the text; `own` where this is the only one.

    A repeat of another recipe, model or text, which an earlier command left, is passed over with a note.
    """
    runs, notes = [(manifest.seed, own)], []
    for again in sorted((folder / REPEATS).glob("*/manifest.json"), key=lambda file: (len(file.parent.name), file)):
        if not (again.parent / "eval" / "results.json").is_file():
            continue
        there, results = read_run_manifest(again.parent), read_results(again.parent)
        alike = results.complete and results.text == own.text and there.model.files == manifest.model.files
        if alike and _but_for_chance(there.recipe) == _but_for_chance(manifest.recipe):
            runs.append((there.seed, results))
        else:
            notes.append(f"{REPEATS}/{again.parent.name} is of another recipe, model or text, and does not count")
    means = folded(runs) if len(runs) > 1 and own.divergence is not None else own
    return means.model_copy(update={"notes": (*means.notes, *notes)}) if notes else means


def _but_for_chance(recipe: dict[str, Any]) -> Any:
    """What decides the artifact apart from seeds."""
    beside = ("name", "description", "model", "formats", "targets", "smoke", "gates", "evaluation")

    def seedless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: seedless(item) for key, item in value.items() if key != "seed"}
        return [seedless(item) for item in value] if isinstance(value, list) else value

    return seedless({key: value for key, value in recipe.items() if key not in beside})


@dataclass(frozen=True)
class LeftOut:
    """A run that cannot be compared with the others, because it failed or is not finished, with the reason."""

    name: str
    reason: str


def find_runs(folders: Sequence[Path]) -> tuple[list[MeasuredRun], list[LeftOut]]:
    """The finished runs in `folders`, run folders or folders that hold some (a sweep's), each once; and those left out.

    Raises BadInput for a folder that holds no run, and when no run is finished.
    """
    found: dict[Path, Path] = {}
    left_out: dict[str, LeftOut] = {}
    for folder in folders:
        if (folder / "manifest.json").is_file():
            found.setdefault(folder.resolve(), folder)
            continue
        inside = sorted(file.parent for file in folder.glob("*/manifest.json"))
        failed = _failed(folder)
        left_out |= {name: LeftOut(name, f"failed: {reason}") for name, reason in failed.items()}
        planned = {file.stem for file in folder.glob(".recipes/*.yaml")} - failed.keys() - {run.name for run in inside}
        left_out |= {name: LeftOut(name, "not finished: it has no artifact yet") for name in sorted(planned)}
        found |= {run.resolve(): run for run in inside if run.resolve() not in found and run.name not in failed}
        if not inside and not left_out:
            raise BadInput(f"{folder}: neither a run folder (manifest.json) nor a folder of evaluated runs")
    runs = []
    for folder in found.values():
        if (folder / "eval" / "results.json").is_file() or len(found) == 1:
            run = open_run(folder)
            if run.results.complete:
                runs.append(run)
                continue
        reason = "not finished: `quantpress eval` of its folder measures what is missing"
        left_out[folder.name] = LeftOut(folder.name, reason)
    if not runs:
        reasons = "; ".join(f"{one.name} {one.reason}" for one in left_out.values())
        where = ", ".join(map(str, folders)) or "nothing"
        raise BadInput(f"no finished run in {where}" + (f" ({reasons})" if reasons else ""))
    return runs, list(left_out.values())


def _failed(sweep: Path) -> dict[str, str]:
    """The runs of a sweep that failed, by name, with the reason."""
    try:
        document = json.loads((sweep / SWEEP_STATE).read_text(encoding="utf-8"))
        return {one["name"]: one["reason"] for one in document["runs"] if one["status"] == "failed"}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def comparable(a: MeasuredRun, b: MeasuredRun) -> None:
    """Raise BadInput, naming the difference, unless both runs have the same original and evaluation text."""
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


def labelled(runs: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    """The runs with labels; runs that share a name are told apart by their folders."""
    names = [run.manifest.name for run in runs]
    folders = [run.folder.resolve() for run in runs]
    out = []
    for run, name, folder in zip(runs, names, folders, strict=True):
        if names.count(name) > 1:
            twins = [f.name for f, n in zip(folders, names, strict=True) if n == name]
            where = folder.name if twins.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}"
            name = where if where.endswith(name) else f"{name} ({where})"
        out.append(replace(run, label=name))
    return out
