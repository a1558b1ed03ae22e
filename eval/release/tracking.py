"""Evaluated runs as lines of an experiment tracker: Weights & Biases or MLflow.

Each is an extra. Where a line goes, and with whose account, is the tracker's own setting (MLFLOW_TRACKING_URI,
WANDB_MODE …). The same run is the same line: logging it again brings that up to date.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.core.errors import BadInput

from ..report.card import shown_recipe
from ..report.measured_run import MeasuredRun, find_runs, labelled
from ..report.table import rows
from ..report.verdict import choose

_LONGEST = 500  # characters of a parameter: MLflow's limit


@dataclass(frozen=True)
class Line:
    """A run for a tracker. identity: of the artifact, its recipe and what it was measured on. params: the recipe's keys
    that are not defaults, dotted. metrics: every number of the comparison's table. tags: what can be filtered by.
    """

    name: str
    identity: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


def lines(folders: Sequence[Path]) -> list[Line]:
    """A line for each finished run in `folders`; raises BadInput where there is none."""
    runs, _ = find_runs(folders)
    return [_line(run) for run in labelled(runs)]


def _line(run: MeasuredRun) -> Line:
    (row,) = rows(choose([run]))
    recipe = shown_recipe(run)
    known = [run.manifest.artifact.digest, recipe, run.text.sha256, run.text.windows]
    numbers = {_named(key): float(value) for key, value in row.items() if isinstance(value, int | float)}
    tags = {key: str(row[key]) for key in ("model", "level")}
    tags |= {"scheme": run.scheme, "format": run.manifest.artifact.format, "gates": run.results.gates.verdict}
    return Line(
        name=run.label,
        identity=hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16],
        params={key: value[:_LONGEST] for key, value in _dotted(recipe)},
        metrics={key: value for key, value in numbers.items() if key not in ("beaten", "take")},
        tags=tags | {"quantpress": run.manifest.quantpress},
    )


def _named(key: str) -> str:
    """A name that both trackers take."""
    return re.sub(r"[^\w.-]", "_", key)


def _dotted(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for key, item in value.items():
        name = prefix + _named(key)
        plain = item if isinstance(item, str) else json.dumps(item)
        out += _dotted(item, f"{name}.") if isinstance(item, Mapping) and item else [(name, plain)]
    return out


def to_mlflow(some: Sequence[Line], project: str) -> None:
    """Log to the MLflow experiment `project`."""
    import mlflow

    mlflow.set_experiment(project)
    for line in some:
        there = mlflow.search_runs(filter_string=f"tags.identity = '{line.identity}'", output_format="list")
        with mlflow.start_run(run_id=there[0].info.run_id if there else None, run_name=None if there else line.name):
            mlflow.set_tags({**line.tags, "identity": line.identity})
            mlflow.log_params(dict(line.params))
            mlflow.log_metrics(dict(line.metrics))


def to_wandb(some: Sequence[Line], project: str) -> None:
    """Log to the Weights & Biases project `project`."""
    import wandb

    # Of this machine nothing is told: no paths, packages, console or repository.
    quiet = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True,
        x_save_requirements=False,
    )  # fmt: skip
    for line in some:
        with wandb.init(
            project=project, id=line.identity, name=line.name, resume="allow", config={**line.params, **line.tags},
            settings=quiet,
        ) as started:  # fmt: skip
            started.summary.update(dict(line.metrics))
    wandb.teardown()  # which waits until everything is written


TRACKERS: Mapping[str, Callable[[Sequence[Line], str], None]] = {"mlflow": to_mlflow, "wandb": to_wandb}


def log_runs(folders: Sequence[Path], to: str, project: str) -> list[Line]:
    """Log every finished run in `folders` to one of TRACKERS; returns the lines.

    Raises BadInput for a tracker that is unknown, not installed or refuses, and where no run is finished.
    """
    if to not in TRACKERS:
        raise BadInput(f"--to {to!r}: known are {', '.join(TRACKERS)}")
    if importlib.util.find_spec(to) is None:
        raise BadInput(f"--to {to}: {to} is not installed: pip install 'quantpress[{to}]'")
    found = lines(folders)
    try:
        TRACKERS[to](found, project)
    except Exception as error:  # each has errors of its own, for a server that is away or a login that is missing
        raise BadInput(f"--to {to}: {' '.join(str(error).split())[:300] or type(error).__name__}") from error
    return found
