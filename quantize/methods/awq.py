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
    strengths = [i / settings.points for i in range(1, settings.points)]
    return least(weights, inputs, [(strength, salience(weights, inputs, strength)) for strength in strengths])


def salience(weights: Weights, inputs: Observed, strength: float) -> Tensor:
    """s_j = rms(X_j)^strength / rms(W_j)^(1 - strength) [in], over the geometric mean of the smallest and the largest.

    The paper has mean |X_j|^strength. If a group's step is proportional to the rms of W s over its columns, the error
    sum_j (rms(W_j) s_j)^2 * sum_j (rms(X_j) / s_j)^2 is least at strength 1/2 of this form: scaling up columns of small
    weights costs nothing. AutoAWQ divides in the same way ("duo scaling").
    """
    x = inputs.tied_mean(inputs.moment.diagonal()).clamp(min=0).sqrt()
    squares = torch.stack([w.to(torch.float32).square().mean(0) for w, _ in weights]).mean(0)
    w = inputs.tied_mean(squares).sqrt()
    alive = (x > 0) & (w > 0)
    if not bool(alive.any()):
        return torch.ones_like(x)
    scale = torch.where(alive, x.pow(strength) / w.pow(1 - strength), 1.0)
    middle = (scale[alive].amin() * scale[alive].amax()).sqrt()
    return sane(torch.where(alive, scale / middle, 1.0))
