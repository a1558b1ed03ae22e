"""lm-eval's tasks on two models, compared document by document.

The library runs its own tasks, prompts and metrics. We keep the score of every document, so that the two models can be
compared pairwise; that needs metrics that are a mean over documents.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantpress.core.errors import BadInput
from quantpress.core.files import expanded, file_sha256, remembered
from quantpress.recipe import Task

from .sections import Score, TaskResult
from .statistics import flips, paired_difference, recovery, standard_error

if TYPE_CHECKING:
    from .lm_eval_model import LmEvalModel

_SEED = 1234  # of the few-shot examples: lm-eval's default


@dataclass(frozen=True)
class TaskScores:
    """One model's scores on one metric of a task, by document, with `few_shot` examples in the prompt."""

    task: str
    metric: str
    higher_is_better: bool
    few_shot: int
    scores: dict[str, float]


class Tasks:
    """The tasks of a recipe, found and loaded before any model runs.

    Raises BadInput when lm-eval is not installed, or when a task is unknown or its file or data cannot be read.
    """

    def __init__(self, wanted: Sequence[Task]) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise BadInput("evaluation.tasks needs lm-eval: pip install 'quantpress[tasks]'")
        with _quiet():
            from lm_eval.tasks import TaskManager

            found = {task.name: _shipped(task.name) for task in wanted if task.name is not None}
            # Groups, tags and tasks in Python need the full index, for which the library parses thousands of files.
            self._manager = TaskManager(include_defaults=None in found.values())
            self._specs = [(task, self._spec(task, found)) for task in wanted]
            for task, spec in self._specs:
                self._load(task, spec)

    def identity(self) -> str:
        """Everything that scores depend on apart from the model: the tasks, their files and the library, as JSON."""
        from importlib.metadata import version

        specs = [(task.model_dump(), spec, _data_of(spec)) for task, spec in self._specs]
        return json.dumps([version("lm-eval"), specs], default=_code)

    def run(self, model: "LmEvalModel") -> list[TaskScores]:
        """The scores on every task, in the recipe's order."""
        import lm_eval

        out: list[TaskScores] = []
        for task, spec in self._specs:
            with _quiet(), _task_errors(task):
                found = lm_eval.evaluate(
                    lm=model, task_dict=self._load(task, spec), limit=task.limit, log_samples=True, bootstrap_iters=0
                )
            out += _outcomes(task, found)
        return out

    def _spec(self, task: Task, found: dict[str, str | None]) -> str | dict[str, Any]:
        if task.file is None:
            assert task.name is not None
            if place := found[task.name]:
                return place
            if task.name not in self._manager.all_tasks:
                raise BadInput(f"evaluation.tasks: lm-eval knows no task {task.name!r} (`lm-eval ls tasks` lists them)")
            return task.name
        return _read_file(expanded(task.file))

    def _load(self, task: Task, spec: str | dict[str, Any]) -> Any:
        """The library's task objects with their data, set to the same few-shot examples each time."""
        with _task_errors(task):
            loaded = self._manager.load([spec])
            for leaf in loaded["tasks"].values():
                own = leaf.get_config("num_fewshot")
                leaf.set_config(key="num_fewshot", value=(own or 0) if task.few_shot is None else task.few_shot)
                leaf.set_fewshot_seed(seed=_SEED)
        return loaded


def kept(folder: Path, tasks: Tasks, what: Sequence[Any], run: Callable[[], list[TaskScores]]) -> list[TaskScores]:
    """The scores that `run` gives, cached in `folder`; what: everything that identifies the model."""
    rows = remembered(folder, [tasks.identity(), *what], lambda: [asdict(outcome) for outcome in run()])
    return [TaskScores(**row) for row in rows]


def _shipped(name: str) -> str | None:
    """The YAML file of the library's task of that name, the first in the order of its own index.

    None for a group, a tag, a task in Python and an unknown name.
    """
    package = importlib.util.find_spec("lm_eval")
    assert package is not None
    assert package.origin is not None
    mark, end = r"['\"]?", r"['\"]?[ \t]*(?:#.*)?$"
    this, start = f"{mark}{re.escape(name)}{end}", rf"^{mark}"
    declared = re.compile(rf"{start}task{mark}:[ \t]*{this}", re.MULTILINE)
    others = rf"{start}(?:tag|group){mark}:[ \t]*(?:{this}|{end[:-1]}\n(?:[ \t]*-.*\n)*?[ \t]*-[ \t]*{this})"
    several = re.compile(others, re.MULTILINE)
    in_python = re.compile(rf"{start}(?:class|group){mark}:", re.MULTILINE)
    found: str | None = None
    for path in sorted((Path(package.origin).parent / "tasks").glob("**/*.yaml"), key=Path.as_posix):
        text = path.read_text(encoding="utf-8", errors="replace")
        if name not in text:
            continue
        if several.search(text):
            return None
        if found is None and declared.search(text):
            if in_python.search(text):
                return None
            found = str(path)
    return found


def _read_file(path: Path) -> dict[str, Any]:
    """A local task's YAML file; data files are looked up in its folder."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise BadInput(f"evaluation.tasks: {path}: no such file")
    try:
        config: dict[str, Any] = load_yaml(path)
    except Exception as error:
        raise BadInput(f"evaluation.tasks: {path}: cannot be read: {' '.join(str(error).split())[:300]}") from error
    if "task" not in config or isinstance(config["task"], list):
        raise BadInput(f"evaluation.tasks: {path}: no `task: name`; one task a file is read")
    settings = config.get("dataset_kwargs") or {}
    if "data_files" in settings:
        config["dataset_kwargs"] = settings | {"data_files": _beside(path.resolve().parent, settings["data_files"])}
    return config


def _data_of(spec: str | dict[str, Any]) -> list[tuple[str, int, int]]:
    """The local data files of a task, by path, size and modification time."""
    files = (spec.get("dataset_kwargs") or {}).get("data_files", []) if isinstance(spec, dict) else []
    groups = files.values() if isinstance(files, dict) else [files]
    paths = [Path(str(f)) for group in groups for f in (group if isinstance(group, list) else [group])]
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.is_file()]


def _code(value: Any) -> Any:
    """A task's `!function` as JSON: its name and the hash of its file (its repr is only an address)."""
    try:
        source = inspect.getsourcefile(value)
    except TypeError:
        source = None
    return str(value) if source is None else [value.__name__, file_sha256(Path(source))]


def _beside(folder: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {split: _beside(folder, some) for split, some in files.items()}
    if isinstance(files, list):
        return [_beside(folder, one) for one in files]
    local = folder / str(files)
    return str(local) if local.is_file() else files


def _outcomes(task: Task, found: dict[str, Any]) -> list[TaskScores]:
    """The scores on each metric; the documents of a group are pooled."""
    scores: dict[str, dict[str, float]] = {}
    better: dict[str, bool] = {}
    shots = 0
    for leaf, samples in found["samples"].items():
        shots = max(shots, int(found.get("n-shot", {}).get(leaf) or 0))
        for sample in samples:
            for metric in sample["metrics"]:
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                value = sample[metric]
                if isinstance(value, bool | int | float | np.number):
                    document = f"{leaf}:{sample['doc_id']}:{_identity(sample)}"
                    scores.setdefault(name, {})[document] = float(value)
                    better[name] = bool(found["higher_is_better"][leaf].get(metric, True))
        scores = {name: values for name, values in scores.items() if _is_mean(found, leaf, name, values)}
    if task.metric is not None:
        if task.metric not in scores:
            there = ", ".join(scores) or "none"
            raise BadInput(
                f"task {task.label}: no metric {task.metric!r} that is a mean over documents; it has {there}"
            )
        scores = {task.metric: scores[task.metric]}
    if not scores:
        raise BadInput(
            f"task {task.label}: it has no metric that is a mean over documents, so models cannot be compared on it"
        )
    return [TaskScores(task.label, name, better[name], shots, values) for name, values in scores.items()]


def _identity(sample: dict[str, Any]) -> str:
    """Hash of a document, its prompt and its answer."""
    return hashlib.sha256((sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"]).encode()).hexdigest()[
        :16
    ]


def _is_mean(found: dict[str, Any], leaf: str, metric: str, scores: dict[str, float]) -> bool:
    """Whether lm-eval's own value of the metric is the mean over the documents."""
    said = found["results"][leaf].get(metric if "," in metric else f"{metric},none")
    own = [value for document, value in scores.items() if document.startswith(f"{leaf}:")]
    return isinstance(said, int | float) and math.isclose(said, float(np.mean(own)), rel_tol=1e-9, abs_tol=1e-12)


def compare_tasks(artifact: list[TaskScores], original: list[TaskScores] | None) -> tuple[TaskResult, ...]:
    """Results of the artifact, compared with the original's where there are any."""
    before = {(o.task, o.metric): o for o in original or ()}
    out = []
    for outcome in artifact:
        names = sorted(outcome.scores)
        after = np.array([outcome.scores[name] for name in names])
        row: dict[str, Any] = {
            "task": outcome.task, "metric": outcome.metric, "higher_is_better": outcome.higher_is_better,
            "few_shot": outcome.few_shot, "n": len(names), "artifact": _score(after),
            "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        }  # fmt: skip
        first = before.get((outcome.task, outcome.metric))
        if first is not None:
            if first.scores.keys() != outcome.scores.keys():
                raise BadInput(f"task {outcome.task}: the two models were given different documents")
            base = np.array([first.scores[name] for name in names])
            mean, error, interval = paired_difference(base, after)
            left, ends = recovery(base, after) if outcome.higher_is_better else (None, None)
            row |= {
                "original": _score(base), "difference": mean, "difference_stderr": error,
                "difference_interval": interval, "recovery": left, "recovery_interval": ends,
            }  # fmt: skip
            if (changed := flips(base, after)) is not None:
                row |= {"lost": changed[0], "won": changed[1], "flips_interval": changed[2]}
        out.append(TaskResult(**row))
    return tuple(out)


def _score(values: Any) -> Score:
    return Score(value=float(values.mean()), stderr=standard_error(values))


@contextlib.contextmanager
def _task_errors(task: Task) -> Any:
    """Turn whatever a task's own code, templates or data raise into one line about the task."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"task {task.label}: {said}") from error


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence the library's logs and progress bars: ours are the ones to read."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
