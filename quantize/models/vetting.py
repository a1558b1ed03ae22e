"""A checkpoint's files read once: their SHA-256, and whether a weight in them is NaN, inf or too large to be rounded.

Several files are read at once, by threads that the caller need not wait for while it does something else. Where they
keep ahead of what else reads the weights, these come from the system's memory and not from the disk again.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import MappingProxyType

import torch
from torch import Tensor

from ..core.errors import BadInput
from .checkpoint import Checkpoint, Stored

_PIECE = 1 << 22  # bytes read at a time: a whole number of values of every dtype
_THREADS = 8
MOST_OF_FLOAT16 = torch.finfo(torch.float16).max
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Damaged(BadInput):
    """A weight of the checkpoint is NaN, inf or too large to be rounded."""


@dataclass(frozen=True)
class Fault:
    """What makes a tensor useless. of_dtype: a wrong dtype in config.json may be the cause."""

    what: str
    of_dtype: bool = False

    def __str__(self) -> str:
        return self.what


_NAN = Fault("NaN")


class Vetting:
    """The files of a checkpoint being read. limits: the largest value that a tensor may hold, where it has a limit."""

    def __init__(self, pool: ThreadPoolExecutor, checkpoint: Checkpoint, limits: Mapping[str, float]) -> None:
        self._checkpoint, self._stop = checkpoint, Event()
        self._files: dict[Path, Future[tuple[str, dict[str, Fault]]]] = {
            path: pool.submit(_read, path, entries, limits, self._stop) for path, entries in checkpoint.layout().items()
        }

    def marks(self) -> dict[str, str]:
        """As `hashes`, but of the weights' files only when they were written and how large they are, at once."""
        found = [(path, path.stat()) for path in self._files]
        return self._checkpoint.file_hashes({path: f"{at.st_mtime_ns} ns, {at.st_size} bytes" for path, at in found})

    def check(self) -> None:
        """As `hashes` raises it, if a file that has been read by now holds such a weight; otherwise without waiting."""
        if any(future.done() and (future.exception() or future.result()[1]) for future in self._files.values()):
            self.hashes()

    def hashes(self) -> dict[str, str]:
        """As `Checkpoint.file_hashes`. Raises Damaged for a weight that is, of several the first by name."""
        done = {path: future.result() for path, future in self._files.items()}
        found = {name: kind for _, kinds in done.values() for name, kind in kinds.items()}
        for name in self._checkpoint.names():
            kind = found.get(name)
            if kind is None and self._checkpoint.is_packed(name):
                kind = not_finite(self._checkpoint.read(name))
            if kind is not None:
                wrong = "is its dtype in config.json right?" if kind.of_dtype else "the checkpoint is damaged"
                raise Damaged(f"{self._checkpoint.file_of(name)}: {name} holds {kind}; {wrong}")
        if found:  # a scale of a quantized checkpoint
            name = min(found)
            raise Damaged(f"{self._checkpoint.folder}: {name} holds {found[name]}; the checkpoint is damaged")
        return self._checkpoint.file_hashes({path: digest for path, (digest, _) in done.items()})

    def stop(self) -> None:
        """Have the threads leave what they are at."""
        self._stop.set()
        for future in self._files.values():
            future.cancel()
        wait(self._files.values())


@contextmanager
def vetting(checkpoint: Checkpoint, limits: Mapping[str, float] = MappingProxyType({})) -> Iterator[Vetting]:
    """Read the files of `checkpoint` meanwhile; limits: see `Vetting`."""
    threads = min(_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        begun = Vetting(pool, checkpoint, limits)
        try:
            yield begun
        finally:
            begun.stop()


def all_finite(values: Tensor) -> bool:
    """Whether no value of a float tensor is NaN or inf; twenty times faster than `torch.isfinite`."""
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


def not_finite(tensor: Tensor, limit: float = math.inf) -> Fault | None:
    """What makes a float tensor useless: NaN, inf, or a value beyond `limit`; None where nothing does."""
    if not tensor.numel():
        return None
    least, most = map(float, tensor.aminmax())  # both are NaN where a value is
    largest = max(-least, most)
    if math.isnan(largest):
        return _NAN
    if math.isinf(largest):
        return Fault("inf")
    if largest <= limit:
        return None
    of_float16 = limit == MOST_OF_FLOAT16
    what = "cannot be held in float16" if of_float16 else "cannot be rounded"
    return Fault(f"{largest:.6g}, and more than {limit:.6g} {what}", of_float16)


def _read(
    path: Path, entries: Sequence[tuple[str, Stored]], limits: Mapping[str, float], stop: Event
) -> tuple[str, dict[str, Fault]]:
    """The SHA-256 of a file, and what makes weights in it useless, by name. entries: in byte order."""
    digest, found = hashlib.sha256(), dict[str, Fault]()
    buffer = torch.empty(_PIECE, dtype=torch.uint8)
    with open(path, "rb", buffering=0) as file:

        def following(size: int) -> Iterator[Tensor]:
            while size and not stop.is_set():
                piece = buffer[: min(size, _PIECE)]
                n = 0
                while n < len(piece):
                    more = file.readinto(piece[n:].numpy().data)
                    if not more:
                        raise BadInput(f"{path}: the file ended early; it was truncated after it was opened")
                    n += more
                digest.update(piece.numpy().data)
                size -= len(piece)
                yield piece

        for name, entry in entries:
            for _ in following(entry.start - file.tell()):
                pass
            for piece in following(entry.size):
                if (
                    entry.dtype in _FLOATS
                    and found.get(name) != _NAN
                    and (kind := not_finite(piece.view(entry.dtype), limits.get(name, math.inf)))
                ):
                    found[name] = kind
        for _ in following(os.fstat(file.fileno()).st_size - file.tell()):
            pass
    return digest.hexdigest(), found
