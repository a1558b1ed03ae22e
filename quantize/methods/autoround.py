"""SignRound: rounding directions and group ranges trained by gradient steps."""

import torch
from torch import Tensor

from ..numbers.grid import QuantizedLinear
from ..recipe.methods import AutoRound
from .adam import Direction
from .fake_quant import FakeQuant, Trained, fake_quantize, storable

_REACH = 0.5  # bound of v, in grid steps
_CLIP = (0.5, 1.5)  # bounds of a and b
_RANGE_RATE = 0.2  # learning rate of a and b, relative to that of v


class SignRound(Trained):
    """SignRound (arXiv:2309.05516, 3.2) for one linear, starting from given codes.

    q = clip(round(w / s + v) + z), v in [-0.5, 0.5] [out, in]; a group's range [low, high] at the start
    is scaled by a and b: s = (b high - a low) / levels, z = round(-a low / s); symmetric grids keep their zero and
    s = b s0. v = 0, a = b = 1 reproduces the starting codes, because w is pulled towards them (`drawn`); a code changes
    only after several steps in one direction.
    """

    def __init__(self, settings: AutoRound, weight: Tensor, start: QuantizedLinear) -> None:
        super().__init__(weight, start)
        self._rate, self._levels = settings.first_rate, start.grid.levels
        self._low, self._high = -self._zero * self._scale, (self._levels - self._zero) * self._scale
        self._offset = torch.zeros_like(self._latent)
        self._a, self._b = torch.ones_like(self._scale), torch.ones_like(self._scale)
        self._moves = tuple(Direction(x) for x in (self._offset, self._a, self._b))
        self._now = self._forward()

    def step(self, gradient: Tensor, progress: float) -> None:
        """One step down the gradient [out, in] of the loss by `weight`, of at most lr * (1 - progress).

        The paper steps by the sign of each batch's gradient. From GPTQ's codes, whose errors compensate each other,
        that raises the error of some blocks, since all weights of a row step at once; Adam's direction, which is small
        where batches disagree, and a lower rate for ranges lower it.
        """
        rate = self._rate * (1 - progress)
        offset, a, b = (m.follow(g) for m, g in zip(self._moves, self._gradients(gradient), strict=True))
        self._offset.sub_(offset, alpha=rate).clamp_(-_REACH, _REACH)
        self._a.sub_(a, alpha=rate * _RANGE_RATE).clamp_(*_CLIP)
        self._b.sub_(b, alpha=rate * _RANGE_RATE).clamp_(*_CLIP)
        self._now = self._forward()

    def _forward(self) -> FakeQuant:
        scale, zero = self._range()
        return fake_quantize(self._latent, self._offset, scale, zero, self._levels)

    def _range(self) -> tuple[Tensor, Tensor]:
        dtype = self._start.scales.dtype
        if self._start.grid.symmetric:
            return storable(self._scale * self._b, dtype), self._zero
        scale = storable((self._b * self._high - self._a * self._low) / self._levels, dtype)
        return scale, (-self._a * self._low / scale).round_().clamp_(0, self._levels)

    def _gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By v, a and b; rounding a scale to its stored dtype and a zero to a whole number counts as the identity."""
        now = self._now
        by_offset, by_scale, by_zero = now.gradients(gradient)
        if self._start.grid.symmetric:
            return by_offset, torch.zeros_like(by_scale), by_scale * self._scale
        by_scale = by_scale + by_zero * self._a * self._low / now.scale.square()
        by_a = -by_scale * self._low / self._levels - by_zero * self._low / now.scale
        return by_offset, by_a, by_scale * self._high / self._levels
