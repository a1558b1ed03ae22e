"""Copies between the host's memory and a device: on a GPU they overlap its work, elsewhere they are plain copies.

A GPU copies beside its work only from and to pinned host memory, and on another stream than the work's.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor


class Transfers:
    """Copies to and from `device` on a stream of their own, in the order in which they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the device."""
        return tensor.device.type == self.device.type

    def fetch(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Start to bring tensors to the device. The result gives them to the stream on which it is called.

        From memory that is not pinned they are copied into pinned memory first; so call this in a thread.
        """
        stream = self._stream
        if stream is None:
            return lambda: {name: tensor.to(self.device) for name, tensor in tensors.items()}
        with torch.cuda.stream(stream):
            there = {name: _pinned(tensor).to(self.device, non_blocking=True) for name, tensor in tensors.items()}
            arrived = stream.record_event()

        def get() -> dict[str, Tensor]:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(arrived)
            for tensor in there.values():
                if tensor.is_cuda:
                    tensor.record_stream(now)
            return there

        return get

    def store(self, values: Tensor, into: Tensor) -> None:
        """Copy what the current stream is computing into a tensor of the same shape; settled after `settle`."""
        stream = self._stream
        if stream is None or self.has(into):
            into.copy_(values)
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            into.copy_(values, non_blocking=True)
        values.record_stream(stream)

    def hand_over(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Tensors as the current stream leaves them, for another thread, which calls the result.

        From then on that thread works on the stream of the copies: it waits for nothing that is asked for later.
        """
        stream = self._stream
        if stream is None:
            return lambda: dict(tensors)
        made = torch.cuda.current_stream(self.device).record_event()

        def get() -> dict[str, Tensor]:
            torch.cuda.set_stream(stream)
            stream.wait_event(made)
            return dict(tensors)

        return get

    def settle(self) -> None:
        """Wait until all copies are done."""
        if self._stream is not None:
            self._stream.synchronize()


def host_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in the host's memory; pinned where `device` is a GPU and the system lets so much be pinned."""
    if device.type == "cuda":
        with suppress(RuntimeError):
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    return torch.empty(tuple(shape), dtype=dtype)


def file_empty(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor in a file below `folder` that has no name any more, mapped into memory: the system keeps in memory what
    there is room for. Raises OSError where the disk is full; all of its room is taken at once.
    """
    count = math.prod(shape)
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=folder, prefix=".states-") as file:
        if sys.platform == "linux":  # elsewhere a disk that fills up later ends the process
            os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(tuple(shape))


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory; the tensor itself, which takes a GPU longer to copy, where that is not to be had."""
    if tensor.is_cuda or tensor.is_pinned():
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor
