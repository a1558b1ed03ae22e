"""The error of a rounded linear, one definition for every method: from sums over the tokens or from the tokens."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.products import tf32_products
from .symmetric_products import panels

# What the error of a linear is measured on. output_accumulated: its output on the inputs it now gets, against the
# original linear's output on the original model's inputs, so that errors of the layers before count too. output_local:
# both on the inputs it now gets. weight_by_importance: the weight, columns weighted by an importance matrix. weight.
ErrorMeasure = Literal["output_accumulated", "output_local", "weight_by_importance", "weight"]


@dataclass(frozen=True)
class LayerError:
    """error [out]: squared error by row of the weight; power [out]: the squares that the error is a share of."""

    error: Tensor
    power: Tensor
    measure: ErrorMeasure

    def record(self, tokens: int) -> dict[str, Any]:
        """The fields of the manifest's record, over all rows."""
        return error_fields(float(self.error.sum()), float(self.power.sum()), self.measure, tokens)

    def rows(self, part: slice) -> "LayerError":
        return LayerError(self.error[part], self.power[part], self.measure)

    def __add__(self, other: "LayerError") -> "LayerError":
        """The error over the tokens of both; output_local unless both are accumulated."""
        measure = self.measure if self.measure == other.measure else "output_local"
        return LayerError(self.error + other.error, self.power + other.power, measure)


def error_fields(error: float, power: float, measure: ErrorMeasure, tokens: int) -> dict[str, Any]:
    """The fields of a manifest's record, from sums over all rows. loss: squared error per token, if any."""
    return {
        "loss": error / tokens if tokens else None,
        "relative_error": error / power if power > 0 else 0.0,
        "error_measure": measure,
    }


def layer_error(
    weight: Tensor,
    rounded: Tensor,
    moment: Tensor | None,
    drift: Tensor | None = None,
    drift_power: Tensor | None = None,
    moved: Tensor | None = None,
    off_power: Tensor | None = None,
) -> LayerError:
    """The error of `rounded` Q in place of `weight` W, both [out, in] float32, from sums over the tokens.

        relative error = ||X Q^T - X0 W^T||^2 / ||X0 W^T||^2

    X [tokens, in] are the linear's inputs, X0 the same tokens' inputs in the original model; X0 = X where they are not
    known. With H = X^T X (`moment`), D = X0 - X, M = D^T X (`drift`) and E = Q - W, for each row e, w of E, W:

        ||X q - X0 w||^2 = e H e^T - 2 w M e^T + ||D w||^2
        ||X0 w||^2       = w H w^T + 2 w M w^T + ||D w||^2

    `drift_power` [out] is the last term, which H and M do not determine. moved = W M [out, in] may be given in M's
    place, and off_power = e H e^T [out] where it is known. Without a moment the error is that of the
    weight itself; a moment [in], an importance matrix, weights its columns.
    """
    off = rounded - weight
    error, power = output_power(off, moment) if off_power is None else off_power, output_power(weight, moment)
    if moment is None or moment.dim() == 1:
        return LayerError(error, power, "weight" if moment is None else "weight_by_importance")
    if moved is None and drift is not None:
        moved = weight @ drift
    if moved is None or drift_power is None:
        return LayerError(error, power, "output_local")
    error = error + drift_power - 2 * (moved * off).sum(1)
    power += drift_power + 2 * (moved * weight).sum(1)
    # Where the parts cancel almost fully, their own rounding may leave less than nothing.
    return LayerError(error.clamp_(min=0), power, "output_accumulated")


def layer_error_of_rows(weight: Tensor, rounded: Tensor, x: Tensor, original: Tensor | None) -> LayerError:
    """As `layer_error`, from x = X [tokens, in] and original = X0 themselves, float32; X0 = X where it is None."""
    wanted = (x if original is None else original) @ weight.T
    error, power = (x @ rounded.T - wanted).square().sum(0), wanted.square().sum(0)
    return LayerError(error, power, "output_local" if original is None else "output_accumulated")


def common_measure(measures: Iterable[str | None]) -> str | None:
    """The error measure of most layers of a run; None where no error was measured."""
    found = Counter(measure for measure in measures if measure is not None)
    return found.most_common(1)[0][0] if found else None


def output_power(weight: Tensor, moment: Tensor | None) -> Tensor:
    """Squared output of each row of `weight` [out, in], summed over the tokens of `moment`; without one, of the row.

    A GPU multiplies in TF32, whose roundings even out in the sum.
    """
    if moment is None or moment.dim() == 1:
        return (weight.square() if moment is None else weight.square().mul_(moment)).sum(1)
    power = weight.new_zeros(weight.shape[0])
    with tf32_products():
        for part in panels(weight.shape[1]):  # the moment is symmetric: what is below its diagonal counts twice
            moved = torch.mm(weight[:, part], moment[part, part])
            moved.addmm_(weight[:, part.stop :], moment[part.stop :, part], alpha=2)
            power += moved.mul_(weight[:, part]).sum(1)
    return power


def output_powers(weight: Tensor, moment: Tensor) -> Tensor:
    """`output_power` of several linears of one shape on a GPU: weight [linears, out, in], moment [linears, in, in].

    Returns [linears, out]. Weights of 16 bits are exact in TF32; the moment is shortened to 10 bits, and its roundings
    even out in the sum.
    """
    w = weight.to(moment.dtype)
    power = torch.zeros(w.shape[:2], dtype=w.dtype, device=w.device)
    with tf32_products():
        for part in panels(w.shape[2]):
            moved = torch.bmm(w[:, :, part], moment[:, part, part])
            moved = torch.baddbmm(moved, w[:, :, part.stop :], moment[:, part.stop :, part], alpha=2)
            power += moved.mul_(w[:, :, part]).sum(-1)
    return power
