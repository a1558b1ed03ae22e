"""Many recipes on one model: each is a `quantpress run` of its own, one after another or on a Ray cluster.

Every run is a separate process, so peak memory and CPU seconds are its own, and one that is killed does not affect the
others. What does not depend on the recipe is computed once: the cache holds the model at one commit, the texts, and the
original's evaluation (hidden states, task scores, continuations); a folder that is deleted after the sweep holds the
calibration tokens and the importance matrix.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantpress.core.errors import BadInput
from quantpress.core.files import expanded, file_sha256, write_json
from quantpress.core.notebook import table
from quantpress.engine.sources import default_cache
from quantpress.exports.serving.process import guarded
from quantpress.models.checkpoint import Checkpoint
from quantpress.recipe import Recipe

from ..report.measured_run import SWEEP_STATE, LeftOut
from ..report.page import write_sweep
from .callbacks import Options
from .session import open_source

_SHARED = ".shared"
_COMMAND = (sys.executable, "-m", "quantpress", "run")
_SIGNALLED = 128  # what the guard adds to the number of a signal, as shells do
_ENDED = {0: "done", 3: "gate", 4: "unclear"}  # exit codes of a run that was measured


@dataclass(frozen=True)
class SweepRun:
    """One run: its command, its folder, and a key that identifies it, by which a finished run is recognised."""

    name: str
    command: tuple[str, ...]
    out: Path
    key: str
    cache: Path | None = None  # in place of the default one

    @property
    def log(self) -> Path:
        return self.out.parent / f"{self.name}.log"


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended. status: `done`, `gate` (done, and a gate was missed), `unclear` (done, and one is too close to
    call) or `failed`, with the reason.

    reused: it was finished before and not run again.
    """

    name: str
    status: str
    reason: str = ""
    reused: bool = False


Runner = Callable[[Sequence[SweepRun]], Iterable[RunOutcome]]


@dataclass(frozen=True)
class Sweep:
    """How each run of a sweep ended, and the page that compares those that finished; None when none did."""

    outcomes: tuple[RunOutcome, ...]
    report: Path | None

    def _repr_html_(self) -> str:
        rows = [(o.name, o.status + (" (finished before)" if o.reused else ""), o.reason) for o in self.outcomes]
        return table("Sweep", rows, [] if self.report is None else [f"compared in {self.report}"])


def make_sweep(
    recipes: Sequence[Recipe],
    out: Path,
    options: Options,
    runner: Runner,
    on_outcome: Callable[[RunOutcome], None] = lambda outcome: None,
) -> Sweep:
    """Run every recipe in a folder of its own under `out`, and write `out`/report; what is finished is not run again.

    Raises BadInput, before the first run, for recipes of several models, of one name, or without an evaluation.
    """
    models = dict.fromkeys(recipe.model for recipe in recipes)
    if len(models) > 1:
        raise BadInput(f"a sweep is of one model, and the recipes name {', '.join(models)}; give one with --model")
    source = open_source(recipes[0].model, options)
    model = f"{source.id}@{source.revision}" if source.kind == "hub" else _absolute(recipes[0].model)
    identity = json.dumps(Checkpoint(source.path).file_hashes(), sort_keys=True)
    flags = {
        "--ignore-limits": options.ignore_limits,
        "--allow-pickle": options.allow_pickle,
        "--trust-remote-code": options.trust_remote_code,
    }
    chosen = [flag for flag, on in flags.items() if on]
    chosen += [f"--repeat={options.repeat}"] if options.repeat > 1 else []
    cache = None if options.cache == default_cache() else options.cache
    planned = plan_runs(recipes, model, identity, out, chosen, cache=cache)
    ended = run_all(planned, out, runner, on_outcome)
    finished = [run.out for run, outcome in zip(planned, ended, strict=True) if outcome.status != "failed"]
    failed = [LeftOut(outcome.name, f"failed: {outcome.reason}") for outcome in ended if outcome.status == "failed"]
    return Sweep(tuple(ended), write_sweep(out, finished, failed))


def _absolute(model: str) -> str:
    """A local model by a path that holds from any folder; a hub id as it is."""
    path = expanded(model)
    return str(path.absolute()) if path.exists() else model


def plan_runs(
    recipes: Sequence[Recipe],
    model: str,
    identity: str,
    out: Path,
    options: Sequence[str] = (),
    command: Sequence[str] = _COMMAND,
    cache: Path | None = None,
) -> list[SweepRun]:
    """A run for each recipe, in `out`/<name of the recipe>.

    model: as for --model. identity: changes when the model's files do. options: further options of `quantpress run`.
    Raises BadInput for two recipes of one name, and for one without an evaluation.
    """
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"sweep: two recipes are called {name}; give each its own `name`")
    if without := [recipe.name for recipe in recipes if recipe.evaluation is None]:
        raise BadInput(f"sweep: {', '.join(without)} has `evaluation: null`, so there is nothing to compare it by")
    if going_on := [recipe.name for recipe in recipes if recipe.evaluation and recipe.evaluation.until_clear]:
        raise BadInput(
            f"sweep: {', '.join(going_on)} has evaluation.until_clear, and runs that are compared need the same "
            "windows; --set evaluation.until_clear=null"
        )
    if out.exists() and not (out / ".recipes").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is not empty and holds no sweep; give another --out")
    tasks = []
    for recipe in recipes:
        where = out / recipe.name
        document = recipe.model_dump(mode="json")
        file = out / ".recipes" / f"{recipe.name}.yaml"  # JSON is YAML
        key = _digest([document, identity, version("quantpress"), sorted(options), *_texts(recipe)])
        arguments = (str(file.absolute()), "--model", model, "--out", str(where.absolute()), "--json", *options)
        arguments += ("--share", str((out / _SHARED).absolute()))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, document)
        tasks.append(SweepRun(recipe.name, (*command, *arguments), where, key, cache))
    return tasks


def _texts(recipe: Recipe) -> list[str]:
    """The sha256 of those texts of the recipe that are local files."""
    sources = [expanded(text.source) for text in (recipe.calibration, recipe.evaluation) if text is not None]
    return [file_sha256(file) for file in sources if file.is_file()]


def run_all(
    tasks: Sequence[SweepRun], out: Path, fan: Runner, on_outcome: Callable[[RunOutcome], None]
) -> list[RunOutcome]:
    """Run what is not finished; returns the outcomes in the order of `tasks`.

    Each outcome is written to `out`/sweep.json as soon as it is known. A run that failed is repeated the next time; one
    that was stopped goes on after its last finished block.
    """
    before = _finished(out)
    ended = {task.name: RunOutcome(task.name, before[task.key]["status"], before[task.key]["reason"], reused=True)
             for task in tasks if task.key in before and (task.out / "eval" / "results.json").is_file()}  # fmt: skip
    for outcome in ended.values():
        on_outcome(outcome)
    for outcome in fan([task for task in tasks if task.name not in ended]):
        ended[outcome.name] = outcome
        _record(tasks, ended, out)
        on_outcome(outcome)
    _record(tasks, ended, out)
    shutil.rmtree(out / _SHARED, ignore_errors=True)
    return [ended[task.name] for task in tasks]


def in_turn(on_start: Callable[[SweepRun], None] = lambda task: None) -> Runner:
    """One run after another on this machine; the messages of each go to <name>.log."""

    def fan(tasks: Sequence[SweepRun]) -> Iterator[RunOutcome]:
        for task in tasks:
            on_start(task)
            yield run_one(task)

    return fan


def over_ray(address: str, cpus: int, gpus: float) -> Runner:
    """Runs on the Ray cluster at `address` (`local` starts one here), each with this many cores and GPUs.

    Every node needs this version of quantpress and has to see the same model, recipes and output folder.
    Raises BadInput when Ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise BadInput("--ray needs Ray: pip install 'quantpress[ray]'") from None

    def fan(tasks: Sequence[SweepRun]) -> Iterator[RunOutcome]:
        try:
            ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput(f"--ray {address}: {' '.join(str(error).split())[:200]}") from None
        try:
            remote = ray.remote(run_one).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
            waiting = {remote.remote(task): task for task in tasks}
            while waiting:
                (ready,), _ = ray.wait(list(waiting), num_returns=1)
                yield _seen(waiting.pop(ready), ready, ray)
        finally:
            ray.shutdown()

    return fan


def run_one(task: SweepRun) -> RunOutcome:
    """Run one recipe to its end, whether that is success or failure."""
    task.out.parent.mkdir(parents=True, exist_ok=True)
    log = task.log
    with log.open("wb") as errors:
        environment = os.environ | ({} if task.cache is None else {"QUANTPRESS_CACHE": str(task.cache)})
        with subprocess.Popen(  # its guard ends it when this process ends, however that is
            guarded(task.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
        ) as run:
            assert run.stdout is not None
            printed, code = run.stdout.read(), run.wait()
    if code in _ENDED:
        status = _ENDED[code]
        return RunOutcome(task.name, status, "" if status == "done" else _gates(printed))
    return RunOutcome(task.name, "failed", _why(log, code))


def _seen(task: SweepRun, ready: Any, ray: Any) -> RunOutcome:
    """The outcome of a remote run; its folder has to be visible from here."""
    try:
        outcome: RunOutcome = ray.get(ready)
    except ray.exceptions.RayError as error:
        return RunOutcome(task.name, "failed", f"Ray lost the run: {' '.join(str(error).split())[:200]}")
    if outcome.status != "failed" and not (task.out / "eval" / "results.json").is_file():
        return RunOutcome(
            task.name, "failed", f"{task.out} is not on storage that this machine shares with the cluster"
        )
    return outcome


def _why(log: Path, code: int) -> str:
    """The last line of the log, without our name before it; or the signal that ended the process."""
    if code < 0 or code > _SIGNALLED:
        signal = -code if code < 0 else code - _SIGNALLED
        hint = " (out of memory?)" if signal == 9 else ""
        return f"ended by signal {signal}{hint}; see {log.name}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip().removeprefix("quantpress: ") if lines else f"exit code {code}"
    return last if code == 2 else f"{last}; see {log.name}"


def _gates(printed: bytes) -> str:
    """The reason of the gates, from what `run --json` prints."""
    try:
        return str(json.loads(printed)["results"]["gates"]["reason"])
    except (ValueError, KeyError, TypeError):
        return "a gate was missed"


def _finished(out: Path) -> dict[str, dict[str, Any]]:
    """The runs of an earlier sweep in `out` that did not fail, by key."""
    path = out / SWEEP_STATE
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {one["key"]: one for one in document["runs"] if one["status"] != "failed"}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: cannot be read ({' '.join(str(error).split())}); delete it to start over") from None


def _record(tasks: Sequence[SweepRun], ended: dict[str, RunOutcome], out: Path) -> None:
    keys = {task.name: task.key for task in tasks}
    runs = [{k: v for k, v in asdict(ended[name]).items() if k != "reused"} | {"key": key}
            for name, key in keys.items() if name in ended]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SWEEP_STATE, {"schema": 1, "runs": runs})


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
