"""An artifact folder read back from disk: what is evaluated is what a server would load."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .formats import FORMATS, detect
from .grid import Grid, QuantizedLinear


class Artifact:
    """A quantized or plain checkpoint that looks plain: quantized weights are dequantized as they are read.

    linears: the grid of each quantized linear by its on-disk name, in the checkpoint's order.
    """

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, int]], transposed: frozenset[str] = frozenset()):
        """`shapes` {name: (out, in)}: the linears of the model; `transposed`: those kept [in, out] (Conv1D)."""
        self.checkpoint = Checkpoint(folder)
        self.config: dict[str, Any] = self.checkpoint.config
        self.format = detect(self.config)
        self._shapes, self._transposed = shapes, transposed
        self.linears: dict[str, Grid] = {}
        if self.format is not None:
            grids = FORMATS[self.format].grids(self.config["quantization_config"], list(shapes))
            self.linears = {n: g for n, g in grids.items() if g is not None and f"{n}.weight" not in self.checkpoint}

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint or str(name).removesuffix(".weight") in self.linears

    def linear(self, name: str) -> QuantizedLinear:
        """The unpacked record of a quantized linear."""
        assert self.format is not None
        return FORMATS[self.format].unpack(name, self.checkpoint.read, self.linears[name], self._shapes[name])

    def read(self, name: str) -> Tensor:
        """A tensor as the plain model holds it."""
        linear = name.removesuffix(".weight")
        if linear not in self.linears:
            return self.checkpoint.read(name)
        weight = self.linear(linear).dequantize(self.dtype)
        return weight.T.contiguous() if linear in self._transposed else weight

    @property
    def dtype(self) -> torch.dtype:
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        dtype: torch.dtype = getattr(torch, str(name).removeprefix("torch."))
        return dtype
