"""The journal of a run: which blocks are finished, and what is needed to resume after a kill at any moment.

A block counts as finished once its line is in the journal; its tensors and the hidden states are written before that.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..artifact.manifest import BlockRecord, Manifest, read_manifest
from ..core.errors import BadInput
from ..core.files import write_json
from ..models.checkpoint import write_part


def finished(out: Path, key: Mapping[str, Any], *, compare_calibration: bool = True) -> Manifest:
    """The manifest of the finished run in `out`.

    Raises BadInput, naming the difference, when its recipe, model, calibration text or quantpress version is not that
    of `key`. Text that the model generates itself follows from these and need not be compared. The versions of torch
    and transformers and the number of threads no longer matter once a run is finished; the manifest records them.
    """
    manifest = read_manifest(out)
    before = {
        "recipe": {name: value for name, value in manifest.recipe.items() if name in key["recipe"]},
        "model": manifest.model.files,
        "calibration": manifest.calibration and manifest.calibration.sha256,
        "imatrix": manifest.imatrix,
        "quantpress": manifest.quantpress,
    }
    if not compare_calibration:
        del before["calibration"]
    different = differences(before, json.loads(json.dumps({name: key[name] for name in before})))
    if different:
        raise BadInput(
            f"{out} already holds a finished run of something else ({'; '.join(different[:4])}); "
            "give another --out, or --overwrite to replace it"
        )
    return manifest


class Journal:
    """`folder` holds key.json (what the artifact depends on), journal.jsonl, a file for each block, and the latest
    hidden states.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Open the journal or start one. Raises BadInput, naming the difference, when it is another run's."""
        self.folder = folder
        self.done: list[BlockRecord] = []
        if (folder / "key.json").exists():
            before = json.loads((folder / "key.json").read_text())
            different = list(differences(before, json.loads(json.dumps(key))))
            if different:
                raise BadInput(
                    f"{folder.parent} holds an unfinished run of something else ({'; '.join(different[:4])}); "
                    "give another --out, or --overwrite to start afresh"
                )
            self.done = self._read()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "key.json", dict(key))

    def part(self, k: int) -> Path:
        return self.folder / f"block-{k:05d}.safetensors"

    def hidden(self) -> dict[str, Tensor]:
        """The hidden states after the last finished block, by name."""
        hidden: dict[str, Tensor] = load_file(self._hidden(len(self.done) - 1))
        return hidden

    def commit(self, tensors: Mapping[str, Tensor], hidden: Mapping[str, Tensor], record: BlockRecord) -> None:
        """Write the next block: its tensors, the hidden states that leave it, then the line that marks it finished."""
        k = len(self.done)
        write_part(self.part(k), tensors)
        if hidden:
            write_part(self._hidden(k), hidden)
        with open(self.folder / "journal.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record.document()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.append(record)
        self._hidden(k - 1).unlink(missing_ok=True)

    def _hidden(self, k: int) -> Path:
        return self.folder / f"hidden-{k:05d}.safetensors"

    def _read(self) -> list[BlockRecord]:
        path = self.folder / "journal.jsonl"
        if not path.exists():
            return []
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:  # killed while writing a line: that block is not finished
            with open(path, "r+b") as file:
                file.truncate(len(whole))
        return [BlockRecord.model_validate_json(line) for line in whole.splitlines()]


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """A line for each value in which two JSON documents differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted(before.keys() | now.keys()):
            found += differences(before.get(key), now.get(key), f"{place}.{key}" if place else key)
        return found
    return [] if before == now else [f"{place}: {_short(before)} there, {_short(now)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:20] + "…"
