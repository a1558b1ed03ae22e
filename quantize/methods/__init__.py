"""Rounding methods and transforms by their names in a recipe: tensors in, tensors out, no I/O.

A rounder takes a weight, its grid and the second moment of its inputs, and returns a QuantizedLinear; a transform
returns a scale for each input channel; a tuner trains the rounded weight of one linear.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.machine import runs_triton
from ..core.plugins import Table
from ..numbers.grid import QuantizedLinear
from ..numbers.types import Grid
from ..plugin import MethodSettings
from ..recipe.methods import TransformSettings
from .autoround import SignRound
from .awq import awq
from .channel_scales import Observed, Rounding, Scaling, Weights
from .gptq import gptq
from .qat import BlockAp
from .rounded import Rounded
from .rtn import rtn
from .smoothquant import smoothquant

__all__ = ["ROUNDERS", "TRANSFORMS", "TUNERS", "Rounded", "Tuner", "solves_batches"]

Transformer = Callable[[Weights, Observed, TransformSettings, Rounding | None], Scaling]
Rounder = Callable[[Tensor, Grid, MethodSettings, Tensor | None, Tensor | None], Rounded]


class Tuner(Protocol):
    """One linear whose rounded weight is trained; `weight` [out, in] float32 is `result` dequantized."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def result(self) -> QuantizedLinear: ...
    def step(self, gradient: Tensor, progress: float) -> None:
        """Take one step; `gradient` [out, in] is the loss's by `weight`, progress in [0, 1) the share of steps done."""


def solves_batches(method: MethodSettings, device: torch.device) -> bool:
    """Whether `gptq_batch` takes the place of the rounder: for GPTQ on a GPU, where Triton is installed."""
    return method.name == "gptq" and runs_triton(device)


ROUNDERS: Table[Rounder] = Table("quantpress.rounders", {"rtn": rtn, "gptq": gptq})
TRANSFORMS: dict[str, Transformer] = {"smoothquant": smoothquant, "awq": awq}
TUNERS: Mapping[str, Callable[[Any, Tensor, QuantizedLinear], Tuner]] = {"autoround": SignRound, "qat": BlockAp}
