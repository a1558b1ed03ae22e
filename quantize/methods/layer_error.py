"""The error of a rounded linear, one definition for every method: from sums over the tokens or from the tokens."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .panels import panels

# What a linear's error is the error of. output_accumulated: its output, against the original linear's on the original
# model's inputs, so that what the layers before it have lost counts too. output_local: its output, against the original
# linear's on the same inputs. weight_by_importance: its weight, each column weighed by an importance matrix. weight.
ErrorMeasure = Literal["output_accumulated", "output_local", "weight_by_importance", "weight"]


@dataclass(frozen=True)
class LayerError:
    """error [out], power [out]: what is off, squared, and what it is a share of, for each row of the weight."""

    error: Tensor
    power: Tensor
    measure: ErrorMeasure

    def record(self, tokens: int) -> dict[str, Any]:
        """What the manifest says of it, over all rows. loss: squared error a token; None without tokens."""
        error, power = float(self.error.sum()), float(self.power.sum())
        return {
            "loss": error / tokens if tokens else None,
            "relative_error": error / power if power > 0 else 0.0,
            "error_measure": self.measure,
        }

    def rows(self, part: slice) -> "LayerError":
        return LayerError(self.error[part], self.power[part], self.measure)

    def __add__(self, other: "LayerError") -> "LayerError":
        """Over the tokens of both; accumulated only if both are."""
        measure = self.measure if self.measure == other.measure else "output_local"
        return LayerError(self.error + other.error, self.power + other.power, measure)


def layer_error(
    weight: Tensor,
    rounded: Tensor,
    moment: Tensor | None,
    drift: Tensor | None = None,
    drift_power: Tensor | None = None,
) -> LayerError:
    """The error of `rounded` Q in the place of `weight` W, both [out, in] float32, from sums over the tokens.

        relative error = ||X Q^T - X0 W^T||^2 / ||X0 W^T||^2

    X [tokens, in] is what the linear receives, X0 what it receives in the original model for the same tokens, taken to
    be X where that is not known. With H = X^T X (`moment`), D = X0 - X, M = D^T X (`drift`) and E = Q - W, row by row:

        ||x Q^T - x0 W^T||^2 = E H E^T - 2 W M E^T + ||D W^T||^2
        ||x0 W^T||^2         = W H W^T + 2 W M W^T + ||D W^T||^2

    The last term is `drift_power` [out]: no sum over X alone gives it. Without a moment the squares are those of the
    weights; where the moment is an importance matrix, columns [in], they are weighed by it.
    """
    off = rounded - weight
    error, power = output_power(off, moment), output_power(weight, moment)
    if moment is None or moment.dim() == 1:
        return LayerError(error, power, "weight" if moment is None else "weight_by_importance")
    if drift is None or drift_power is None:
        return LayerError(error, power, "output_local")
    moved = weight @ drift
    error += drift_power - 2 * (moved * off).sum(1)
    power += drift_power + 2 * (moved * weight).sum(1)
    # Where nearly all of the error is made up for, the roundings of the sums above are what is left of it.
    return LayerError(error.clamp_(min=0), power, "output_accumulated")


def layer_error_of_rows(weight: Tensor, rounded: Tensor, x: Tensor, original: Tensor | None) -> LayerError:
    """The same from X [tokens, in] and X0 themselves, float32; X0 is X where it is None."""
    wanted = (x if original is None else original) @ weight.T
    error, power = (x @ rounded.T - wanted).square().sum(0), wanted.square().sum(0)
    return LayerError(error, power, "output_local" if original is None else "output_accumulated")


def common_measure(measures: Iterable[str | None]) -> str | None:
    """The one that most of a run's layers have; None where no error is measured."""
    found = Counter(measure for measure in measures if measure is not None)
    return found.most_common(1)[0][0] if found else None


def output_power(weight: Tensor, moment: Tensor | None) -> Tensor:
    """Squared output of each row of `weight` [out, in] over the tokens in `moment`; its squared norm without one."""
    if moment is None or moment.dim() == 1:
        return (weight.square() if moment is None else weight.square().mul_(moment)).sum(1)
    power = weight.new_zeros(weight.shape[0])
    for part in panels(weight.shape[1]):  # the moment is symmetric: what is below its diagonal counts twice
        moved = torch.mm(weight[:, part], moment[part, part])
        moved.addmm_(weight[:, part.stop :], moment[part.stop :, part], alpha=2)
        power += moved.mul_(weight[:, part]).sum(1)
    return power
