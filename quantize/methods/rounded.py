"""What a rounder returns."""

from dataclasses import dataclass

from ..numbers.grid import QuantizedLinear


@dataclass(frozen=True)
class Rounded:
    """A rounded weight. damp: the damping the solve ended with; None where there is no Hessian.

    note: for the manifest, what was not done as asked; None where all was.
    """

    linear: QuantizedLinear
    damp: float | None = None
    note: str | None = None
