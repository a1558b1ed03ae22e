"""The commands that measure and show what was measured: eval, report and compare."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantpress.eval.release.callbacks import Options

from ..core.errors import BadInput
from ..recipe import loading as recipes
from .app import app
from .options import JsonOpt, SetOpt, quiet_libraries, with_options
from .printing import followed, print_json, print_results, say, show, show_path

if TYPE_CHECKING:
    from quantpress.eval.measure.draft_acceptance import Draft
    from quantpress.eval.measure.results import Results


@app.command("eval")
@with_options("allow_pickle", "trust_remote_code", "although_changed")
def evaluate(
    options: Options,
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
        str | None, typer.Option("--url", help="measure a served model: its server's address, up to /v1")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="the name it is served under")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="writes eval/ there; default: the run, or artifacts/<name>-eval")
    ] = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="measure speculative-decoding acceptance instead of quality")
    ] = False,
    sets: SetOpt = [],  # noqa: B006
    as_json: JsonOpt = False,
) -> None:
    """Measure against the original; --set evaluation.windows=32 or gates.max_kl=0.1 change what and how."""
    if (subject is None) == (url is None):
        raise BadInput("eval: give a folder to measure, or --url and --model of a served one")
    if (url is None) != (model is None):
        raise BadInput("eval: --url and --model go together")
    if draft and subject is None:
        raise BadInput("eval: --draft is measured on a folder; a server shows too little of its distributions")
    chosen = None if recipe is None else recipes.load(recipe, sets)
    quiet_libraries()
    from quantpress.eval.release.subjects import output_folder, own_recipe

    from .. import api

    what = subject or api.Endpoint(url or "", model or "", options.api_key)
    if chosen is None:
        chosen = own_recipe(subject, sets)
    into = out or output_folder(what)
    with followed() as callbacks:
        if draft and subject is not None:
            found = api.draft(subject, original, chosen, into, options, callbacks)
        else:
            results = api.evaluate(what, original, chosen, into, options, callbacks)
    if draft:
        _print_draft(found, into, as_json)
        return
    step_summary(model or (subject.resolve().name if subject else ""), results)
    if as_json:
        print_json(results.document())
    else:
        print_results(results)
        say(f"results: {into / 'eval' / 'results.json'}")
    if results.gates.missed:
        raise typer.Exit(results.gates.exit_code)


def step_summary(name: str, results: "Results") -> None:
    """Append the verdict to the summary of the GitHub step that runs this, if one does."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        from quantpress.eval.report.junit import step_summary as summary

        with open(path, "a", encoding="utf-8") as file:
            file.write(summary(results.subject.name if results.subject else name, results))


def _print_draft(found: "Draft", out: Path, as_json: bool) -> None:
    if as_json:
        print_json(found.model_dump(mode="json", by_alias=True))
        return
    for name, accepted in (("sampled", found.sampled), ("greedy", found.greedy)):
        passes = ", ".join(f"{tokens:.2f} with {n}" for n, tokens in accepted.tokens_a_pass.items())
        show(
            f"{name:<11} {accepted.rate:.1%} ± {accepted.stderr:.1%} of drafted tokens accepted; tokens per pass of "
            f"the original: {passes} drafted"
        )
    show(f"draft       {out / 'eval' / 'draft.json'}")


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="a run folder that has been evaluated")], as_json: JsonOpt = False
) -> None:
    """Write the report of a run again."""
    from .. import api

    show_path("report", api.report(run_folder), as_json)


@app.command("log")
def log_runs(
    runs: Annotated[list[Path], typer.Argument(help="run folders that have been evaluated, or a sweep's folder")],
    to: Annotated[str, typer.Option("--to", help="mlflow or wandb, where and as whom by the tracker's own settings")],
    project: Annotated[
        str, typer.Option("--project", help="the project, which MLflow calls experiment")
    ] = "quantpress",
    as_json: JsonOpt = False,
) -> None:
    """Log runs to an experiment tracker, one line each: recipe, figures, verdict; again brings the line up to date."""
    from quantpress.eval.release.tracking import log_runs as log

    found = log(runs, to, project)
    if as_json:
        print_json([vars(line) for line in found])
    for line in () if as_json else found:
        show(f"logged to {to}, {project}: {line.name}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders of one model, evaluated on the same text")],
    out: Annotated[Path, typer.Option("--out", help="folder for the page")] = Path("artifacts/comparison"),
    as_json: JsonOpt = False,
) -> None:
    """Show several runs on one page and one chart."""
    from .. import api

    show_path("report", api.compare(runs, out), as_json)
