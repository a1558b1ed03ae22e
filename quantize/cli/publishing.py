"""The commands that show an artifact to others: card and publish."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..core.files import alone_in
from .app import app
from .options import JsonOpt, err_console, out_console, quiet_libraries

RunArg = Annotated[Path, typer.Argument(help="a run folder that has been evaluated")]
BaseOpt = Annotated[
    str | None, typer.Option("--base-model", help="the original's hub id, where it was quantized from a folder")
]
LicenseOpt = Annotated[str | None, typer.Option("--license", help="where the original's own card names none")]


@app.command()
def card(run: RunArg, base_model: BaseOpt = None, license: LicenseOpt = None) -> None:
    """Write the artifact's README.md as the hub wants it, with what was measured."""
    from quantpress.eval.report.card import write_card

    with alone_in(run):
        out_console.print(f"card: {write_card(run, base_model, license)}")


@app.command()
def publish(
    run: RunArg,
    to: Annotated[str, typer.Option("--to", help="the repository: org/name")],
    yes: Annotated[bool, typer.Option("--yes", help="upload; without it, only show what would go")] = False,
    public: Annotated[bool, typer.Option("--public", help="a new repository is private unless this is given")] = False,
    message: Annotated[str | None, typer.Option("--message", help="of the commit")] = None,
    base_model: BaseOpt = None,
    license: LicenseOpt = None,
    although_missed: Annotated[
        bool, typer.Option("--although-missed", help="publish a run that missed its gates")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Upload the artifact to the Hugging Face hub; shows exactly what would go, and does it with --yes."""
    quiet_libraries()
    from quantpress.eval.release.publish import prepare_upload, upload
    from quantpress.eval.report.wording import size

    what = prepare_upload(run, to, private=not public, message=message, base_model=base_model, license=license,
                          although_missed=although_missed)  # fmt: skip
    if not as_json:
        table = Table("file", "bytes", box=None, pad_edge=False)
        table.columns[1].justify = "right"
        for name, count in what.files:
            table.add_row(name, f"{count:,}")
        out_console.print(table)
        kind = "public" if public else "private"
        out_console.print(f"{len(what.files)} files, {size(what.bytes)}, to {to} ({kind} if it is new)", markup=False)
        out_console.print(f"commit message: {what.message}", markup=False)
    for line in what.warnings:
        err_console.print(f"note: {line}", markup=False, soft_wrap=True)
    url = upload(what) if yes else None
    if as_json:
        document = asdict(what) | {"folder": str(what.folder), "bytes": what.bytes, "commit": url}
        print(json.dumps(document))  # noqa: T201
    else:
        out_console.print(f"published: {url}" if url else "nothing was sent: --yes uploads it", markup=False)
