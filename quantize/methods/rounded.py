"""What a rounder returns."""

from dataclasses import dataclass

from torch import Tensor

from ..numbers.grid import QuantizedLinear


@dataclass(frozen=True)
class Rounded:
    """A rounded weight. damp: the damping the solve ended with; None where there is no Hessian.

    note: for the manifest, what was not done as asked; None where all was. Where the solve knows them: weight
    [out, in], as the linear dequantizes, and off_power [out], what `output_power` gives for it less the original.
    """

    linear: QuantizedLinear
    damp: float | None = None
    note: str | None = None
    weight: Tensor | None = None
    off_power: Tensor | None = None
