"""The command that measures: a run, an artifact, a checkpoint or a served model, against its original."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantpress.eval.release.ledger import Ledger

from ..artifact.manifest import read_manifest
from ..core.errors import BadInput
from ..core.files import alone_in
from ..recipe import Recipe
from ..recipe import loading as recipes
from .app import app
from .drafting import draft as measure_draft
from .options import JsonOpt, PickleOpt, SetOpt, TrustOpt, err_console, open_source
from .work import evaluation_windows, exit_on_gates, print_results, watched

if TYPE_CHECKING:
    from quantpress.eval.measure.results import Results, Subject


@app.command("eval")
def evaluate_command(
    subject: Annotated[
        Path | None, typer.Argument(help="a run folder, an artifact in any format, or a plain checkpoint")
    ] = None,
    original: Annotated[
        str | None, typer.Option("--original", help="what to compare with, as for --model; a run knows its own")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="a recipe whose evaluation and gates count; default: the run's own")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="a served model instead: its server's address, to /v1")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="the name it is served under")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="writes eval/ there; default: the run, or artifacts/<name>-eval")
    ] = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="instead: how often the original accepts what the artifact drafts")
    ] = False,
    sets: SetOpt = [],  # noqa: B006
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure against the original; --set evaluation.windows=32 and --set gates.max_kl=0.1 change what and how."""
    if (subject is None) == (url is None):
        raise BadInput("eval: give a folder to measure, or --url and --model of a served one")
    if (url is None) != (model is None):
        raise BadInput("eval: --url and --model go together")
    if draft and subject is None:
        raise BadInput("eval: --draft is measured on a folder; a server shows too little of its distributions")
    if subject is not None and not _is_run(subject):
        _readable(subject)
    where = _where(subject, model)
    chosen = _recipe(subject, original, recipe, sets)
    prepared = evaluation_windows(chosen, allow_pickle, trust_remote_code)
    source = open_source(chosen, allow_pickle, trust_remote_code)
    from quantpress.eval.measure.evaluate import evaluate, evaluate_served, positions_of
    from quantpress.eval.measure.served import Server

    folder = subject / "quantized" if subject is not None and _is_run(subject) else subject
    into = out or where
    with alone_in(into):
        if draft and folder is not None:
            measure_draft(source.path, folder, prepared.text, into, as_json)
            return
        if _is_run(into):
            Ledger(into).forget("eval")  # what is measured now may be on other terms than the recipe's
        if subject is not None and folder is not None:
            what = _subject(subject, chosen)
            with watched(into, what.name) as watch:
                results = evaluate(source.path, folder, prepared, chosen.gates, watch, what)
        else:
            assert url is not None
            assert model is not None
            from quantpress.eval.measure.results import Subject

            server = Server(url, model, positions_of(source.path) or 2048, os.environ.get("QUANTPRESS_API_KEY"))
            what = Subject(kind="served", name=model, original=chosen.model, server=url)
            with watched(into, what.name) as watch:
                results = evaluate_served(source.path, server, prepared, chosen.gates, watch, what)
    _show(results, what.name, into, as_json)
    exit_on_gates(results)


def _show(results: "Results", name: str, where: Path, as_json: bool) -> None:
    github_summary(name, results)
    if as_json:
        print(json.dumps(results.document()))  # noqa: T201
    else:
        print_results(results)
        err_console.print(f"results: {where / 'eval' / 'results.json'}", markup=False, soft_wrap=True)


def github_summary(name: str, results: "Results") -> None:
    """Append the verdict to the summary of the GitHub step that runs this, if one does."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        from quantpress.eval.report.junit import step_summary

        with open(path, "a", encoding="utf-8") as file:
            file.write(step_summary(name, results))


def _is_run(subject: Path) -> bool:
    return (subject / "manifest.json").is_file() and (subject / "quantized").is_dir()


def _readable(subject: Path) -> None:
    if not subject.exists():
        raise BadInput(f"{subject}: no such folder")
    if subject.is_dir() and not (subject / "config.json").is_file() and not any(subject.glob("*.gguf")):
        raise BadInput(f"{subject}: neither a run folder (manifest.json, quantized/) nor a model (config.json)")


def _where(subject: Path | None, model: str | None) -> Path:
    if subject is not None and _is_run(subject):
        return subject
    name = (model or "served").replace("/", "-") if subject is None else subject.resolve().name
    return Path("artifacts") / f"{name}-eval"


def _recipe(subject: Path | None, original: str | None, recipe: str | None, sets: list[str]) -> Recipe:
    """What to measure and how: the run's own recipe or the one that is given, with `sets` applied."""
    if recipe is not None:
        chosen = recipes.load(recipe, sets)
    else:
        run = subject is not None and _is_run(subject)
        document: dict[str, Any] = read_manifest(subject).recipe if run and subject is not None else {}
        for override in sets:
            recipes.apply_override(document, override)
        chosen = recipes.parse(document, str(subject / "manifest.json") if run and subject is not None else "--set")
    if original is None and not (subject is not None and _is_run(subject)):
        raise BadInput("eval: --original says what the model was made from: a folder, a hub id or smollm2-135m")
    if original is None and recipe is not None and subject is not None:
        original = read_manifest(subject).recipe["model"]
    return chosen if original is None else chosen.model_copy(update={"model": original})


def _subject(subject: Path, chosen: Recipe) -> "Subject":
    from quantpress.eval.measure.results import Subject

    if _is_run(subject):
        manifest = read_manifest(subject)
        name, format = manifest.name, manifest.artifact.format
        return Subject(kind="run", name=name, format=format, original=chosen.model)
    return Subject(kind="artifact", name=subject.resolve().name, original=chosen.model)
