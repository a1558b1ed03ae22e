"""The table of several runs for programs: CSV, and Parquet where pyarrow is installed. Numbers, no prose."""

import csv
import importlib.util
import io
import math
from typing import Any

from ..measure.metrics import METRICS
from .verdict import Choice

Row = dict[str, str | int | float | bool | None]


def rows(choice: Choice) -> list[Row]:
    """A row for each run, all with the same columns; what was not measured is None."""
    tasks = dict.fromkeys((task.task, task.metric) for one in choice.judged for task in one.run.results.tasks)
    texts = dict.fromkeys(text.name for one in choice.judged for text in one.run.results.domains)
    return [_row(choice, k, list(tasks), list(texts)) for k in range(len(choice.judged))]


def _row(choice: Choice, k: int, tasks: list[tuple[str, str]], texts: list[str]) -> Row:
    one = choice.judged[k]
    run = one.run
    row: Row = {
        "run": run.label, "model": run.manifest.model.id, "level": one.standing.level, "beaten": one.beaten is not None,
        "take": one is choice.take, "remark": one.remark, "runs": max(1, len(run.results.repeats)),
    }  # fmt: skip
    for metric in METRICS:
        value = run.value(metric)
        low, high = (None, None) if value is None or value.interval is None else value.interval
        row |= {
            metric.name: None if value is None else value.artifact,
            f"{metric.name}_original": None if value is None else value.original,
            f"{metric.name}_stderr": None if value is None else value.stderr,
            f"{metric.name}_change": None if value is None else value.change,
            f"{metric.name}_low": low, f"{metric.name}_high": high,
        }  # fmt: skip
    by_text = {text.name: text for text in run.results.domains}
    for name in texts:
        text = by_text.get(name)
        row[f"perplexity_increase_on_{name}"] = None if text is None else text.perplexity_increase
        row[f"kl_mean_on_{name}"] = None if text is None else text.kl_mean
    for kind, name in (("raw", "prompts"), ("chat", "chats")):
        row[f"kl_mean_on_{name}"] = next((one.kl_mean for one in run.results.prompts if one.kind == kind), None)
    scores = {(task.task, task.metric): task for task in run.results.tasks}
    for task, metric_name in tasks:
        score = scores.get((task, metric_name))
        row[f"{task}_{metric_name}"] = None if score is None else score.artifact.value
        row[f"{task}_{metric_name}_recovery"] = None if score is None else score.recovery
    return {name: _finite(value) for name, value in row.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(table: list[Row]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue().encode("utf-8", "replace")


def as_parquet(table: list[Row]) -> bytes | None:
    """None where pyarrow is not installed (the extra `datasets` brings it). Columns without any value are left out."""
    if importlib.util.find_spec("pyarrow") is None:
        return None
    import pyarrow
    from pyarrow import parquet

    used = {name: [row[name] for row in table] for name in table[0]}
    columns = {name: pyarrow.array(values) for name, values in used.items() if any(v is not None for v in values)}
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())
