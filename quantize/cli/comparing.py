"""The commands about many runs: sweep, which makes them, and recommend, which picks one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..core.errors import BadInput
from ..core.files import alone_in
from .app import app
from .options import (
    JsonOpt,
    LimitsOpt,
    ModelOpt,
    PickleOpt,
    SetOpt,
    TrustOpt,
    chosen_recipe,
    open_source,
    out_console,
    say,
)

if TYPE_CHECKING:
    from quantpress.eval.release.sweep import Outcome, Task

_RECIPES = "recipe files, or names of shipped ones; all are run on the same model"


@app.command()
def sweep(
    recipe: Annotated[list[str], typer.Argument(help=_RECIPES)],
    model: ModelOpt = None,
    out: Annotated[Path, typer.Option("--out", help="one run folder a recipe goes there, and report/")] = Path(
        "artifacts/sweep"
    ),
    sets: SetOpt = [],  # noqa: B006
    ray: Annotated[
        str | None, typer.Option("--ray", help="spread the runs over the Ray cluster at this address; local: one here")
    ] = None,
    cpus: Annotated[int, typer.Option("--cpus", min=1, help="cores a run takes on the cluster")] = 1,
    gpus: Annotated[float, typer.Option("--gpus", min=0, help="GPUs a run takes on the cluster")] = 0,
    ignore_limits: LimitsOpt = False,
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Many recipes on one model: run each, go on after one that fails, one report; the same command resumes."""
    from quantpress.eval.release.sweep import in_turn, over_ray, plan
    from quantpress.eval.release.sweep import sweep as run_all
    from quantpress.eval.report.page import write_sweep

    chosen = [chosen_recipe(where, model, sets) for where in recipe]
    models = dict.fromkeys(one.model for one in chosen)
    if len(models) > 1:
        raise BadInput(f"a sweep is of one model, and the recipes name {', '.join(models)}; give one with --model")
    source = open_source(chosen[0], allow_pickle, trust_remote_code)
    where = f"{source.id}@{source.revision}" if source.kind == "hub" else _absolute(chosen[0].model)
    flags = {"--ignore-limits": ignore_limits, "--allow-pickle": allow_pickle, "--trust-remote-code": trust_remote_code}
    from ..models.checkpoint import Checkpoint

    identity = json.dumps(Checkpoint(source.path).file_hashes(), sort_keys=True)
    fan = in_turn(_tell_start) if ray is None else over_ray(ray, cpus, gpus)
    with alone_in(out):
        tasks = plan(chosen, where, identity, out, [flag for flag, on in flags.items() if on])
        ended = run_all(tasks, out, fan, _tell)
        page = write_sweep(out, [task.out for task, one in zip(tasks, ended, strict=True) if one.status != "failed"])
    if as_json:
        print(json.dumps({"out": str(out), "report": page and str(page), "runs": [vars(one) for one in ended]}))  # noqa: T201
    elif page is not None:
        out_console.print(f"report: {page}")
    statuses = {one.status for one in ended}
    if statuses & {"failed", "gate"}:
        raise typer.Exit(1 if "failed" in statuses else 3)


def _absolute(model: str) -> str:
    """A folder or file as it is called from anywhere."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


def _tell_start(task: "Task") -> None:
    say(f"{task.name}: started; what it says goes to {task.log}")


def _tell(outcome: "Outcome") -> None:
    said = {"done": "done", "gate": "done, and a gate was missed", "failed": "FAILED"}[outcome.status]
    said += " (as before, not done again)" if outcome.reused else ""
    reason = f": {outcome.reason}" if outcome.reason else ""
    say(f"{outcome.name}: {said}{reason}")


@app.command()
def recommend(
    runs: Annotated[list[Path], typer.Argument(help="run folders, or a sweep's folder")],
    fits: Annotated[str, typer.Option("--fits", help="the memory to fit, such as 24GiB")],
    context: Annotated[int, typer.Option("--context", min=1, help="tokens a sequence")] = 8192,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="sequences at one time")] = 1,
    min_recovery: Annotated[
        str | None, typer.Option("--min-recovery", help="of the original's quality, such as 98%")
    ] = None,
    prefer: Annotated[
        str, typer.Option("--prefer", help="of those that qualify: quality, smallest, fastest")
    ] = "quality",
    margin: Annotated[
        str | None, typer.Option("--margin", help="memory kept free; default: a tenth and 1 GiB, as servers do")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Pick one of the measured runs for a memory, a context and a concurrency, and say why; 1 when none qualifies."""
    from quantpress.eval.release.recommend import Wish
    from quantpress.eval.release.recommend import recommend as pick

    wish = Wish.parse(memory=fits, context=context, concurrency=concurrency, min_recovery=min_recovery,
                      prefer=prefer, margin=margin)  # fmt: skip
    found = pick(runs, wish)
    best = found.choice
    if as_json:
        document: dict[str, Any] = {"choice": best and best.run.label, "folder": best and str(best.run.folder)}
        print(json.dumps(document | {"why": found.why, "others": dict(found.others)}))  # noqa: T201
    else:
        if best is None:
            out_console.print("none of these runs qualifies")
        else:
            out_console.print(f"take {best.run.label}  {best.run.folder}", markup=False)
        for line in found.why:
            out_console.print(f"  {line}", markup=False)
        table = Table("not taken", "because", box=None, pad_edge=False)
        for label, reason in found.others:
            table.add_row(label, reason)
        if found.others:
            out_console.print(table)
    if best is None:
        raise typer.Exit(1)
