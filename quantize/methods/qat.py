"""Block-AP of EfficientQAT: weights, scales and zeros of one linear trained through the rounding."""

from torch import Tensor

from ..numbers.grid import QuantizedLinear
from ..recipe.methods import Qat
from .adam import Direction
from .fake_quant import FakeQuant, Trained, fake_quantize, storable


class BlockAp(Trained):
    """Block-AP (arXiv:2407.11062, 3.2) for one linear, starting from given codes.

    q = clip(round(w / s) + round(z)); w [out, in], s and z [out, groups] are trained in float32; s and z are
    rounded to their stored values wherever they are used. Symmetric grids keep their zero.
    """

    def __init__(self, settings: Qat, weight: Tensor, start: QuantizedLinear) -> None:
        super().__init__(weight, start)
        self._weight_rate, self._quant_rate = settings.weight_rate, settings.quant_rate
        # The grid step at the start, the unit of the rates; 0 for a group of zeros, which stays as it is.
        self._unit = self._scale * self._latent.any(2, keepdim=True)
        self._directions = tuple(Direction(x) for x in (self._latent, self._scale, self._zero))
        self._now = self._forward()

    def step(self, gradient: Tensor, progress: float) -> None:
        """One Adam step with the loss's gradient [out, in] by `weight`; the rates decay linearly to 0.

        The paper's rates are absolute. Here they are relative to each group's grid step, so that one rate fits linears
        and models whose weights differ in size.
        """
        left = 1 - progress
        by_position, by_scale, by_zero = self._now.gradients(gradient)
        by_weight = by_position / self._now.scale
        weight, scale, zero = (
            d.follow(g) for d, g in zip(self._directions, (by_weight, by_scale, by_zero), strict=True)
        )
        self._latent.sub_(weight.mul_(self._unit), alpha=self._weight_rate * left)
        self._scale.sub_(scale.mul_(self._unit), alpha=self._quant_rate * left)
        if not self._start.grid.symmetric:
            self._zero.sub_(zero, alpha=self._quant_rate * left).clamp_(0, self._start.grid.levels)
        self._now = self._forward()

    def _forward(self) -> FakeQuant:
        scale = storable(self._scale, self._start.scales.dtype)
        return fake_quantize(self._latent, 0.0, scale, self._zero.round(), self._start.grid.levels)
