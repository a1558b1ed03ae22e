"""The command that makes a release: every stage of a recipe in one run folder, and only those that have changed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from quantpress.exports.servers.target_settings import Drafting

from ..artifact.manifest import read_manifest
from ..core.errors import BadInput
from ..core.files import alone_in, file_sha256, write_json
from ..recipe import Recipe, Target
from .app import app
from .measuring import github_summary
from .options import (
    JsonOpt,
    LimitsOpt,
    ModelOpt,
    OutOpt,
    OverwriteOpt,
    PickleOpt,
    RecipeArg,
    SetOpt,
    ShareOpt,
    TrustOpt,
    chosen_recipe,
    default_out,
    out_console,
    say,
)
from .smoking import served, smoke_stage
from .work import evaluation_windows, measure, print_results, quantize_model

if TYPE_CHECKING:
    from quantpress.eval.measure.evaluate import Prepared
    from quantpress.eval.measure.results import Results
    from quantpress.eval.release.ledger import Ledger


@app.command()
def run(
    recipe: RecipeArg = "w4a16-gptq",
    model: ModelOpt = None,
    out: OutOpt = None,
    sets: SetOpt = [],  # noqa: B006
    overwrite: OverwriteOpt = False,
    ignore_limits: LimitsOpt = False,
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
    share: ShareOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """The whole recipe: quantize, export, verify, evaluate, smoke test, report, card. Again, only what changed."""
    chosen = chosen_recipe(recipe, model, sets)
    where = out or default_out(chosen)
    with alone_in(where):
        # Read before the work, so that what cannot be used does not cost a run.
        text = None if chosen.evaluation is None else evaluation_windows(chosen, allow_pickle, trust_remote_code)
        _check_server(chosen)
        quantize_model(chosen, where, overwrite, ignore_limits, allow_pickle, trust_remote_code, share)
        release = _Release(chosen, where, allow_pickle, trust_remote_code, quiet=as_json)
        for target in chosen.targets:
            release.export(target)
        release.verify()
        results = None if text is None else release.evaluate(text)
        verdict = release.smoke()
        page = release.report() if results is not None else None
        card = release.card() if results is not None else None
    if as_json:
        document = {"out": str(where), "report": page and str(page), "results": results and results.document()}
        stages = {name: stage.summary for name, stage in read_manifest(where).stages.items()}
        print(json.dumps(document | {"stages": stages}))  # noqa: T201
    else:
        _print(where, page, card, results)
    if results is not None:
        github_summary(chosen.name, results)
    if verdict == "FAILED":
        raise typer.Exit(1)
    if results is not None and results.gates.missed:
        raise typer.Exit(3)


@dataclass(frozen=True)
class _Release:
    """The stages after the artifact is there; `out` is the run folder."""

    recipe: Recipe
    out: Path
    allow_pickle: bool
    trust: bool
    quiet: bool

    @property
    def _ledger(self) -> "Ledger":
        from quantpress.eval.release.ledger import Ledger

        return Ledger(self.out, lambda line: say(f"note: {line}"))

    @property
    def _artifact(self) -> dict[str, str]:
        """What every stage reads: the artifact, by its bytes, and the version of what reads it."""
        manifest = read_manifest(self.out)
        digest = hashlib.sha256(json.dumps(manifest.artifact.files, sort_keys=True).encode()).hexdigest()
        return {"artifact": digest, "quantpress": manifest.quantpress or ""}

    def export(self, target: Target) -> None:
        from quantpress.eval.release.ledger import Stage
        from quantpress.exports.package import export

        def work() -> dict[str, Any]:
            made = export(self.out, target, overwrite=True)
            return {"folder": f"export/{target.name}", "format": made.format, "converted_from": made.converted_from}

        inputs = self._artifact | {"target": target.model_dump(mode="json")}
        drafted = self.out / "eval" / "draft.json"
        if isinstance(target, Drafting) and target.draft_for is not None and drafted.is_file():
            inputs["draft"] = file_sha256(drafted)
        self._ledger.run(Stage(f"export {target.name}", inputs, (f"export/{target.name}/SHA256SUMS",), work))

    def verify(self) -> None:
        """Every tensor as its config says: cheap next to the rest, so each time. The files have just been hashed, as
        they were made or as those of a finished run."""
        from quantpress.exports.verify import structure

        wrong = structure(self.out / "quantized")
        if wrong:
            more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
            raise BadInput(f"{wrong[0]}{more}; quantpress verify {self.out} says all, --overwrite makes it anew")

    def evaluate(self, text: "Prepared") -> "Results":
        """What was measured, judged by the gates as they are now."""
        from quantpress.eval.measure.judge import judge
        from quantpress.eval.measure.results import read_results
        from quantpress.eval.release.ledger import Stage
        from quantpress.eval.report.junit import write_junit

        def work() -> dict[str, Any]:
            found = measure(self.out, self.recipe, text, self.allow_pickle, self.trust)
            return {"seconds": found.seconds, "device": found.device}

        assert self.recipe.evaluation is not None
        wanted = self.recipe.evaluation.model_dump(mode="json")
        tasks = None if text.tasks is None else hashlib.sha256(text.tasks.identity().encode()).hexdigest()
        inputs = self._artifact | {"evaluation": wanted, "text": text.text.tokens.sha256, "tasks and their data": tasks}
        self._ledger.run(Stage("eval", inputs, ("eval/results.json",), work))
        results = read_results(self.out)
        judged = results.model_copy(update={"gates": judge(self.recipe.gates, results)})
        if judged != results:
            write_json(self.out / "eval" / "results.json", judged.document())
            write_junit(self.out / "eval" / "junit.xml", self.recipe.name, judged)
        return judged

    def smoke(self) -> str | None:
        """The verdict of the smoke test, None without one. One that failed is made again each time."""
        from quantpress.eval.release.ledger import Stage

        settings = self.recipe.smoke
        if settings is None:
            return None

        def work() -> Mapping[str, Any]:
            record = smoke_stage(served(self.out / "quantized"), self.out, settings, self.quiet)
            return {"verdict": record.verdict, "server": record.server, "version": record.version}

        inputs = self._artifact | {"smoke": settings.model_dump(mode="json")}
        stage = Stage("smoke", inputs, ("eval/serving.json",), work, failed=lambda said: said["verdict"] == "FAILED")
        return str(self._ledger.run(stage)["verdict"])

    def report(self) -> Path:
        from quantpress.eval.report.page import write_report

        return write_report(self.out)

    def card(self) -> Path:
        from quantpress.eval.report.card import write_card

        return write_card(self.out)


def _check_server(recipe: Recipe) -> None:
    """Raise BadInput when the smoke test's server is not there."""
    settings = recipe.smoke
    if settings is None or settings.server == "url":
        return
    from quantpress.exports.servers import LAUNCHERS
    from quantpress.exports.serving.starting import interpreter

    try:
        interpreter(LAUNCHERS[settings.server], settings.python)
    except BadInput as error:
        raise BadInput(f"smoke.server {settings.server}: {error}; or --set smoke=null leaves the test out") from None


def _print(where: Path, page: Path | None, card: Path | None, results: "Results | None") -> None:
    if results is not None:
        print_results(results)
    out_console.print(f"artifact    {where / 'quantized'}")
    for folder in sorted((where / "export").glob("*/")):
        out_console.print(f"export      {folder}")
    if page is not None:
        out_console.print(f"report      {page}")
    if card is not None:
        out_console.print(f"model card  {card}")
    out_console.print(f"provenance  {where / 'manifest.json'}")
