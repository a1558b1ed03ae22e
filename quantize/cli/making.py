"""The commands around an artifact: quantize, plan, convert; and those about recipes."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..core.files import alone_in
from ..recipe import Recipe
from ..recipe import loading as recipes
from .app import app
from .options import (
    JsonOpt,
    LimitsOpt,
    ModelOpt,
    OutOpt,
    OverwriteOpt,
    PickleOpt,
    RecipeArg,
    SetOpt,
    TrustOpt,
    chosen_recipe,
    default_out,
    open_source,
    out_console,
)
from .work import quantize_model


@app.command()
def quantize(
    recipe: RecipeArg = "w4a16-gptq",
    model: ModelOpt = None,
    out: OutOpt = None,
    sets: SetOpt = [],  # noqa: B006
    overwrite: OverwriteOpt = False,
    ignore_limits: LimitsOpt = False,
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Only the artifact: no evaluation, no report."""
    chosen = chosen_recipe(recipe, model, sets)
    where = out or default_out(chosen)
    with alone_in(where):
        quantize_model(chosen, where, overwrite, ignore_limits, allow_pickle, trust_remote_code)
    out_console.print(f"artifact: {where / 'quantized'}")


@app.command()
def plan(
    recipe: RecipeArg = "w4a16-gptq",
    model: ModelOpt = None,
    sets: SetOpt = [],  # noqa: B006
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """What a run would need and make: schemes, bytes, memory, disk, time; and which servers would take it."""
    from quantpress.exports.contracts import advice, check_job

    from ..engine.pipeline import prepare
    from ..engine.plan import size

    chosen = chosen_recipe(recipe, model, sets)
    job = prepare(chosen, open_source(chosen, allow_pickle, trust_remote_code))
    targets = check_job(job)
    lints = advice(job)
    if as_json:
        print(json.dumps(job.plan.as_dict() | {"targets": targets, "servability": lints}))  # noqa: T201
        return
    table = Table("linears", "number", "scheme", box=None, pad_edge=False)
    kinds: dict[tuple[str, str], int] = {}
    for linear in job.linears:
        key = (linear.module, job.plan.layers[linear.name])
        kinds[key] = kinds.get(key, 0) + 1
    for (module, scheme), number in kinds.items():
        table.add_row(module, str(number), scheme)
    out_console.print(table)
    p = job.plan
    out_console.print(
        f"artifact {size(p.artifact_bytes)} (original {size(p.original_bytes)}), memory up to {size(p.memory_bytes)}, "
        f"disk up to {size(p.disk_bytes)}, about {max(1, round(p.seconds / 60))} min on this machine"
    )
    for name, format in targets.items():
        out_console.print(f"target {name}: will load the {format} files", markup=False)
    for line in (*p.notes, *lints):
        out_console.print(f"note: {line}", markup=False)


@app.command()
def convert(
    artifact: Annotated[Path, typer.Argument(help="a run folder, or an artifact folder")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    to: Annotated[str, typer.Option("--to", help="compressed-tensors, gptq, awq or modelopt")],
) -> None:
    """The same codes in another format, without loss; refused where that cannot be."""
    from ..artifact.convert import convert as convert_folder

    inside = artifact / "quantized"
    convert_folder(inside if inside.is_dir() else artifact, out, to)
    out_console.print(f"artifact: {out}")


@app.command()
def schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    print(json.dumps(Recipe.model_json_schema(), indent=2))  # noqa: T201


@app.command("recipes")
def list_recipes() -> None:
    """The recipes that ship with quantpress."""
    table = Table("recipe", "what for", box=None, pad_edge=False)
    for name in recipes.shipped():
        table.add_row(name, recipes.load(name).description)
    out_console.print(table)
