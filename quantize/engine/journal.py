"""The journal of a run: which blocks are finished, and what is needed to resume after a kill at any moment.

A block counts as finished once its line is in the journal; its files are written before that.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

from ..artifact.manifest import BlockRecord, Manifest, read_manifest
from ..core.errors import BadInput
from ..core.files import file_sha256, whole_file, write_json
from ..core.text import shortened
from ..models.shards import write_part

DUMP_SECONDS = 60.0  # between two copies of the hidden states: what a resumed run has to do again
DUMP_SHARE = 0.05  # of the time, at most, for writing them


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
    """`folder` holds key.json (what the artifact depends on), journal.jsonl, a file for each finished block, and from
    time to time the hidden states that leave one.

    A line of journal.jsonl is a block's record with the SHA-256 of its files: on opening, a file that is damaged or cut
    is named, and its block and those after it are made again. Files are written by a thread while the next block runs;
    they are not forced to the disk, since one that a power failure loses is made again as well.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], on_note: Callable[[str], None] = lambda line: None
    ) -> None:
        """Open the journal or start one. Raises BadInput, naming the difference, when it is another run's."""
        self.folder = folder
        self.done: list[BlockRecord] = []
        self.batch_tokens: int | None = None  # of the last finished block; bits may depend on it
        self._note = on_note
        self._lines: list[dict[str, Any]] = []
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._dumped, self._took = time.monotonic(), 0.0
        if (folder / "key.json").exists():
            before = json.loads((folder / "key.json").read_text())
            different = list(differences(before, json.loads(json.dumps(key))))
            if different:
                raise BadInput(
                    f"{folder.parent} holds an unfinished run of something else ({'; '.join(different[:4])}); "
                    "give another --out, or --overwrite to start afresh"
                )
            self._keep(self._intact())
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "key.json", dict(key))

    def part(self, k: int) -> Path:
        return self.folder / f"block-{k:05d}.safetensors"

    def parts(self) -> dict[Path, str]:
        """The files of the finished blocks, with their SHA-256."""
        return {self.part(k): line["files"][self.part(k).name] for k, line in enumerate(self._lines)}

    def transformed(self, k: int) -> Path:
        """The file with the transformed weights of block `k`, before rounding."""
        return self.folder / f"transformed-{k:05d}.safetensors"

    def hidden(self) -> dict[str, Tensor]:
        """The latest hidden states that were kept, by name; the blocks after them are to be done again.

        Empty where there are none: then all blocks are.
        """
        for k in reversed(range(len(self._lines))):
            digest, path = self._lines[k]["files"].get(self._hidden(k).name), self._hidden(k)
            if digest is not None and path.exists():
                if file_sha256(path) == digest:
                    self._keep(k + 1)
                    return dict(load_file(path))
                self._note(f"{path} is damaged: the blocks before it are done again")
        self._keep(0)
        return {}

    def follow(self, done: int, batch_tokens: int | None) -> None:
        """For the processes that have no journal of their own."""

    @property
    def keeps_hidden(self) -> bool:
        """Whether hidden states are to be kept after this block: not so often that it takes much of the time."""
        return time.monotonic() - self._dumped >= max(DUMP_SECONDS, self._took / DUMP_SHARE)

    def commit(
        self,
        tensors: Callable[[], Mapping[str, Tensor]],
        record: BlockRecord,
        batch_tokens: int,
        *,
        hidden: Callable[[], Mapping[str, Tensor]] | None = None,
        transformed: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Have the next block written by the thread: its tensors, the hidden states that leave it if given, its
        `transformed` weights if given, then the line that marks it finished.

        They are asked for by the thread, and must not change before `settle` or the next commit.
        """
        self.settle()
        k = len(self.done)
        files = {self.part(k): tensors}
        if transformed is not None:
            files[self.transformed(k)] = transformed
        if hidden is not None:
            files[self._hidden(k)] = hidden
        self.done.append(record)
        self._writing = self._pool.submit(self._write, k, record, batch_tokens, files)

    def settle(self) -> None:
        """Wait until all is written; raises what writing it has raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.settle()
        elif self._writing is not None:
            wait([self._writing])  # the error that is on its way is the one to report

    def _write(
        self,
        k: int,
        record: BlockRecord,
        batch_tokens: int,
        files: Mapping[Path, Callable[[], Mapping[str, Tensor]]],
    ) -> None:
        started, dumps = time.monotonic(), self._hidden(k) in files
        digests = {path.name: write_part(path, tensors(), sync=False) for path, tensors in files.items()}
        line = {"record": record.document(), "batch_tokens": batch_tokens, "files": digests}
        with open(self.folder / "journal.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(line)
        if dumps:
            for old in self.folder.glob("hidden-*"):
                if old != self._hidden(k):
                    old.unlink(missing_ok=True)
            self._dumped, self._took = time.monotonic(), time.monotonic() - started

    def _hidden(self, k: int) -> Path:
        return self.folder / f"hidden-{k:05d}.safetensors"

    def _intact(self) -> int:
        """Read journal.jsonl; returns how many blocks, from the first on, are finished and have all their files."""
        path = self.folder / "journal.jsonl"
        raw = path.read_bytes() if path.exists() else b""
        for text in raw[: raw.rfind(b"\n") + 1].splitlines():  # one cut off by a kill is not finished
            try:
                line = json.loads(text)
                self.done.append(BlockRecord.model_validate(line["record"]))
                files = dict(line["files"])
                self._lines.append({**line, "batch_tokens": int(line["batch_tokens"]), "files": files})
            except (ValueError, TypeError, KeyError):
                self._note(f"{path} is damaged in line {len(self._lines) + 1}: the blocks from there on are done again")
                break
        for k, line in enumerate(self._lines):
            for name, digest in line["files"].items():
                file = self.folder / name
                if file == self._hidden(k):
                    continue  # looked at when it is needed
                if not file.is_file() or file_sha256(file) != digest:
                    what = "damaged" if file.is_file() else "missing"
                    self._note(f"{file} is {what}: block {k} and those after it are done again")
                    return k
        return len(self._lines)

    def _keep(self, count: int) -> None:
        """Forget all blocks but the first `count`."""
        self._lines, self.done = self._lines[:count], self.done[:count]
        self.batch_tokens = self._lines[-1]["batch_tokens"] if self._lines else self.batch_tokens
        content = "".join(json.dumps(line) + "\n" for line in self._lines).encode()
        path = self.folder / "journal.jsonl"
        if path.exists() and path.read_bytes() != content:
            with whole_file(path) as file:
                file.write(content)


class FollowedJournal:
    """What the other processes of a shared run have in the place of the journal, which the leader writes."""

    keeps_hidden = False

    def __init__(self, done: int, batch_tokens: int | None) -> None:
        self.done: list[BlockRecord | None] = []
        self.batch_tokens: int | None = None
        self.follow(done, batch_tokens)

    def follow(self, done: int, batch_tokens: int | None) -> None:
        """The leader's journal holds `done` blocks."""
        self.done, self.batch_tokens = [None] * done, batch_tokens

    def hidden(self) -> dict[str, Tensor]:
        return {}

    def commit(self, tensors: object, record: BlockRecord, batch_tokens: int, **files: object) -> None:
        self.done.append(record)

    def settle(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """A line for each value in which two JSON documents differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted(before.keys() | now.keys()):
            found += differences(before.get(key), now.get(key), f"{place}.{key}" if place else key)
        return found
    return (
        []
        if before == now
        else [f"{place}: {shortened(json.dumps(before), 24)} there, {shortened(json.dumps(now), 24)} now"]
    )
