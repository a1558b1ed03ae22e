"""The command that makes a run again from its manifest."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..core.files import alone_in
from .app import app
from .options import (
    JsonOpt,
    LimitsOpt,
    ModelOpt,
    OverwriteOpt,
    PickleOpt,
    TrustOpt,
    default_out,
    open_source,
    out_console,
)
from .work import quantizing


@app.command()
def reproduce(
    manifest: Annotated[Path, typer.Argument(help="a manifest.json, or the run folder that holds one")],
    model: ModelOpt = None,
    out: Annotated[Path | None, typer.Option("--out", help="run folder; default beside the default one")] = None,
    overwrite: OverwriteOpt = False,
    ignore_limits: LimitsOpt = False,
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact again and prove the hashes equal, or show the first difference and its likely cause."""
    from quantpress.eval.release.reproduce import open_original
    from quantpress.eval.release.reproduce import reproduce as make_again

    from ..engine.pipeline import prepare

    original = open_original(manifest)
    recipe = original.recipe.model_copy(update={"model": model or original.model})
    where = out or default_out(recipe).with_name(f"{recipe.name}-reproduced")
    job = prepare(recipe, open_source(recipe, allow_pickle, trust_remote_code))
    with alone_in(where), quantizing(job, where, overwrite, ignore_limits, trust_remote_code) as settings:
        result = make_again(original, job, settings)
    if as_json:
        print(json.dumps({"reproduced": result.first is None, **vars(result), "out": str(where)}))  # noqa: T201
    elif result.first is None:
        out_console.print(f"reproduced: all {result.files} files in {where / 'quantized'} have the manifest's hashes")
    else:
        out_console.print(f"not reproduced; the first difference is {result.first}", markup=False)
        for line in result.causes or ("everything that is on record is as it was",):
            out_console.print(f"likely cause: {line}", markup=False)
    if result.first is not None:
        raise typer.Exit(1)
