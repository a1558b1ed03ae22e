"""The stages that a run folder has finished, so that a second run does only what has changed, and says why.

They are the `stages` of the run's manifest.json: for each its inputs (everything that decides what comes out: parts of
the recipe, hashes of what it read), how it ended and how long it took.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.artifact.manifest import StageRecord, read_manifest
from quantpress.engine.journal import differences


@dataclass(frozen=True)
class ReleaseStage:
    """A step of a run after the artifact is made.

    inputs: as JSON, everything that decides the outcome. outputs: paths under the run folder that it leaves behind.
    work: does it, and returns a summary as JSON. failed: whether a summary means that it has to be repeated.
    """

    name: str
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]
    work: Callable[[], Mapping[str, Any]]
    failed: Callable[[Mapping[str, Any]], bool] = lambda summary: False


class Ledger:
    """The stages of the run in `out`, which holds a finished artifact and its manifest."""

    def __init__(self, out: Path, on_note: Callable[[str], None] = lambda line: None) -> None:
        self._out, self._on_note = out, on_note

    def run(self, stage: ReleaseStage) -> Mapping[str, Any]:
        """Do the stage, unless it was done with these inputs and its outputs are still there; returns its summary.

        Its old record is removed before the work: a stage that raises counts as not done.
        """
        done = read_manifest(self._out).stages.get(stage.name)
        reason = self._reason(stage, done)
        if done is not None and reason is None:
            self._on_note(f"{stage.name}: as before, nothing it depends on has changed")
            return done.summary
        if done is not None:
            self._on_note(f"{stage.name}: again, because {reason}")
            self._write(stage.name, None)
        started = time.monotonic()
        summary = dict(stage.work())
        seconds = round(time.monotonic() - started, 3)
        self._write(stage.name, StageRecord(inputs=dict(stage.inputs), summary=summary, seconds=seconds))
        return summary

    def forget(self, name: str) -> None:
        """Have the stage count as not done, because something else overwrites its outputs."""
        if name in read_manifest(self._out).stages:
            self._write(name, None)

    def _reason(self, stage: ReleaseStage, done: StageRecord | None) -> str | None:
        """Why the stage has to be done; None when it does not."""
        if done is None:
            return "it was never done"
        if stage.failed(done.summary):
            return "it failed"
        changed = differences(done.inputs, json.loads(json.dumps(dict(stage.inputs))))
        if changed:
            return f"{changed[0]}{f' and {len(changed) - 1} more' if changed[1:] else ''}"
        missing = [name for name in stage.outputs if not (self._out / name).exists()]
        return f"{missing[0]} no longer exists" if missing else None

    def _write(self, name: str, record: StageRecord | None) -> None:
        manifest = read_manifest(self._out)
        stages = {other: done for other, done in manifest.stages.items() if other != name}
        manifest.changed(stages=stages if record is None else stages | {name: record}).write(self._out)
