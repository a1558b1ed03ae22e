"""Rounders: a weight, its grid and what the calibration saw go in, a QuantizedLinear comes out. Transforms: scales do.

Plain dicts from the recipe's names to functions; tensors in, tensors out, no I/O.
"""

from collections.abc import Callable

from torch import Tensor

from ..numbers.types import Grid
from ..recipe import Method, Transform
from .awq import awq
from .gptq import gptq
from .rounded import Rounded
from .rtn import rtn
from .scaling import Observed, Rounding, Scaling, Weights
from .smoothquant import smoothquant

__all__ = ["ROUNDERS", "TRANSFORMS", "Rounded"]

Transformer = Callable[[Weights, Observed, Transform, Rounding | None], Scaling]
Rounder = Callable[[Tensor, Grid, Method, Tensor | None, Tensor | None], Rounded]

ROUNDERS: dict[str, Rounder] = {"rtn": rtn, "gptq": gptq}
TRANSFORMS: dict[str, Transformer] = {"smoothquant": smoothquant, "awq": awq}
