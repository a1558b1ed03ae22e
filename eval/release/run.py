"""A whole release in one run folder: every stage of a recipe, and again only those whose inputs have changed."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantpress.artifact.manifest import Manifest, read_manifest
from quantpress.core.errors import BadInput
from quantpress.core.files import file_sha256, write_json
from quantpress.core.notebook import table
from quantpress.exports.package import export
from quantpress.exports.servers.target_settings import Drafting
from quantpress.exports.serving.record import Serving
from quantpress.exports.serving.record import read as read_serving
from quantpress.exports.serving.reference import FILE as REFERENCE
from quantpress.exports.verify import structure
from quantpress.recipe import Recipe, Target

from ..measure.evaluate import Prepared
from ..measure.gates import judge
from ..measure.results import Results, read_results
from ..report.card import write_card
from ..report.junit import Stage, write_junit
from ..report.measured_run import open_run
from ..report.page import write_report
from .callbacks import Callbacks, Options
from .ledger import Ledger, ReleaseStage
from .repeat import check_repeat, measured_alike, repeat_folder, reseeded, told_apart
from .session import evaluation_inputs, make_artifact, measure_run
from .smoke_run import ServedArtifact, check_server, run_smoke, served_file


@dataclass(frozen=True)
class Release:
    """What a run made, and how it was judged.

    results: None when the recipe has no evaluation; then there is no report and no model card either. serving: the
    record of the smoke test, None without one. stages: what each stage says of itself, by name.
    """

    out: Path
    results: Results | None
    serving: Serving | None
    report: Path | None
    card: Path | None
    stages: Mapping[str, Any]

    @property
    def artifact(self) -> Path:
        return self.out / "quantized"

    @property
    def exports(self) -> list[Path]:
        """The folder of every target."""
        return sorted((self.out / "export").glob("*/"))

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [("artifact", self.artifact)]
        rows += [("export", folder) for folder in self.exports]
        rows += [(name, path) for name, path in (("report", self.report), ("model card", self.card)) if path]
        if self.serving is not None:
            rows.append(("smoke test", f"{self.serving.server}: {self.serving.verdict}"))
        return table("Release", rows) + ("" if self.results is None else self.results._repr_html_())


def make_release(recipe: Recipe, out: Path, options: Options, callbacks: Callbacks) -> Release:
    """Quantize, export, verify, evaluate, smoke test, report and card, in `out`; what is done already is kept.

    Raises BadInput, before the work where it can be known, for whatever one of the stages refuses.
    """
    # Read before the work, so that a missing text or server does not cost a run.
    inputs = None if recipe.evaluation is None else evaluation_inputs(recipe, options)
    check_server(recipe)
    count = check_repeat(recipe, options, inputs)
    if count < options.repeat:
        callbacks.on_note("--repeat: nothing in this recipe is drawn at random, so one run says it all")
    stages = _made(recipe, out, options, callbacks)
    if inputs is not None:
        stages.evaluate(inputs)
        for k in range(1, count):
            again = _made(reseeded(recipe, k), repeat_folder(out, k), options, told_apart(callbacks, k, count))
            again.evaluate(measured_alike(inputs), served=False)
    results = None if inputs is None else open_run(out).results
    for target in recipe.targets:  # with the reference that the evaluation made
        stages.export(target)
    serving = stages.smoke()
    report = card = None
    if results is not None:
        report, written = write_report(out), write_card(out)
        card = written.path
        if written.edited is not None:
            callbacks.on_note(
                f"{card} was edited by hand and is left as it is; quantpress card --overwrite-card replaces it"
            )
    (out / "eval").mkdir(exist_ok=True)
    write_junit(out / "eval" / "junit.xml", recipe.name, results, _stages_of(read_manifest(out)))
    done = {name: stage.summary for name, stage in read_manifest(out).stages.items()}
    return Release(out, results, serving, report, card, done)


def _made(recipe: Recipe, out: Path, options: Options, callbacks: Callbacks) -> "_Stages":
    """The artifact made in `out`, and looked at."""
    make_artifact(recipe, out, options, callbacks)
    stages = _Stages(recipe, out, options, callbacks)
    stages.verify()
    return stages


def _stages_of(manifest: Manifest) -> list[Stage]:
    """What the run has done, for a test reporter."""
    out = [Stage("quantize", 0.0 if manifest.timing is None else manifest.timing.seconds)]
    for name, done in manifest.stages.items():
        failed = "the server failed its checks" if done.summary.get("verdict") == "FAILED" else None
        out.append(Stage(name, done.seconds, failed))
    return out


@dataclass(frozen=True)
class _Stages:
    """The stages that follow once the artifact is in the run folder `out`."""

    recipe: Recipe
    out: Path
    options: Options
    callbacks: Callbacks

    @cached_property
    def _ledger(self) -> Ledger:
        return Ledger(self.out, self.callbacks.on_note)

    @property
    def _artifact(self) -> dict[str, str]:
        """What every stage depends on: the artifact's bytes, and the version of quantpress that reads them."""
        manifest = read_manifest(self.out)
        return {"artifact": manifest.artifact.digest, "quantpress": manifest.quantpress or ""}

    def export(self, target: Target) -> None:
        def work() -> dict[str, Any]:
            made = export(self.out, target, overwrite=True)
            return {"folder": f"export/{target.name}", "format": made.format, "converted_from": made.converted_from}

        inputs = self._artifact | {"target": target.model_dump(mode="json")}
        reference = self.out / "eval" / REFERENCE
        if reference.is_file():
            inputs["reference"] = file_sha256(reference)
        drafted = self.out / "eval" / "draft.json"
        if isinstance(target, Drafting) and target.draft_for is not None and drafted.is_file():
            inputs["draft"] = file_sha256(drafted)
        self._ledger.run(ReleaseStage(f"export {target.name}", inputs, (f"export/{target.name}/SHA256SUMS",), work))

    def verify(self) -> None:
        """Every tensor against config and model: cheap beside the rest, so it is done every time. The checksums need no
        second look: the files were just written, or hashed as those of a finished run.
        """
        wrong = structure(self.out / "quantized")
        if wrong:
            more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
            raise BadInput(
                f"{wrong[0]}{more}; `quantpress verify {self.out}` lists everything, --overwrite makes the run anew"
            )

    def evaluate(self, prepared: Prepared, *, served: bool = True) -> Results:
        """What was measured, judged by the gates that the recipe has now. served: as for `measure_run`."""

        def work() -> dict[str, Any]:
            found = measure_run(self.recipe, self.out, prepared, self.options, self.callbacks, served=served)
            return {"seconds": found.seconds, "device": found.device}

        wanted = prepared.wanted.model_dump(mode="json")
        tasks = None if prepared.tasks is None else hashlib.sha256(prepared.tasks.identity().encode()).hexdigest()
        text = [prepared.text.tokens.sha256, *(domain.text.tokens.sha256 for domain in prepared.domains)]
        inputs = self._artifact | {"evaluation": wanted, "text": text, "tasks and their data": tasks}
        made = ("eval/results.json", *([f"eval/{REFERENCE}"] if served else []))
        self._ledger.run(ReleaseStage("eval", inputs, made, work))
        results = read_results(self.out)
        judged = results.model_copy(update={"gates": judge(self.recipe.gates, results)})
        if judged != results:
            write_json(self.out / "eval" / "results.json", judged.document())
            write_junit(self.out / "eval" / "junit.xml", self.recipe.name, judged)
        return judged

    def smoke(self) -> Serving | None:
        """The record of the smoke test, None without one. A test that failed is repeated every time."""
        settings = self.recipe.smoke
        if settings is None:
            return None

        def work() -> dict[str, Any]:
            record = run_smoke(
                ServedArtifact(served_file(self.out / "quantized"), settings), self.out, self.options, self.callbacks
            )
            return {"verdict": record.verdict, "server": record.server, "version": record.version}

        inputs = self._artifact | {"smoke": settings.model_dump(mode="json")}
        stage = ReleaseStage(
            "smoke", inputs, ("eval/serving.json",), work, failed=lambda said: said["verdict"] == "FAILED"
        )
        self._ledger.run(stage)
        return read_serving(self.out)
