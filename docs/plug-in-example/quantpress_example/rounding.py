"""The rounder: weight and grid in, a QuantizedLinear with its codes out."""

import torch
from torch import Tensor

from quantpress.methods import Rounded
from quantpress.methods.rtn import rtn
from quantpress.numbers.types import Grid
from quantpress.plugin import MethodSettings

from .settings import Stochastic


def stochastic(
    weight: Tensor, grid: Grid, settings: MethodSettings, moment: Tensor | None = None, drift: Tensor | None = None
) -> Rounded:
    """Round `weight` [out, in] to the nearest point after half a grid step of noise.

    moment, drift: of the calibrated inputs, for methods whose settings say `calibrated`; not used here.
    """
    assert isinstance(settings, Stochastic)
    step = rtn(weight, grid, settings).linear.step()  # [out, in]
    random = torch.Generator(device=weight.device).manual_seed(settings.seed)
    noise = torch.rand(weight.shape, generator=random, device=weight.device) - 0.5
    noisy = weight.float() + noise * step
    return Rounded(rtn(noisy.to(weight.dtype), grid, settings).linear)
