"""What a rounder returns."""

from dataclasses import dataclass

from torch import Tensor

from ..numbers.grid import QuantizedLinear


@dataclass(frozen=True)
class Rounded:
    """A rounded weight with the error it makes, row by row, so that stacked linears can be taken apart.

    error [out], power [out]: squared output error and squared output summed over the calibration tokens; without
    calibration, of the weights themselves. damp: the damping the solve ended with; None where there is no Hessian.
    note: what was done otherwise than asked, for the manifest; None where nothing was.
    """

    linear: QuantizedLinear
    error: Tensor
    power: Tensor
    damp: float | None = None
    note: str | None = None
