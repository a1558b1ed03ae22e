"""What a rounder returns."""

from dataclasses import dataclass

from ..numbers.grid import QuantizedLinear


@dataclass(frozen=True)
class Rounded:
    """A rounded weight. damp: the damping the solve ended with; None where there is no Hessian.

    note: what was done otherwise than asked, for the manifest; None where nothing was.
    """

    linear: QuantizedLinear
    damp: float | None = None
    note: str | None = None
