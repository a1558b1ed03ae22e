"""What a run folder remembers of its stages, so that a second run does only what has changed, and says why.

The memory is the `stages` section of the run's manifest.json: for each stage its inputs (everything that decides what
comes out: parts of the recipe, hashes of what it read), how it ended and how long it took.
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
class Stage:
    """A step of a run after the artifact is there.

    inputs: as JSON, all that decides the outcome. outputs: paths under the run folder that it leaves behind.
    work: does it, and returns what the manifest says of it, as JSON; it need not write there itself. failed: whether
    that says that it has to be done again the next time.
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

    def run(self, stage: Stage) -> Mapping[str, Any]:
        """Do `stage`, unless it was done with these inputs and left its outputs; returns what it says of itself.

        The record of a stage goes before it is done anew: one that fails counts as not done.
        """
        done = self._stages().get(stage.name)
        reason = self._reason(stage, done)
        if reason is None and done is not None:
            self._on_note(f"{stage.name}: as before, nothing it depends on has changed")
            summary: Mapping[str, Any] = done["summary"]
            return summary
        if done is not None:
            self._on_note(f"{stage.name}: again, because {reason}")
            self._write(stage.name, None)
        started = time.monotonic()
        summary = dict(stage.work())
        seconds = round(time.monotonic() - started, 3)
        self._write(stage.name, {"inputs": dict(stage.inputs), "summary": summary, "seconds": seconds})
        return summary

    def forget(self, name: str) -> None:
        """From now on the stage counts as not done: another command writes over what it left."""
        if name in self._stages():
            self._write(name, None)

    def _reason(self, stage: Stage, done: Mapping[str, Any] | None) -> str | None:
        """Why the stage has to be done; None when it does not."""
        if done is None:
            return "it was never done"
        if stage.failed(done["summary"]):
            return "it failed"
        changed = differences(done["inputs"], json.loads(json.dumps(dict(stage.inputs))))
        if changed:
            return f"{changed[0]}{f' and {len(changed) - 1} more' if changed[1:] else ''}"
        missing = [name for name in stage.outputs if not (self._out / name).exists()]
        return f"{missing[0]} is not there any more" if missing else None

    def _stages(self) -> dict[str, Any]:
        return {name: record.document() for name, record in read_manifest(self._out).stages.items()}

    def _write(self, name: str, record: Mapping[str, Any] | None) -> None:
        manifest = read_manifest(self._out)
        stages = {n: r for n, r in manifest.stages.items() if n != name}
        if record is not None:
            stages[name] = StageRecord.model_validate(record)
        manifest.changed(stages=stages).write(self._out)
