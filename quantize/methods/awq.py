"""AWQ: channels with large inputs get larger weights, and so a finer grid."""

import torch
from torch import Tensor

from ..recipe.methods import Awq, TransformSettings
from .channel_scales import Observed, Rounding, Scaling, Weights, least, sane


def awq(weights: Weights, inputs: Observed, settings: TransformSettings, rounding: Rounding | None = None) -> Scaling:
    """AWQ, arXiv:2306.00978, section 3.2, for linears with common inputs: the strength with the least output error.

    The error is that of the linears' outputs over all tokens, which the second moment gives exactly. Inputs count as
    16 bit: `rounding` is not used. Raises ValueError for settings of another transform.
    """
    if not isinstance(settings, Awq):
        raise ValueError(f"awq was given the settings of {settings.name}")
    x, w = magnitudes(weights, inputs)
    strengths = torch.arange(1, settings.points, device=x.device) / settings.points
    scales = salience(x, w, strengths[:, None])
    return least(weights, inputs, [((i + 1) / settings.points, scale) for i, scale in enumerate(scales)])


def magnitudes(weights: Weights, inputs: Observed) -> tuple[Tensor, Tensor]:
    """The root mean squares x [in] of the inputs and w [in] of the weights' columns, by channel."""
    x = inputs.tied_mean(inputs.moment.diagonal()).clamp(min=0).sqrt()
    squares = torch.stack([w.to(torch.float32).square().mean(0) for w, _ in weights]).mean(0)
    return x, inputs.tied_mean(squares).sqrt()


def salience(x: Tensor, w: Tensor, strength: Tensor) -> Tensor:
    """s_j = x_j^strength / w_j^(1 - strength) of `magnitudes`, over the geometric mean of the smallest and the largest.

    strength [n, 1]: gives n of them, [n, in].

    The paper has mean |X_j|^strength. If a group's step is proportional to the rms of W s over its columns, the error
    sum_j (rms(W_j) s_j)^2 * sum_j (rms(X_j) / s_j)^2 is least at strength 1/2 of this form: scaling up columns of small
    weights costs nothing. AutoAWQ divides in the same way ("duo scaling").
    """
    alive = (x > 0) & (w > 0)
    scale = x.pow(strength) / w.pow(1 - strength)
    lowest = torch.where(alive, scale, torch.inf).amin(-1, keepdim=True)
    middle = (lowest * torch.where(alive, scale, -torch.inf).amax(-1, keepdim=True)).sqrt()
    return sane(torch.where(alive, scale / middle, 1.0))
