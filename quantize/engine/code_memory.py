"""Memory for the codes of one block after another: what the system gives anew costs a page fault for every page."""

from collections.abc import Iterable

import torch
from torch import Tensor


class CodeMemory:
    """Memory that is lent to a block's codes, and to a later block's once nothing uses it."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, int], list[Tensor]] = {}
        self._lent: list[Tensor] = []
        self._written: list[Tensor] = []

    def take(self, shape: tuple[int, int]) -> Tensor:
        """Memory [out, in] uint8 with any content."""
        free = self._free.get(shape)
        self._lent.append(free.pop() if free else torch.empty(shape, dtype=torch.uint8))
        return self._lent[-1]

    def settle(self, written: Iterable[Tensor]) -> None:
        """The block is done: what was lent is free, but for what lies in a tensor that is `written` from now on; that
        is free at the next call, when it has been.
        """
        places = {tensor.untyped_storage().data_ptr() for tensor in written}
        free = self._written
        self._written = [one for one in self._lent if one.data_ptr() in places]
        free += [one for one in self._lent if one.data_ptr() not in places]
        self._lent = []
        for one in free:
            self._free.setdefault((one.shape[0], one.shape[1]), []).append(one)
