"""Inputs to calibrate on, made up."""

import torch
from torch import Tensor

from quantpress.methods.channel_scales import Observed


def outliers(seed: int = 0, *, mixed: bool = False) -> Tensor:
    """X [500, 64] with a few channels much larger than the rest; `mixed`: correlated ones."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 64, generator=g) * (torch.rand(64, generator=g) + 0.2)
    x[:, ::13] *= 12
    return x @ torch.randn(64, 64, generator=g) if mixed else x


def observed(x: Tensor, tie: Tensor | None = None) -> Observed:
    """All there is to see of X [tokens, in]."""
    tie = torch.arange(x.shape[1]) if tie is None else tie
    return Observed(x.T @ x, x.abs().amax(0), x, tie, int(tie.max()) + 1)
