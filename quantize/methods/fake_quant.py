"""Fake quantization: the rounded weight of the forward pass and its straight-through gradient.

In the backward pass rounding counts as the identity, clipping as clipping (Bengio et al., arXiv:1308.3432). Written by
hand, because autograd would keep half a dozen tensors the size of the weight for each linear of the block.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..numbers.fitting import SMALLEST_SCALE
from ..numbers.grid import QuantizedLinear

_SHARE = 0.8  # share of its distance to its code that a latent weight keeps


@dataclass(frozen=True)
class FakeQuant:
    """A weight rounded once: codes and inside [out, groups, columns], scale and zero [out, groups, 1], float32.

    inside is 1 where the code was not clipped, 0 where it was; position is weight / scale.
    """

    codes: Tensor
    inside: Tensor
    position: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def weight(self) -> Tensor:
        """What QuantizedLinear.dequantize gives for these codes, [out, in] float32."""
        return ((self.codes - self.zero) * self.scale).flatten(1)

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the loss by weight / scale, scale and zero, from its `gradient` [out, in] by `weight`.

        q = clip(round(w / s) + z). Not clipped, the weight's derivative is s by w / s, (q - z) - w / s by s, 0 by z;
        clipped, it is 0, q - z and -s.
        """
        g = gradient.view_as(self.codes)
        by_position = g * self.inside * self.scale
        by_scale = (g * (self.codes - self.zero - self.inside * self.position)).sum(2, keepdim=True)
        by_zero = (g * (self.inside - 1)).sum(2, keepdim=True) * self.scale
        return by_position, by_scale, by_zero

    def stored(self, like: QuantizedLinear) -> QuantizedLinear:
        """These codes as a record, on the grid and in the dtypes of `like`."""
        scales, zeros = self.scale.squeeze(2).to(like.scales.dtype), self.zero.squeeze(2).to(torch.uint8)
        return replace(like, codes=self.codes.flatten(1).to(torch.uint8), scales=scales, zeros=zeros)


def fake_quantize(weight: Tensor, offset: Tensor | float, scale: Tensor, zero: Tensor, levels: int) -> FakeQuant:
    """Round weight / scale + offset; weight and offset [out, groups, columns], scale and zero [out, groups, 1]."""
    position = weight / scale
    free = (position + offset).round_().add_(zero)
    codes = free.clamp(0, levels)
    return FakeQuant(codes, (free == codes).to(weight.dtype), position, scale, zero)


class Trained:
    """One linear that is trained through its rounding, starting from given codes.

    The latent weight [out, groups, columns], scale and zero [out, groups, 1] are float32. The latent weight is the
    original `weight` [out, in] pulled towards the codes of `start`, so that training starts from exactly these.
    """

    _now: FakeQuant  # the current rounding, set by the subclass

    def __init__(self, weight: Tensor, start: QuantizedLinear) -> None:
        out, groups = start.scales.shape
        self._start = start
        self._latent = drawn(weight, start, _SHARE).reshape(out, groups, -1)
        self._scale = start.scales.to(torch.float32)[:, :, None]
        self._zero = start.zeros.to(torch.float32)[:, :, None]

    @property
    def weight(self) -> Tensor:
        """The rounded weight [out, in], float32."""
        return self._now.weight

    @property
    def result(self) -> QuantizedLinear:
        return self._now.stored(self._start)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded to the `dtype` it is stored in, as float32."""
    return scale.clamp(min=SMALLEST_SCALE).to(dtype).to(torch.float32)


def drawn(weight: Tensor, start: QuantizedLinear, share: float) -> Tensor:
    """`weight` [out, in] pulled towards its codes in `start`, so that it rounds to them; float32.

    Of its distance to the code, counted up to half a grid step (the start need not be the nearest code), `share` < 1
    is kept. Weights beyond the ends of the grid stay where they are.
    """
    groups, levels = start.column_groups(), start.grid.levels
    scale, zero = start.scales.to(torch.float32)[:, groups], start.zeros.to(torch.float32)[:, groups]
    codes = start.codes.to(torch.float32)
    beside = weight.to(torch.float32) / scale + zero - codes
    beyond = ((codes == 0) & (beside < 0)) | ((codes == levels) & (beside > 0))
    return (codes - zero + torch.where(beyond, beside, share * beside.clamp(-0.5, 0.5))) * scale
