"""Many recipes on one model: each is a `quantpress run` of its own, here one after another or over a Ray cluster.

A process of its own for each run: peak memory and CPU seconds are that run's, and one that is killed takes no other
with it. What does not depend on the recipe is computed by the first run and read by the rest: in the cache the model at
one commit, the texts, and the original's evaluation (its last hidden states, task scores, continuations); in a folder
that goes when the sweep ends, what engine/sharing.py keeps.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantpress.core.errors import BadInput
from quantpress.core.files import file_sha256, write_json
from quantpress.recipe import Recipe

STATE = "sweep.json"
_SHARED = ".shared"
_COMMAND = (sys.executable, "-m", "quantpress", "run")
_GATE_MISSED = 3


@dataclass(frozen=True)
class Task:
    """One run: its command, its folder, and the key that says whether a finished one is this very run."""

    name: str
    command: tuple[str, ...]
    out: Path
    key: str

    @property
    def log(self) -> Path:
        return self.out.parent / f"{self.name}.log"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `done`, `gate` (done, and a gate of its recipe was missed) or `failed`, with the reason.

    reused: it was finished before, and not done again.
    """

    name: str
    status: str
    reason: str = ""
    reused: bool = False


Fan = Callable[[Sequence[Task]], Iterable[Outcome]]


def plan(
    recipes: Sequence[Recipe],
    model: str,
    identity: str,
    out: Path,
    options: Sequence[str] = (),
    command: Sequence[str] = _COMMAND,
) -> list[Task]:
    """A task for each recipe, in `out`/<name of the recipe>.

    model: as for --model, the same bytes each time; identity: what changes when the model does; options: further ones
    of `quantpress run`, for all.
    Raises BadInput for two recipes of one name and for one that measures nothing.
    """
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"sweep: two recipes are called {name}; give each a `name` of its own")
    if without := [recipe.name for recipe in recipes if recipe.evaluation is None]:
        raise BadInput(f"sweep: {', '.join(without)} has `evaluation: null`, so there is nothing to compare it by")
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
        tasks.append(Task(recipe.name, (*command, *arguments), where, key))
    return tasks


def _texts(recipe: Recipe) -> list[str]:
    """The sha256 of the recipe's texts that are files here."""
    sources = [Path(text.source).expanduser() for text in (recipe.calibration, recipe.evaluation) if text is not None]
    return [file_sha256(file) for file in sources if file.is_file()]


def sweep(tasks: Sequence[Task], out: Path, fan: Fan, on_outcome: Callable[[Outcome], None]) -> list[Outcome]:
    """Do what is not done yet; the outcomes in the order of `tasks`. `out`/sweep.json knows each as soon as it ends.

    A run that failed is tried again the next time; one that was stopped goes on after its last finished block.
    """
    before = _finished(out)
    ended = {task.name: Outcome(task.name, before[task.key]["status"], before[task.key]["reason"], reused=True)
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


def in_turn(on_start: Callable[[Task], None] = lambda task: None) -> Fan:
    """One run after another on this machine; what each says on the way goes to <name>.log."""

    def fan(tasks: Sequence[Task]) -> Iterator[Outcome]:
        for task in tasks:
            on_start(task)
            yield run(task)

    return fan


def over_ray(address: str, cpus: int, gpus: float) -> Fan:
    """The runs spread over the Ray cluster at `address` (`local` starts one here), each on so many cores and GPUs.

    Every node needs this version of quantpress and sees the same model, recipes and output folder.
    Raises BadInput when Ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise BadInput("--ray needs Ray: pip install 'quantpress[ray]'") from None

    def fan(tasks: Sequence[Task]) -> Iterator[Outcome]:
        try:
            ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput(f"--ray {address}: {' '.join(str(error).split())[:200]}") from None
        try:
            remote = ray.remote(run).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
            waiting = {remote.remote(task): task for task in tasks}
            while waiting:
                (ready,), _ = ray.wait(list(waiting), num_returns=1)
                yield _seen(waiting.pop(ready), ready, ray)
        finally:
            ray.shutdown()

    return fan


def run(task: Task) -> Outcome:
    """One run to its end, whatever end that is."""
    task.out.parent.mkdir(parents=True, exist_ok=True)
    log = task.log
    with log.open("wb") as errors:
        done = subprocess.run(task.command, stdout=subprocess.PIPE, stderr=errors, check=False)
    if done.returncode in (0, _GATE_MISSED):
        missed = done.returncode == _GATE_MISSED
        return Outcome(task.name, "gate" if missed else "done", _gates(done.stdout) if missed else "")
    return Outcome(task.name, "failed", _why(log, done.returncode))


def failures(out: Path) -> list[Outcome]:
    """The runs of a sweep's folder that failed, as its report shows them; none when `out` is no sweep's."""
    path = out / STATE
    if not path.is_file():
        return []
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return [Outcome(one["name"], one["status"], one["reason"]) for one in runs if one["status"] == "failed"]


def _seen(task: Task, ready: Any, ray: Any) -> Outcome:
    """The outcome of a remote run, which only counts when its folder can be seen from here."""
    try:
        outcome: Outcome = ray.get(ready)
    except ray.exceptions.RayError as error:
        return Outcome(task.name, "failed", f"Ray lost it: {' '.join(str(error).split())[:200]}")
    if outcome.status != "failed" and not (task.out / "eval" / "results.json").is_file():
        return Outcome(task.name, "failed", f"{task.out} is not on storage that this machine shares with the cluster")
    return outcome


def _why(log: Path, code: int) -> str:
    """The last line that says something, without our name before it; or how the process was ended."""
    if code < 0:
        hint = " (out of memory?)" if code == -9 else ""
        return f"ended by signal {-code}{hint}; see {log}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip().removeprefix("quantpress: ") if lines else f"exit code {code}"
    return last if code == 2 else f"{last}; see {log}"


def _gates(printed: bytes) -> str:
    """The gates' reason out of the document that `run --json` prints."""
    try:
        return str(json.loads(printed)["results"]["gates"]["reason"])
    except (ValueError, KeyError, TypeError):
        return "a gate was missed"


def _finished(out: Path) -> dict[str, dict[str, Any]]:
    """By key, the runs of an earlier sweep in `out` that ended well."""
    path = out / STATE
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {one["key"]: one for one in document["runs"] if one["status"] != "failed"}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: cannot be read ({' '.join(str(error).split())}); delete it to start over") from None


def _record(tasks: Sequence[Task], ended: dict[str, Outcome], out: Path) -> None:
    keys = {task.name: task.key for task in tasks}
    runs = [{k: v for k, v in asdict(ended[name]).items() if k != "reused"} | {"key": key}
            for name, key in keys.items() if name in ended]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / STATE, {"schema": 1, "runs": runs})


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
