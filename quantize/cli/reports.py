"""The commands that look at what was made: report, compare."""

from pathlib import Path
from typing import Annotated

import typer

from ..core.files import alone_in
from .app import app
from .options import out_console


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="a run folder that has been evaluated")]) -> None:
    """Draw the page of a run again."""
    from quantpress.eval.report.page import write_report

    with alone_in(run_folder):
        out_console.print(f"report: {write_report(run_folder)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders of one model, evaluated on the same text")],
    out: Annotated[Path, typer.Option("--out", help="folder for the page")] = Path("artifacts/comparison"),
) -> None:
    """Several runs on one page and one chart."""
    from quantpress.eval.report.page import write_comparison

    out_console.print(f"report: {write_comparison(runs, out)}")
