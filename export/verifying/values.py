"""Whether the numbers of a quantized linear can be those of a weight, judged without the weight."""

import re
from collections.abc import Iterator, Mapping
from statistics import median

import torch
from torch import Tensor

from quantpress.models.vetting import all_finite
from quantpress.numbers.grid import Inputs, QuantizedLinear, decode

from ..servers.served_model import FUSED

_RUN = 32  # columns in a row that no weight fills with one number other than zero
_NOTHING = 2.0**-120  # a scale below is zero: E8M0 has none, and 2^-127 in the place of it
_UNLIKE = (
    32  # times the scales of like layers, or a part of them: no layer of a trained model is so far from the others
)
_LIKE = 4  # layers that have to be alike before one counts as unlike
_NAN = 0x7F  # the code of NaN in E4M3, sign aside


def impossible(name: str, q: QuantizedLinear, may_be_zero: bool = False) -> Iterator[str]:
    """A line for each way in which the record of linear `name` cannot be a weight's, which `may_be_zero` as a whole."""
    scales = q.scales.to(torch.float32)
    if not all_finite(scales) or (q.global_scale is not None and not all_finite(q.global_scale)):
        yield f"{name}: its scales hold NaN or inf"
        return
    if not q.grid.uniform and q.grid.bits == 8 and bool((q.codes & _NAN == _NAN).any()):
        yield f"{name}: {int((q.codes & _NAN == _NAN).sum())} of its weights are NaN"
        return
    if bool((scales < 0).any()):
        yield f"{name}: {int((scales < 0).sum())} of its {scales.numel()} scales are negative"
        return
    zero = scales < _NOTHING
    if bool(zero.any()) and _lost(q, zero):
        yield f"{name}: {int(zero.sum())} of its {scales.numel()} scales are zero, and the codes under them are not"
    if not bool(_numbers(q, slice(0, 1)).any()) and not bool(_numbers(q, slice(None)).any()):
        if not may_be_zero:
            yield f"{name}: all its weights are zero"
    elif (constant := _constant_runs(q)) > 0:
        yield f"{name}: {constant} times {_RUN} weights beside each other have one code: no weight is so"


def unlike_parts(globals_: Mapping[str, float], inputs: Mapping[str, Inputs], shared_weights: bool) -> Iterator[str]:
    """A line for each group of linears that servers fuse whose tensor-wide scales differ.

    globals_: the nvfp4 global scale of each linear; inputs: how each rounds its inputs, static scales included.
    shared_weights: whether the weights' scales have to agree.
    """
    stored = {name: float(x.scale) for name, x in inputs.items() if x.scale is not None}
    for values, what in ((globals_ if shared_weights else {}, "global scales"), (stored, "input scales")):
        for fused in FUSED:
            for name in values:
                if not name.endswith(f".{fused[0]}"):
                    continue
                parts = [name.removesuffix(fused[0]) + part for part in fused]
                if len({values[part] for part in parts if part in values}) > 1:
                    said = ", ".join(f"{part} {values[part]:.6g}" for part in parts if part in values)
                    yield f"{what} of what servers fuse differ, and one is used for all: {said}"


def typical(q: QuantizedLinear) -> float:
    """The middle one of a linear's scales."""
    scales = q.scales.to(torch.float32).median()
    return float(scales if q.global_scale is None else scales / q.global_scale)


def unlike_layers(sizes: Mapping[str, float]) -> Iterator[str]:
    """A line for each linear whose scales are not of the size that those of the same linears in other blocks have.

    sizes: `typical` by linear.
    """
    alike: dict[str, list[str]] = {}
    for name in sizes:
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    for kind, names in alike.items():
        middle = median(sizes[name] for name in names)
        for name in names if len(names) >= _LIKE and middle > 0 else ():
            times = sizes[name] / middle
            if not 1 / _UNLIKE < times < _UNLIKE:
                yield f"{name}: its scales are {times:.3g} times those of {len(names) - 1} other layers ({kind})"


def _numbers(q: QuantizedLinear, rows: slice | Tensor) -> Tensor:
    """Which weights of these rows are not zero, bool [rows, in]."""
    codes = q.codes[rows]
    if not q.grid.uniform:
        return decode(codes, q.grid) != 0
    zeros = q.zeros if q.zeros.shape[0] == 1 else q.zeros[rows]
    return codes != zeros[:, q.column_groups()]


def _lost(q: QuantizedLinear, zero: Tensor) -> bool:
    """Whether a scale of zero wipes out weights; zero: bool, shaped like the scales."""
    if q.grid.shares_rows:
        return bool(_numbers(q, slice(None)).any())
    rows = zero.any(1).nonzero()[:, 0]
    return bool((_numbers(q, rows) & zero[rows][:, q.column_groups()]).any())


def _constant_runs(q: QuantizedLinear) -> int:
    """How many runs of columns hold one code that is not zero's."""
    if q.in_features % _RUN or q.g_idx is not None:
        return 0
    runs = q.codes.view(q.out_features, -1, _RUN)
    equal = runs.amin(2) == runs.amax(2)
    if not bool(equal.any()):
        return 0
    nonzero = torch.cat([_numbers(q, slice(r, r + 256)).view(-1, runs.shape[1], _RUN)[..., 0]
                         for r in range(0, q.out_features, 256)])  # fmt: skip
    return int((equal & nonzero).sum())
