"""Rounders: a weight, its grid and what the calibration saw go in, a QuantizedLinear comes out.

A plain dict from the recipe's `method.name` to a function; tensors in, tensors out, no I/O.
"""

from collections.abc import Callable

from torch import Tensor

from ..recipe import Grid, Method
from .gptq import gptq
from .rounded import Rounded
from .rtn import rtn

__all__ = ["ROUNDERS", "Rounded"]

Rounder = Callable[[Tensor, Grid, Method, Tensor | None, Tensor | None], Rounded]

ROUNDERS: dict[str, Rounder] = {"rtn": rtn, "gptq": gptq}
