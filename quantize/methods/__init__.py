"""Rounders: a weight, its grid and what the calibration saw go in, a QuantizedLinear comes out. Transforms: scales do.

Plain dicts from the recipe's names to functions, and to classes for what is trained; tensors in, tensors out, no I/O.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ..numbers.grid import QuantizedLinear
from ..numbers.types import Grid
from ..recipe.methods import MethodSettings, TransformSettings
from .autoround import SignRound
from .awq import awq
from .gptq import gptq
from .qat import BlockAp
from .rounded import Rounded
from .rtn import rtn
from .scaling import Observed, Rounding, Scaling, Weights
from .smoothquant import smoothquant

__all__ = ["ROUNDERS", "TRANSFORMS", "TUNERS", "Rounded", "Tuner"]

Transformer = Callable[[Weights, Observed, TransformSettings, Rounding | None], Scaling]
Rounder = Callable[[Tensor, Grid, MethodSettings, Tensor | None, Tensor | None], Rounded]


class Tuner(Protocol):
    """One linear whose rounded weight is learned. weight [out, in] float32 is that of `result`, dequantized."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def result(self) -> QuantizedLinear: ...
    def step(self, gradient: Tensor, progress: float) -> None:
        """Follow the gradient [out, in] of the loss by `weight`; progress in [0, 1): the share of steps done."""


ROUNDERS: dict[str, Rounder] = {"rtn": rtn, "gptq": gptq}
TRANSFORMS: dict[str, Transformer] = {"smoothquant": smoothquant, "awq": awq}
TUNERS: Mapping[str, Callable[[Any, Tensor, QuantizedLinear], Tuner]] = {"autoround": SignRound, "qat": BlockAp}
