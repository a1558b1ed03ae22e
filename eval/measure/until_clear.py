"""How much more to measure while a gate is too close to call: `evaluation.until_clear`."""

import math
from collections.abc import Sequence

from quantpress.recipe import Task
from quantpress.recipe.evaluation import UntilClear

from .metrics import gated
from .results import Results
from .sections import GateCheck


def more_windows(results: Results, until: UntilClear) -> int | None:
    """How many windows to measure next; None where that is clear, settled by another gate, or enough."""
    open_checks = [check for check in _unclear(results) if "." not in check.name and gated(check.name).of_text]
    if not open_checks or results.text is None or results.text.windows >= until.windows:
        return None
    now = results.text.windows
    return min(until.windows, max(2 * now, *(check.needs or 0 for check in open_checks)))


def more_questions(results: Results, until: UntilClear, tasks: Sequence[Task]) -> list[Task]:
    """The tasks to ask again, with higher limits; those that are unclear and have more documents."""
    needs = {check.name.removeprefix("min_recovery."): check.needs for check in _unclear(results)}
    asked = {task.task: task.n for task in results.tasks}
    again = []
    for task in tasks:
        n, limit = asked.get(task.label, 0), task.limit
        if task.label in needs and limit is not None and limit <= n and limit < until.questions:
            share = (needs[task.label] or 0) / n
            again.append(
                task.model_copy(update={"limit": min(until.questions, max(2 * limit, math.ceil(limit * share)))})
            )
    return again


def _unclear(results: Results) -> list[GateCheck]:
    if results.gates.verdict != "INCONCLUSIVE":
        return []
    return [check for check in results.gates.checks if check.verdict == "INCONCLUSIVE" and check.interval is not None]
