"""A small solve by the kernels beside the plain loop, on the device and the grid at hand, before they are trusted."""

from functools import cache

import torch

from ..numbers.types import Grid
from ..recipe.methods import Gptq
from .gptq import gptq
from .layer_error import layer_error

_ROWS, _COLUMNS, _LINEARS = 48, 256, 2
_SAME_CODES, _SAME_ERROR = 0.97, 0.01  # a code that falls to the other side by rounding changes some of those after it


@cache
def kernels_refused(grid: Grid, settings: Gptq, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels are not used for weights of `dtype`, as a note; None where they do what the plain loop does."""
    try:
        found = _difference(grid, settings, dtype, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler or the driver: the plain loop does without them
        found = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return None if found is None else f"rounded without GPTQ's kernels, which failed a trial on this GPU: {found}"


def _difference(grid: Grid, settings: Gptq, dtype: torch.dtype, device: torch.device) -> str | None:
    """What differs in a small problem; None where nothing does but by the order of sums."""
    from .gptq_batch import gptq_batch  # needs Triton

    g = torch.Generator().manual_seed(0)
    n = max(_COLUMNS, 2 * grid.columns(_COLUMNS))
    x = torch.randn(_LINEARS, 3 * n, n, generator=g) * torch.rand(n, generator=g).add_(0.1)
    x = (x + 0.5 * x.roll(1, -1)).to(device)
    before = x + 0.02 * torch.randn(x.shape, generator=g).to(device)
    weight = (0.05 * torch.randn(_LINEARS, _ROWS, n, generator=g)).to(device, dtype)
    moment, drift, power = x.mT @ x, None, None
    if settings.error_correction:
        drift = (before - x).mT @ x
        power = ((before - x) @ weight.to(torch.float32).mT).square().sum(1)
    got = gptq_batch(weight, grid, settings, moment, drift, power)
    for i, linear in enumerate(got.linears):
        told = (moment[i],) if drift is None or power is None else (moment[i], drift[i], power[i])
        want = gptq(weight[i], grid, settings, *told[:2]).linear
        same = (linear.codes == want.codes).float().mean().item()
        errors = [layer_error(weight[i].float(), q.dequantize(), *told).error.sum() for q in (want, linear)]
        wanted, ours, said = (float(error) for error in (*errors, got.error[i].sum()))
        if not (same >= _SAME_CODES and max(abs(ours - wanted), abs(said - wanted)) <= _SAME_ERROR * wanted):
            return f"{same:.1%} of the codes the same, error {ours:.4g} (said to be {said:.4g}) for {wanted:.4g}"
    return None
