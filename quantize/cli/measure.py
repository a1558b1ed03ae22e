"""The commands that look at what was made: eval, report, compare, verify."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..recipe import file as recipes
from .app import app
from .shared import JsonOpt, PickleOpt, SetOpt, TrustOpt, out_console, read_manifest
from .work import evaluation_windows, exit_on_gates, measure, print_results


@app.command("eval")
def evaluate_command(
    run_folder: Annotated[Path, typer.Argument(help="a run folder")],
    sets: SetOpt = [],  # noqa: B006
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure a finished run again; --set evaluation.windows=32 changes how."""
    manifest = read_manifest(run_folder)
    document = manifest["recipe"]
    for override in sets:
        recipes.apply_override(document, override)
    chosen = recipes.parse(document, str(run_folder / "manifest.json"))
    text = evaluation_windows(chosen, allow_pickle, trust_remote_code)
    results = measure(run_folder, chosen, text, allow_pickle, trust_remote_code)
    if as_json:
        print(json.dumps(results.document()))  # noqa: T201
    else:
        print_results(results)
    exit_on_gates(results)


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="a run folder that has been evaluated")]) -> None:
    """Draw the page of a run again."""
    from quantpress.eval.report import write_report

    out_console.print(f"report: {write_report(run_folder)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders of one model, evaluated on the same text")],
    out: Annotated[Path, typer.Option("--out", help="folder for the page")] = Path("artifacts/comparison"),
) -> None:
    """Several runs on one page and one chart."""
    from quantpress.eval.report import write_comparison

    out_console.print(f"report: {write_comparison(runs, out)}")


@app.command()
def verify(run_folder: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Check that the artifact's files are the ones the manifest names."""
    from ..artifact import verify as verify_run

    out_console.print(f"verified: {verify_run(run_folder)} files are as the manifest says")
