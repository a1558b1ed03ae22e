"""The commands that hand an artifact to a server: export, and verify, which looks whether it would load."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..artifact.manifest import own_manifest
from ..core.errors import BadInput
from ..core.files import alone_in
from ..recipe import Target
from ..recipe.loading import apply_override, parse_target
from .app import app
from .options import JsonOpt, OverwriteOpt, SetOpt, err_console, out_console, quiet_libraries

_SHOWN = 8  # of what is wrong: a config that was edited is wrong about every layer


def chosen_targets(names: list[str], sets: list[str], run: Path) -> tuple[Target, ...]:
    """The targets named on the command line, or the recipe's own; `--set vllm.tensor_parallel=2` sets their keys."""
    wanted = [part for name in names for part in name.split(",") if part]
    documents: dict[str, Any] = {name: {"name": name} for name in wanted}
    if not wanted:
        manifest = own_manifest(run)
        documents = {
            target["name"]: target for target in ({} if manifest is None else manifest.recipe).get("targets", ())
        }
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
    from quantpress.exports.package import check
    from quantpress.exports.package import export as export_one

    targets = chosen_targets(target, sets, run_folder)
    if out is not None and len(targets) > 1:
        raise BadInput(f"--out is the folder of one target, and these are {len(targets)}; leave it out")
    with alone_in(run_folder) if out is None else nullcontext():
        for chosen in targets:  # all of them before the first is written
            check(run_folder, chosen)
        done = {t.name: export_one(run_folder, t, out, host=host, overwrite=overwrite) for t in targets}
    if as_json:
        facts = {n: {"folder": str(e.folder), "format": e.format, "converted_from": e.converted_from}
                 for n, e in done.items()}  # fmt: skip
        print(json.dumps(facts))  # noqa: T201
        return
    for name, made in done.items():
        how = f"converted from {made.converted_from}" if made.converted_from else "as it is"
        out_console.print(f"{name}: {made.folder} ({made.format}, {how})", markup=False)


@app.command()
def verify(
    where: Annotated[Path, typer.Argument(help="a run folder, an artifact folder or an exported one")],
    target: Annotated[list[str], typer.Option("--target", help="also: would vllm, tgi, … load it?")] = [],  # noqa: B006
    sets: SetOpt = [],  # noqa: B006
    server_python: Annotated[str | None, typer.Option(help="the interpreter that has the server")] = None,
    way: Annotated[str | None, typer.Option(help="server, parser or contract; default: the strongest there is")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Is it whole? Checksums, then every tensor against config and model. Exit code 1 when something is wrong."""
    quiet_libraries()
    from quantpress.exports.load_check import LoadAnswer, will_load
    from quantpress.exports.verify import compared
    from quantpress.exports.verify import verify as verify_folder

    if way not in (None, "server", "parser", "contract"):
        raise BadInput(f"--way {way!r}: server, parser or contract")
    idle = [name for name, given in (("--set", sets), ("--way", way), ("--server-python", server_python)) if given]
    if idle and not target:
        raise BadInput(f"{', '.join(idle)}: of a target, and none is given; add --target, such as --target vllm")
    targets = chosen_targets(target, sets, where) if target else ()
    files, found = verify_folder(where)

    def say(line: str) -> None:
        err_console.print(line, markup=False, soft_wrap=True)

    folder = where / "model" if (where / "SHA256SUMS").is_file() else where
    answers: dict[str, LoadAnswer] = {}
    for chosen in () if found else targets:  # what is damaged is not asked about
        answers[chosen.name] = will_load(folder, chosen, python=server_python, way=way, tell=say)  # type: ignore[arg-type]
    if as_json:
        loads = {name: asdict(answer) for name, answer in answers.items()}
        print(json.dumps({"files": files, "problems": found, "loads": loads}))  # noqa: T201
    else:
        _print_verified(files, found, compared(where), answers)
    if found or not all(answer.loads for answer in answers.values()):
        raise typer.Exit(1)


def _print_verified(files: int, found: list[str], fits: str, answers: dict[str, Any]) -> None:
    for line in found[:_SHOWN]:
        err_console.print(f"wrong: {line}", markup=False, soft_wrap=True)
    if found[_SHOWN:]:
        err_console.print(f"wrong: and {len(found) - _SHOWN} more, which --json lists", markup=False)
    if not found:
        sums = f"{files} files are as listed" if files else "no checksums to compare with"
        out_console.print(f"verified: {sums}; {fits}", markup=False)
    for name, answer in answers.items():
        said = "loads" if answer.loads else "does not load"
        out_console.print(f"{name}: {said}, by {answer.by}", markup=False)
        if answer.reason:
            out_console.print(f"  {answer.reason}", markup=False)
        for line in answer.passed_over:
            out_console.print(f"  (passed over: {line})", markup=False)
