"""SmoothQuant: outliers of the inputs are moved into the weights."""

import torch
from torch import Tensor

from ..recipe.methods import SmoothQuant, TransformSettings
from .channel_scales import Observed, Rounding, Scaling, Weights, least, sane

_ALPHAS = tuple(i / 10 for i in range(11))


def smoothquant(
    weights: Weights, inputs: Observed, settings: TransformSettings, rounding: Rounding | None = None
) -> Scaling:
    """SmoothQuant, arXiv:2211.10438, eq. 4, for linears with common inputs.

    `alpha: search` takes the alpha with the least output error of the rounded linears, or no scaling; `rounding`
    rounds the inputs, too, as the artifact will. Raises ValueError for settings of another transform.
    """
    if not isinstance(settings, SmoothQuant):
        raise ValueError(f"smoothquant was given the settings of {settings.name}")
    search = settings.alpha == "search"
    alphas = _ALPHAS if settings.alpha == "search" else (settings.alpha,)
    candidates = [(alpha, smoothing(weights, inputs, alpha)) for alpha in alphas]
    return least(weights, inputs, candidates, rounding, or_none=search)


def smoothing(weights: Weights, inputs: Observed, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) [in], W_j column j of all the weights together."""
    columns = torch.stack([w.abs().amax(0).to(torch.float32) for w, _ in weights]).amax(0)
    peak, widest = inputs.tied_max(inputs.peak), inputs.tied_max(columns)
    # A channel whose inputs or weights are all 0 has no range to move.
    return sane(torch.where((peak > 0) & (widest > 0), peak.pow(alpha) / widest.pow(1 - alpha), 1.0))
