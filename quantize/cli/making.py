"""The commands around an artifact: plan, quantize, convert and gguf; and those about recipes."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from quantpress.eval.release.callbacks import Options

from ..core.errors import BadInput
from ..core.text import meant, size
from ..recipe import Recipe
from ..recipe import loading as recipes
from ..recipe.gguf_file import FileType
from .app import app
from .options import (
    DEFAULT_RECIPE,
    JsonOpt,
    ModelOpt,
    OutOpt,
    RecipeArg,
    SetOpt,
    chosen_recipe,
    complete_recipe,
    quiet_libraries,
    with_options,
)
from .printing import followed, print_json, say, show, show_path, show_table
from .ranks import GpusOpt, joined, planned

if TYPE_CHECKING:
    from ..engine.plan import Plan


@app.command()
@with_options("overwrite", "ignore_limits", "allow_pickle", "trust_remote_code")
def quantize(
    options: Options,
    recipe: RecipeArg = DEFAULT_RECIPE,
    model: ModelOpt = None,
    out: OutOpt = None,
    sets: SetOpt = [],  # noqa: B006
    gpus: GpusOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Make the artifact only: no evaluation, no report."""
    chosen = chosen_recipe(recipe, model, sets)
    options = joined(options, gpus)
    quiet_libraries()
    from .. import api

    if not options.ranks.leads:
        from quantpress.eval.release.session import take_part

        take_part(chosen, out or api.run_folder(chosen), options)
        return
    with followed() as callbacks:
        artifact = api.quantize(chosen, out=out, options=options, callbacks=callbacks)
    show_path("artifact", artifact, as_json)


@app.command()
@with_options("allow_pickle", "trust_remote_code")
def plan(
    options: Options,
    recipe: RecipeArg = DEFAULT_RECIPE,
    model: ModelOpt = None,
    sets: SetOpt = [],  # noqa: B006
    config_only: Annotated[
        bool, typer.Option("--config-only", help="the model is a config.json; no weights or tokenizer are needed")
    ] = False,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="for a run on so many GPUs of this machine")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show what a run would need and make: schemes, bytes, memory, disk, time; and which servers would load it."""
    chosen = chosen_recipe(recipe, model, sets)
    options = planned(options, gpus)
    quiet_libraries()
    from .. import api

    found = api.plan(chosen, options=options, config_only=config_only)
    lacking = _lacking(found.plan)
    if as_json:
        asked = {"targets": found.targets, "servability": found.servability}
        print_json(found.plan.as_dict() | asked | {"fits": lacking is None, "lacking": lacking})
        return
    show_table(
        ("linears", "number", "scheme"), [(module, str(number), scheme) for module, number, scheme in found.linears]
    )
    p = found.plan
    show(
        f"artifact {size(p.artifact_bytes)} (original {size(p.original_bytes)}), memory up to {size(p.memory_bytes)}, "
        f"disk up to {size(p.disk_bytes)}"
    )
    show(found.time + ("" if chosen.evaluation is None else "; the evaluation comes on top"))
    if p.quantized_share is not None:
        show(f"{p.quantized_share:.1%} of the weights of the decoder blocks are quantized")
    for name, format in found.targets.items():
        show(f"target {name}: will load the {format} files")
    for line in (*p.notes, *found.servability, *filter(None, [lacking])):
        show(f"note: {line}")


def _lacking(plan: "Plan") -> str | None:
    """What this machine has too little of for the run, in the words of the refusal; None where it fits."""
    try:
        plan.check(Path(), ignore=False)
    except BadInput as error:
        return str(error)
    return None


@app.command()
def convert(
    artifact: Annotated[Path, typer.Argument(help="a run folder, or an artifact folder")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    to: Annotated[str, typer.Option("--to", help="compressed-tensors, gptq, awq or modelopt")],
    as_json: JsonOpt = False,
) -> None:
    """Write the same codes in another format, without loss; refused where the format cannot hold them."""
    from .. import api

    show_path("artifact", api.convert(artifact, out, to), as_json)


@app.command()
@with_options("allow_pickle")
def gguf(
    options: Options,
    source: Annotated[str, typer.Argument(help="a checkpoint or artifact folder, hub id, smollm2-135m or .gguf file")],
    out: Annotated[Path, typer.Argument(help="the .gguf file to write")],
    kind: Annotated[
        str, typer.Option("--type", help="F32, F16 or BF16; of a .gguf file of floats also Q4_K_M …")
    ] = "F16",
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="importance matrix for --type Q4_K_M …")] = None,
    split: Annotated[int | None, typer.Option("--split", help="most bytes of tensors in one file")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Write a GGUF file of floats; an artifact is dequantized. To quantize, run a recipe such as gguf-q4_k_m.

    A .gguf file of floats, whose architecture nobody needs to know, is rounded to nearest in any type.
    """
    if kind not in get_args(FileType):
        known = get_args(FileType)
        raise BadInput(f"--type {kind}{meant(kind, known)} (known: {', '.join(known)})")
    if out.suffix != ".gguf":
        raise BadInput(f"{out}: give a name that ends in .gguf")
    quiet_libraries()
    from .. import api

    with followed() as callbacks:
        files = api.write_gguf(source, out, cast(FileType, kind), split, options, callbacks, imatrix)
    if as_json:
        print_json({"files": [str(file) for file in files]})
    for file in files if not as_json else ():
        show(f"written: {file}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    print(json.dumps(Recipe.model_json_schema(), indent=2))  # noqa: T201


@app.command("recipes")
def list_recipes(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="shipped recipes, or with --check files; default: all shipped", autocompletion=complete_recipe
        ),
    ] = None,
    whole: Annotated[bool, typer.Option("--show", help="print them, with their comments")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="write them into this folder, to start one of your own")] = False,
    check: Annotated[bool, typer.Option("--check", help="only say whether they are valid; exit code 2 if not")] = False,
    as_json: JsonOpt = False,
) -> None:
    """List the recipes that ship with quantpress, by what they are for; show, copy or check some."""
    if whole + copy + check > 1 or ((whole or copy) and not names):
        raise BadInput("recipes: give one of --show, --copy and --check; of the first two also the names of recipes")
    if check:
        _check(names or recipes.shipped())
        return
    chosen = {name: recipes.text_of(name) for name in names or recipes.shipped()}
    if whole:
        show("\n".join(chosen.values()).rstrip())
    elif copy:
        for name, text in chosen.items():
            show(f"written: {_copied(Path(f'{name}.yaml'), text)}")
    elif as_json:
        print_json([{"name": name, "group": group, "description": recipes.load(name).description}
                    for group, inside in recipes.groups().items() for name in inside if name in chosen])  # fmt: skip
    else:
        _list(chosen)


def _check(files: list[str]) -> None:
    """Raise BadInput for the recipes that do not load, a line each."""
    wrong = []
    for file in files:
        try:
            recipes.load(file)
        except BadInput as error:
            wrong.append(str(error))
    for line in wrong[:-1]:
        say(f"quantpress: {line}")
    if wrong:
        raise BadInput(wrong[-1])
    show(f"{len(files)} {'recipe is' if len(files) == 1 else 'recipes are'} valid")


def _copied(file: Path, text: str) -> Path:
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise BadInput(f"{file} exists here; move it away, or copy into another folder") from None
    return file


def _list(chosen: Collection[str]) -> None:
    shown = {group: [name for name in names if name in chosen] for group, names in recipes.groups().items()}
    rows = [
        row
        for group, names in shown.items()
        if names
        for row in ((group, ""), *((f"  {name}", recipes.load(name).description) for name in names))
    ]
    show_table(("recipe", "what for"), rows, bold=shown)
