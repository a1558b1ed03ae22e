"""What the runs of many recipes on one model all need: computed by the first, read by the rest, which write the same
bytes as alone.

That is the calibration tokens, the importance matrix of a GGUF file, and the activations of the original model. The
latter are what error correction and tuning run the original beside the rounded model for; they take the most disk, so
they are kept block after block until `limit` is reached. Second moments are each recipe's own: they are measured behind
the blocks that it has rounded already.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..calibrate.stages import Beside, Group, Run
from ..calibrate.tokens import Tokens
from ..core.files import file_sha256, fingerprint, whole_folder
from ..core.machine import describe
from ..gguf import imatrix
from ..recipe import Hadamard, Recipe
from .plan import size

if TYPE_CHECKING:
    from .job import Job

_OUTPUT = "output"  # what the block hands on, beside what its linears receive


@dataclass(frozen=True)
class Shared:
    """A folder that runs share; without one each computes all of it, as a run alone does.

    limit: bytes of the original's activations, at most; half of what is free on the disk is left in any case.
    """

    folder: Path | None = None
    limit: int = 0
    on_note: Callable[[str], None] = lambda line: None

    def tokens(self, job: "Job", make: Callable[[], Tokens]) -> Tokens:
        """The calibration tokens of the recipe; a text from the hub is looked up once, so all runs get the same."""
        if self.folder is None:
            return make()
        wanted, text = job.recipe.calibration, Path(job.recipe.calibration.source).expanduser()
        here = file_sha256(text) if text.is_file() else None
        place = self.folder / "tokens" / _digest(_model(job) | {"text": wanted.model_dump(mode="json"), "file": here})
        if not place.is_dir():
            made = make()
            with whole_folder(place) as new:
                told = {"source": made.source, "bos": json.dumps(made.bos)}
                save_file({"ids": made.ids.contiguous()}, new / "tokens.safetensors", metadata=told)
        with safe_open(place / "tokens.safetensors", "pt") as file:
            told = file.metadata()
            return Tokens(file.get_tensor("ids"), told["source"], json.loads(told["bos"]))

    def importance(
        self, job: "Job", tokens: Tokens, make: Callable[[], dict[str, imatrix.Importance]]
    ) -> dict[str, imatrix.Importance]:
        """The importance matrix of these tokens."""
        if self.folder is None:
            return make()
        place = self.folder / "imatrix" / _digest(_original(job, tokens))
        if not place.is_dir():
            made = make()
            with whole_folder(place) as new:
                imatrix.save(new / "imatrix.gguf", made, tokens.source, tokens.ids.shape[1])
        return imatrix.load(place / "imatrix.gguf")

    def original(self, job: "Job", tokens: Tokens | None) -> "Original | None":
        """The original's activations; None where they are not shared.

        They are not where the recipe does not run the original, and where a transform scales what its linears receive
        by what this recipe made of the blocks before.
        """
        if self.folder is None or tokens is None or not _runs_the_original(job.recipe):
            return None
        return Original(self, self.folder / "original" / _digest(_original(job, tokens)), job)


class Original:
    """What the original model sends to the linears of each block, and hands on to the next one."""

    def __init__(self, shared: Shared, folder: Path, job: "Job") -> None:
        self._shared, self._folder = shared, folder
        self._dtype, self._device = job.skeleton.dtype, job.skeleton.device
        self._widths = {linear.name: linear.in_features for linear in job.linears}
        self._full = False

    def block(self, k: int, whole: bool) -> Beside:
        """For `Stages`: what was kept of block `k`, or the original itself, recorded on its way.

        whole: whether it is run to its end; of the last block, some recipes do not need that.
        """

        def beside(groups: Sequence[Group], parts: Sequence[Tensor], make: Callable[[], list[Run]]) -> Sequence[Run]:
            place = self._folder / f"{k:05d}{'' if whole else '-inputs'}"
            if place.is_dir():
                index = json.loads((place / "index.json").read_text(encoding="utf-8"))
                if all(group[0] in index for group in groups):
                    files = {name: place / file for name, file in index.items()}
                    return [_Kept(files, self._dtype, self._device, parts, i) for i in range(len(parts))]
                return make()
            rows = sum(part.shape[:2].numel() for part in parts)
            columns = sum(self._widths[group[0]] for group in groups) + (parts[0].shape[2] if whole else 0)
            if not self._has_room(rows * columns * self._dtype.itemsize, k):
                return make()
            recorder = _Recorder(place, groups, len(parts), whole)
            return [_Recorded(run, part, recorder) for run, part in zip(make(), parts, strict=True)]

        return beside

    def _has_room(self, count: int, k: int) -> bool:
        assert self._shared.folder is not None
        self._shared.folder.mkdir(parents=True, exist_ok=True)
        used = sum(file.stat().st_size for file in self._shared.folder.glob("original/**/*") if file.is_file())
        room = min(self._shared.limit - used, shutil.disk_usage(self._shared.folder).free // 2)
        if count > room and not self._full:
            self._full = True
            self._shared.on_note(
                f"the original's activations are kept for other runs up to block {k}: the next takes {size(count)} and "
                f"{size(max(0, room))} are left"
            )
        return not self._full


class _Recorder:
    """Writes what the original sends to each group, batch after batch; the folder is there once it is whole."""

    def __init__(self, place: Path, groups: Sequence[Group], batches: int, whole: bool) -> None:
        self._context: AbstractContextManager[Path] | None = whole_folder(place)
        self._folder = self._context.__enter__()
        self._files: dict[str, BinaryIO] = {}
        self._index = {name: f"{i}.bin" for i, group in enumerate(groups) for name in group} | {_OUTPUT: "output.bin"}
        self.tensors = len(groups) + whole  # of a batch
        self._missing = batches * self.tensors

    def write(self, name: str, x: Tensor) -> None:
        """Append a batch of what `name` receives; they come in their order."""
        if name not in self._files:
            self._files[name] = (self._folder / self._index[name]).open("wb")
        self._files[name].write(x.contiguous().cpu().view(torch.uint8).numpy().data)
        self._missing -= 1
        if not self._missing and self._context is not None:
            self._close()
            (self._folder / "index.json").write_text(json.dumps(self._index), encoding="utf-8")
            self._context.__exit__(None, None, None)
            self._context = None

    def drop(self) -> None:
        """Leave nothing behind if it is not whole."""
        if self._context is not None:
            self._close()
            stopped = InterruptedError()
            self._context.__exit__(type(stopped), stopped, None)
            self._context = None

    def _close(self) -> None:
        for file in self._files.values():
            file.close()


class _Recorded:
    """A batch of the original on its way through the block, which is written down."""

    def __init__(self, run: Run, part: Tensor, recorder: _Recorder) -> None:
        self._run, self._part, self._recorder = run, part, recorder
        self._missing = recorder.tensors

    def advance(self, name: str) -> Tensor:
        x = self._run.advance(name)
        self._write(name, x)
        return x

    def finish(self) -> None:
        self._run.finish()
        self._write(_OUTPUT, self._part)

    def drop(self) -> None:
        self._run.drop()
        if self._missing:
            self._recorder.drop()

    def _write(self, name: str, x: Tensor) -> None:
        self._recorder.write(name, x)
        self._missing -= 1


class _Kept:
    """A batch of the original that has been through the block before: part [samples, seq_len, hidden] of `parts`."""

    def __init__(
        self, files: Mapping[str, Path], dtype: torch.dtype, device: torch.device, parts: Sequence[Tensor], i: int
    ) -> None:
        self._files, self._dtype, self._device, self._part = files, dtype, device, parts[i]
        self._first = sum(part.shape[:2].numel() for part in parts[:i])
        self._rows = parts[i].shape[:2].numel()
        self._all = sum(part.shape[:2].numel() for part in parts)

    def advance(self, name: str) -> Tensor:
        return self._read(name).to(self._device)

    def finish(self) -> None:
        self._part.copy_(self._read(_OUTPUT).view(self._part.shape))

    def drop(self) -> None:
        pass

    def _read(self, name: str) -> Tensor:
        """Rows of this batch, read rather than mapped: mapped pages would count as this run's memory."""
        path = self._files[name]
        a_row = path.stat().st_size // self._all
        buffer = bytearray(self._rows * a_row)
        with path.open("rb") as file:
            file.seek(self._first * a_row)
            assert file.readinto(buffer) == len(buffer), path
        return torch.frombuffer(buffer, dtype=self._dtype).view(self._rows, -1)


def kept_bytes(job: "Job") -> int:
    """Bytes of the original's activations that a sweep of this recipe keeps where its limit allows; 0 for none."""
    recipe, family, columns = job.recipe, job.skeleton.family, 0
    if not _runs_the_original(recipe):
        return 0
    for k in range(job.skeleton.n_blocks):
        inputs: dict[tuple[str, ...], int] = {}
        for linear in job.linears:
            routed = family.experts is not None and linear.module.startswith(f"{family.experts}.")
            if linear.block == k and job.schemes[linear.name] is not None and not routed:
                feeds = (feed.into for feed in family.feeds if linear.module in feed.into)
                inputs[next(feeds, (linear.module,))] = linear.in_features
        columns += sum(inputs.values())
        if recipe.tuned or k + 1 < job.skeleton.n_blocks:
            columns += int(job.skeleton.config.hidden_size)
    return recipe.calibration.samples * recipe.calibration.seq_len * columns * job.skeleton.dtype.itemsize


def _runs_the_original(recipe: Recipe) -> bool:
    """Whether the original runs beside the rounded model, with weights that this recipe alone does not change."""
    return recipe.paired and all(isinstance(transform, Hadamard) for transform in recipe.transforms)


def _original(job: "Job", tokens: Tokens) -> dict[str, Any]:
    """All that the original's activations depend on, to the last bit."""
    seeds = [transform.seed for transform in job.recipe.transforms if isinstance(transform, Hadamard)]
    return _model(job) | {"tokens": tokens.sha256, "shape": list(tokens.ids.shape), "rotation": seeds}


def _model(job: "Job") -> dict[str, Any]:
    return {
        "model": fingerprint(job.checkpoint.folder),
        "quantpress": version("quantpress"),
        "torch": torch.__version__,
        "device": describe(job.skeleton.device)["device"],
        "threads": torch.get_num_threads(),
        "dtype": str(job.skeleton.dtype),
    }


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
