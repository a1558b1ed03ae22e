"""A weight on disk, of which rows are read when they are asked for."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightRows:
    """A weight [out, in] = `shape` on the host, in `dtype`. read: gives rows of it, in any dtype."""

    shape: tuple[int, int]
    dtype: torch.dtype
    read: Callable[[slice], Tensor]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __getitem__(self, rows: slice) -> Tensor:
        return self.read(rows).to(self.dtype)
