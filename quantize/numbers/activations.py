"""Rounding the inputs of linears as servers' kernels do, with dynamic scales or static ones from calibration."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .grid import BLOCK, E2M1_MAX, E4M3_MAX, Inputs, round_numbers_, shared_scale
from .types import Activations, Grid

_E4M3 = Grid(type="fp8")
_E2M1 = Grid(type="mxfp4")
_ROWS = 512  # tokens rounded at a time, so that intermediates stay in cache
_SMALLEST = 1e-10
_CLIPS = 33  # ranges tried, from the whole to 1/256 of it in quarters of an octave
_COLUMNS = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}


def columns_of(spec: Activations, weights: Grid) -> int:
    """Values of a token that share a dynamic scale, with such weights; 0 for all of them."""
    return BLOCK if weights.type == "fp8-block" else _COLUMNS.get(spec.type, 0)


def measured(spec: Activations, columns: int, low: float, high: float) -> Inputs:
    """How inputs within [low, high] are rounded: `spec` with its static scale and zero, where it has them."""
    amax = max(-low, high, _SMALLEST)
    if not spec.calibrated:
        return Inputs(spec, columns)
    if spec.type == "nvfp4":  # a power of two, as for weights
        overall = torch.exp2(torch.floor(torch.log2(torch.tensor(E4M3_MAX * E2M1_MAX / amax))))
        return Inputs(spec, columns, overall)
    if spec.type == "fp8":
        return Inputs(spec, columns, torch.tensor(amax / E4M3_MAX))
    if spec.symmetric:
        return Inputs(spec, columns, torch.tensor(amax / 127))
    low = min(low, 0.0)
    scale = max(max(high, 0.0) - low, _SMALLEST) / 255
    return Inputs(spec, columns, torch.tensor(scale), torch.tensor(-128 - low / scale).round().clamp(-128, 127))


def static_int8(spec: Activations, x: Tensor, low: float, high: float) -> tuple[Inputs, float]:
    """The static int8 rounding that loses the least of tokens x [tokens, in], whose range is [low, high], and how much
    the worst of them loses: the norm of its error over its own.

    What counts is each token's loss, not the sum of squares: a model's first token may be fifty times as large as all
    others, and one step of its range larger than what they hold.
    """
    norms = x.to(torch.float32).square().sum(-1).clamp_(min=_SMALLEST)
    best, mean, worst = measured(spec, 0, low, high), torch.inf, 1.0
    for step in range(_CLIPS):
        inputs = measured(spec, 0, low * 2 ** (-step / 4), high * 2 ** (-step / 4))
        losses = (round_inputs(x, inputs) - x).to(torch.float32).square().sum(-1) / norms
        if (now := float(losses.mean())) < mean:
            best, mean, worst = inputs, now, float(losses.max()) ** 0.5
    return best, worst


def round_inputs(x: Tensor, inputs: Inputs) -> Tensor:
    """x [..., in] as the kernel sees it, in x's dtype: the nearest value on the grid; ties to even."""
    parts = torch.split(x.reshape(-1, x.shape[-1]), _ROWS)
    return torch.cat([_rounded(part, inputs) for part in parts]).view(x.shape)


def _rounded(x: Tensor, inputs: Inputs) -> Tensor:
    """x [tokens, in] rounded."""
    values = x.to(torch.float32)
    groups = values
    if inputs.columns:
        short = -values.shape[-1] % inputs.columns  # padding with zeros changes no scale
        width = (values.shape[-1] + short) // inputs.columns  # an expert may have no token: -1 would say nothing
        groups = pad(values, (0, short)).reshape(len(values), width, inputs.columns)
    rounded = _int8(groups, inputs) if inputs.spec.type == "int8" else _float(groups, inputs)
    return (rounded.flatten(-2)[..., : x.shape[-1]] if inputs.columns else rounded).to(x.dtype)


def _int8(values: Tensor, inputs: Inputs) -> Tensor:
    """Signed codes: symmetric scales are amax / 127, asymmetric ones the range over 255 steps with zero inside."""
    zero: Tensor | float
    if inputs.scale is not None:
        scale = inputs.scale.to(values.device)
        zero = 0.0 if inputs.zero is None else inputs.zero.to(values.device)
    else:
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        if inputs.spec.symmetric:
            scale, zero = torch.maximum(-low, high).clamp_(min=_SMALLEST) / 127, 0.0
        else:
            low = low.clamp_(max=0)
            scale = (high.clamp_(min=0) - low).clamp_(min=_SMALLEST) / 255
            zero = (-128 - low / scale).round_().clamp_(-128, 127)
    return (values / scale).round_().add_(zero).clamp_(-128, 127).sub_(zero).mul_(scale)


def _float(values: Tensor, inputs: Inputs) -> Tensor:
    """E4M3 or E2M1 numbers times a scale: static, one a row of `values`, a power of two (mx) or E4M3 itself (nvfp4)."""
    kind, scale = inputs.spec.type, inputs.scale
    grid = _E4M3 if kind in ("fp8", "mxfp8") else _E2M1
    amax = values.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST)
    if kind == "nvfp4":
        assert scale is not None
        overall = scale.to(values.device)
        stored = (amax / E2M1_MAX * overall).clamp_(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)
        scale = stored.to(torch.float32) / overall
    elif kind == "fp8":
        scale = amax / E4M3_MAX if scale is None else scale.to(values.device)
    else:
        scale = shared_scale(amax, grid)
    return round_numbers_(values / scale, grid) * scale
