"""Adam's direction (arXiv:1412.6980) for one tensor; how far to go along it is left to the caller."""

import torch
from torch import Tensor

_BETAS = (0.9, 0.95)  # of the running gradient and its running square


class Direction:
    """The running gradient over its running size: 1 where every batch agrees, small where they do not."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square, self._steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def follow(self, gradient: Tensor) -> Tensor:
        """Take in one more gradient and return the direction; 0 where no gradient ever came."""
        self._steps += 1
        fast, slow = _BETAS
        self._mean.lerp_(gradient, 1 - fast)
        self._square.lerp_(gradient.square(), 1 - slow)
        size = (self._square / (1 - slow**self._steps)).sqrt_()
        return self._mean.div(1 - fast**self._steps).div_(size.clamp_(min=torch.finfo(size.dtype).tiny))
