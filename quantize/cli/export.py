"""The commands that hand an artifact to a server: export."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BadInput
from ..recipe import Target
from ..recipe.file import apply_override, parse_target
from .app import app
from .shared import JsonOpt, OverwriteOpt, SetOpt, out_console


def chosen_targets(names: list[str], sets: list[str], run: Path) -> tuple[Target, ...]:
    """The targets named on the command line, or the recipe's own; `--set vllm.tensor_parallel=2` sets their keys."""
    wanted = [part for name in names for part in name.split(",") if part]
    documents: dict[str, Any] = {name: {"name": name} for name in wanted}
    if not wanted:
        manifest = run / "manifest.json"
        if manifest.is_file():
            recipe = json.loads(manifest.read_text(encoding="utf-8"))["recipe"]
            documents = {target["name"]: target for target in recipe.get("targets", ())}
        if not documents:
            raise BadInput(f"{run}: the recipe names no targets; give --target, such as --target vllm")
    for override in sets:
        name = next((n for n in documents if override.startswith(f"{n}.")), None)
        if name is None:
            raise BadInput(f"--set {override!r}: write target.key=value, with one of {', '.join(documents)}")
        apply_override(documents[name], override.removeprefix(f"{name}."))
    return tuple(parse_target(document, "--target") for document in documents.values())


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="a run folder, or an artifact folder")],
    target: Annotated[list[str], typer.Option("--target", help="vllm, tgi, …; default: the recipe's targets")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option("--out", help="where; default RUN/export/<target>")] = None,
    host: Annotated[str, typer.Option("--host", help="the address to listen on")] = "127.0.0.1",
    sets: SetOpt = [],  # noqa: B006
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Folders that servers start from: the model in a format they load, launch files, checksums."""
    from quantpress.export.package import export as export_one

    targets = chosen_targets(target, sets, run_folder)
    if out is not None and len(targets) > 1:
        raise BadInput(f"--out is the folder of one target, and these are {len(targets)}; leave it out")
    done = {t.name: export_one(run_folder, t, out, host=host, overwrite=overwrite) for t in targets}
    if as_json:
        facts = {n: {"folder": str(e.folder), "format": e.format, "converted_from": e.converted_from}
                 for n, e in done.items()}  # fmt: skip
        print(json.dumps(facts))  # noqa: T201
        return
    for name, made in done.items():
        how = f"converted from {made.converted_from}" if made.converted_from else "as it is"
        out_console.print(f"{name}: {made.folder} ({made.format}, {how})", markup=False)
