"""Adam's update direction (arXiv:1412.6980) for one tensor; the caller multiplies it by its learning rate."""

import torch
from torch import Tensor

_BETAS = (0.9, 0.95)  # decay of the first and of the second moment


class Direction:
    """First moment over the root of the second: near 1 in size where batches agree, small where they do not."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square, self._steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def follow(self, gradient: Tensor) -> Tensor:
        """Add one gradient to the moments and return the direction; 0 where every gradient so far was 0."""
        self._steps += 1
        fast, slow = _BETAS
        self._mean.lerp_(gradient, 1 - fast)
        self._square.lerp_(gradient.square(), 1 - slow)
        size = (self._square / (1 - slow**self._steps)).sqrt_()
        return self._mean.div(1 - fast**self._steps).div_(size.clamp_(min=torch.finfo(size.dtype).tiny))
