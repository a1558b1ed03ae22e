"""The commands about whole runs: run, sweep, recommend, reproduce, card and publish."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantpress.eval.release.callbacks import Options

from ..core.text import size
from .app import app
from .measuring import step_summary
from .options import (
    DEFAULT_RECIPE,
    AllowOpt,
    JsonOpt,
    ModelOpt,
    OutOpt,
    RecipeArg,
    SetOpt,
    SignOpt,
    chosen_recipe,
    complete_recipe,
    quiet_libraries,
    signer,
    with_options,
)
from .printing import followed, print_json, print_results, print_serving, say, show, show_path, show_table
from .ranks import GpusOpt, joined

if TYPE_CHECKING:
    from quantpress.eval.release.recommend import Candidate, Recommendation
    from quantpress.eval.release.run import Release
    from quantpress.eval.release.sweep import RunOutcome, SweepRun

RunArg = Annotated[Path, typer.Argument(help="a run folder that has been evaluated")]
BaseOpt = Annotated[
    str | None, typer.Option("--base-model", help="the original's hub id, where it was quantized from a folder")
]
OverwriteCardOpt = Annotated[bool, typer.Option("--overwrite-card", help="replace a README.md that was edited by hand")]
LicenseOpt = Annotated[str | None, typer.Option("--license", help="where the original's own card names none")]


@app.command()
@with_options("overwrite", "ignore_limits", "allow_pickle", "trust_remote_code", "repeat", "share")
def run(
    options: Options,
    recipe: RecipeArg = DEFAULT_RECIPE,
    model: ModelOpt = None,
    out: OutOpt = None,
    sets: SetOpt = [],  # noqa: B006
    gpus: GpusOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Do the whole recipe: quantize, export, verify, evaluate, smoke test, report, card. Again: only what changed."""
    chosen = chosen_recipe(recipe, model, sets)
    options = joined(options, gpus)
    quiet_libraries()
    from .. import api

    if not options.ranks.leads:
        from quantpress.eval.release.session import take_part

        take_part(chosen, out or api.run_folder(chosen), options)
        return
    with followed(quiet=as_json) as callbacks:
        release = api.run(chosen, out=out, options=options, callbacks=callbacks)
    if as_json:
        results = release.results and release.results.document()
        report = release.report and str(release.report)
        print_json({"out": str(release.out), "report": report, "results": results, "stages": dict(release.stages)})
    else:
        _print_release(release)
    if release.results is not None:
        step_summary(chosen.name, release.results)
    if release.serving is not None and release.serving.verdict == "FAILED":
        raise typer.Exit(1)
    if release.results is not None and release.results.gates.missed:
        raise typer.Exit(release.results.gates.exit_code)


def _print_release(release: "Release") -> None:
    if release.results is not None:
        from quantpress.eval.report.measured_run import open_run
        from quantpress.eval.report.verdict import verdict

        told = verdict(open_run(release.out))
        show(f"{told.word}: {told.reason}")
        for line in told.todo:
            show(f"  {line}")
    if release.serving is not None:
        print_serving(release.serving, str(release.out / "eval" / "serving.json"))
    if release.results is not None:
        print_results(release.results)
    show(f"artifact    {release.artifact}")
    for folder in release.exports:
        show(f"export      {folder}")
    if release.report is not None:
        show(f"report      {release.report}")
    if release.card is not None:
        show(f"model card  {release.card}")
    show(f"provenance  {release.out / 'manifest.json'}")


@app.command()
@with_options("ignore_limits", "allow_pickle", "trust_remote_code", "repeat")
def sweep(
    options: Options,
    recipe: Annotated[
        list[str],
        typer.Argument(
            help="recipe files, or names of shipped ones; all are run on the same model", autocompletion=complete_recipe
        ),
    ],
    model: ModelOpt = None,
    out: Annotated[Path, typer.Option("--out", help="holds a run folder for each recipe, and report/")] = Path(
        "artifacts/sweep"
    ),
    sets: SetOpt = [],  # noqa: B006
    ray: Annotated[
        str | None, typer.Option("--ray", help="spread the runs over the Ray cluster at this address; local: one here")
    ] = None,
    cpus: Annotated[int, typer.Option("--cpus", min=1, help="cores that a run takes on the cluster")] = 1,
    gpus: Annotated[float, typer.Option("--gpus", min=0, help="GPUs that a run takes on the cluster")] = 0,
    as_json: JsonOpt = False,
) -> None:
    """Run many recipes on one model, go on after one that fails, and write one report; the same command resumes."""
    chosen = [chosen_recipe(where, model, sets) for where in recipe]
    quiet_libraries()
    from quantpress.eval.release.sweep import in_turn, over_ray

    from .. import api

    runner = in_turn(_print_start) if ray is None else over_ray(ray, cpus, gpus)
    done = api.sweep(chosen, None, out, options, runner, _print_outcome)
    if as_json:
        runs = [vars(one) for one in done.outcomes]
        print_json({"out": str(out), "report": done.report and str(done.report), "runs": runs})
    elif done.report is not None:
        show(f"report: {done.report}")
    statuses = {one.status for one in done.outcomes}
    for status, code in (("failed", 1), ("gate", 3), ("unclear", 4)):
        if status in statuses:
            raise typer.Exit(code)


def _print_start(task: "SweepRun") -> None:
    say(f"{task.name}: started; log: {task.log}")


def _print_outcome(outcome: "RunOutcome") -> None:
    said = {"done": "done", "gate": "done, and a gate was missed", "unclear": "done, and a gate is too close to call",
            "failed": "FAILED"}[outcome.status]  # fmt: skip
    said += " (finished before, not run again)" if outcome.reused else ""
    reason = f": {outcome.reason}" if outcome.reason else ""
    say(f"{outcome.name}: {said}{reason}")


@app.command()
def recommend(
    runs: Annotated[list[Path], typer.Argument(help="run folders, or a sweep's folder")],
    fits: Annotated[str, typer.Option("--fits", help="the memory to fit, such as 24GiB")],
    context: Annotated[int, typer.Option("--context", min=1, help="tokens per sequence")] = 8192,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="sequences at a time")] = 1,
    min_recovery: Annotated[
        str | None, typer.Option("--min-recovery", help="of the original's quality, such as 98%")
    ] = None,
    prefer: Annotated[
        str, typer.Option("--prefer", help="among those that qualify: quality, smallest, fastest")
    ] = "quality",
    margin: Annotated[
        str | None, typer.Option("--margin", help="memory kept free; default: a tenth and 1 GiB, as servers do")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Pick one of the measured runs for a memory, context and concurrency, and say why; exit code 1 if none fits."""
    from quantpress.eval.release.recommend import Wish

    from .. import api

    wish = Wish.parse(memory=fits, context=context, concurrency=concurrency, min_recovery=min_recovery,
                      prefer=prefer, margin=margin)  # fmt: skip
    found = api.recommend(runs, wish)
    if as_json:
        best = found.choice
        document = {"choice": best and best.run.label, "folder": best and str(best.run.folder)}
        needs = {"memory_bytes": int(wish.memory), "margin_bytes": wish.kept}
        reasons = {"why": found.why, "not_taken": dict(found.others)}
        print_json(document | needs | {"runs": [_candidate(one) for one in found.candidates]} | reasons)
    else:
        _print_recommendation(found)
    if found.choice is None:
        raise typer.Exit(1)


def _candidate(one: "Candidate") -> dict[str, Any]:
    recovery = {"value": one.recovery.value, "interval": one.recovery.interval, "basis": one.recovery.basis}
    sizes = {"weights_bytes": one.run.size, "cache_bytes": one.cache_bytes, "needed_bytes": one.needs}
    where = {"label": one.run.label, "folder": str(one.run.folder)}
    return where | sizes | {"recovery": recovery, "qualifies": not one.misses, "misses": one.misses}


def _print_recommendation(found: "Recommendation") -> None:
    if found.choice is None:
        show("none of these runs qualifies")
    else:
        show(f"take {found.choice.run.label}  {found.choice.run.folder}")
    for line in found.why:
        show(f"  {line}")
    if found.others:
        show_table(("not taken", "because"), found.others)


@app.command()
@with_options("overwrite", "ignore_limits", "allow_pickle", "trust_remote_code")
def reproduce(
    options: Options,
    manifest: Annotated[Path, typer.Argument(help="a manifest.json, or the run folder that holds one")],
    model: ModelOpt = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="run folder; default: artifacts/<model>/<recipe>-reproduced")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact again and prove the hashes equal, or show the first difference and its likely cause."""
    quiet_libraries()
    from .. import api

    with followed() as callbacks:
        result = api.reproduce(manifest, model, out, options, callbacks)
    if as_json:
        print_json({"reproduced": result.first is None, **vars(result), "out": str(result.out)})
    elif result.first is None:
        show(f"reproduced: all {result.files} files in {result.out / 'quantized'} have the manifest's hashes")
    else:
        show(f"not reproduced; the first difference is {result.first}")
        for line in result.causes or ("everything on record is as it was",):
            show(f"likely cause: {line}")
    if result.first is not None:
        raise typer.Exit(1)


@app.command()
def card(
    run: RunArg,
    base_model: BaseOpt = None,
    license: LicenseOpt = None,
    overwrite_card: OverwriteCardOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Write the artifact's README.md, the hub's model card, with what was measured."""
    from .. import api

    show_path("card", api.card(run, base_model, license, overwrite=overwrite_card), as_json)


@app.command()
def publish(
    run: RunArg,
    to: Annotated[str, typer.Option("--to", help="the repository: org/name")],
    yes: Annotated[bool, typer.Option("--yes", help="upload; without it, only show what would be uploaded")] = False,
    public: Annotated[bool, typer.Option("--public", help="a new repository is private unless this is given")] = False,
    message: Annotated[str | None, typer.Option("--message", help="of the commit")] = None,
    base_model: BaseOpt = None,
    license: LicenseOpt = None,
    although_missed: Annotated[
        bool, typer.Option("--although-missed", help="publish a run that missed its gates or is broken")
    ] = False,
    overwrite_card: OverwriteCardOpt = False,
    allow: AllowOpt = [],  # noqa: B006
    sign: SignOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Upload the artifact to the Hugging Face hub: shows exactly what would be uploaded, and does it with --yes."""
    quiet_libraries()
    from quantpress.eval.release.publish import prepare_upload, upload

    what = prepare_upload(run, to, private=not public, message=message, base_model=base_model, license=license,
                          although_missed=although_missed, overwrite_card=overwrite_card, allow=allow,
                          signer=signer(sign))  # fmt: skip
    if not as_json:
        show_table(("file", "bytes"), [(name, f"{count:,}") for name, count in what.files], right=1)
        kind = "public" if public else "private"
        show(f"{len(what.files)} files, {size(what.bytes)}, to {to} ({kind} if it is new)")
        show(f"commit message: {what.message}")
    for name in what.redacted:
        say(f"note: {name} is uploaded without the paths of this machine that it names")
    if what.card is not None:
        say("note: README.md was edited by hand and is uploaded as it is; --overwrite-card writes it anew:")
        say(what.card)
    url = upload(what) if yes else None
    if as_json:
        files = [{"name": name, "bytes": count} for name, count in what.files]
        more = {
            "bytes": what.bytes,
            "redacted": list(what.redacted),
            "edited_card": what.card is not None,
            "commit": url,
        }
        said = {"folder": str(what.folder), "repo": what.repo, "private": what.private, "message": what.message}
        print_json(said | {"files": files} | more)
    else:
        show(f"published: {url}" if url else "nothing was uploaded: --yes does it")
