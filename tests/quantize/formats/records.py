"""Random records, and the files' rules said again in numpy, bit by bit."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantpress.numbers.activations import columns_of
from quantpress.numbers.grid import BLOCK, Grid, Inputs, QuantizedLinear
from quantpress.numbers.types import Activations

BITS = (2, 3, 4, 5, 6, 7, 8)
GRIDS = [
    Grid(bits=bits, group_size=group, symmetric=symmetric)
    for bits in BITS
    for group in ((16, 32, -1) if bits in (2, 3, 4, 8) else (32,))
    for symmetric in (True, False)
]
GPTQ_GRIDS = [grid for grid in GRIDS if grid.bits in (2, 3, 4, 8)]


FLOATS = [
    Grid(type="fp8"), Grid(type="fp8", group_size=0), Grid(type="fp8-block"), Grid(type="mxfp8"), Grid(type="mxfp4"),
    Grid(type="nvfp4"),
]  # fmt: skip
_INT8 = [Activations(type="int8", dynamic=d, symmetric=s) for d in (True, False) for s in (True, False)]
_FP8 = [Activations(type="fp8"), Activations(type="fp8", dynamic=False)]
PAIRS: list[tuple[Grid, Activations]] = [
    *((Grid(bits=8, group_size=-1), spec) for spec in _INT8),
    (Grid(bits=8, group_size=-1, symmetric=False), _INT8[0]),
    (Grid(group_size=32), _INT8[0]),
    (Grid(group_size=32, symmetric=False), _INT8[3]),
    (Grid(group_size=-1), _INT8[0]),
    (Grid(group_size=32), _FP8[0]),
    *((grid, spec) for grid in FLOATS[:2] for spec in _FP8),
    (Grid(type="fp8-block"), _FP8[0]),
    (Grid(type="mxfp8"), Activations(type="mxfp8")),
    (Grid(type="mxfp4"), Activations(type="mxfp4")),
    (Grid(type="nvfp4"), Activations(type="nvfp4")),
]


def record(
    grid: Grid,
    n_out: int,
    n_in: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shuffled: bool = False,
    seed: int = 0,
    spec: Activations | None = None,
) -> QuantizedLinear:
    """Random codes, zeros and scales, weights around 0.05; the first zeros are the smallest and largest."""
    make = torch.Generator().manual_seed(seed)
    inputs = None if spec is None else _inputs(spec, grid)
    if grid.type != "int":
        return replace(_floats(grid, n_out, n_in, dtype, make), inputs=inputs)
    groups = n_in // grid.columns(n_in)
    codes = torch.randint(0, grid.levels + 1, (n_out, n_in), generator=make, dtype=torch.uint8)
    zeros = torch.randint(0, grid.levels + 1, (n_out, groups), generator=make, dtype=torch.uint8)
    zeros.view(-1)[0], zeros.view(-1)[-1] = 0, grid.levels
    if grid.symmetric:
        zeros.fill_(1 << (grid.bits - 1))
    scales = ((torch.rand(n_out, groups, generator=make) * 0.01 + 0.005) * 8 / (1 << (grid.bits - 1))).to(dtype)
    order = torch.randperm(n_in, generator=make)
    g_idx = (torch.arange(n_in) // grid.columns(n_in))[order].to(torch.int32) if shuffled else None
    return QuantizedLinear(codes, scales, zeros, grid, g_idx, inputs=inputs)


def _floats(grid: Grid, n_out: int, n_in: int, dtype: torch.dtype, make: torch.Generator) -> QuantizedLinear:
    """Every bit pattern that is a number, either zero too."""
    rows = 1 if grid.group_size == 0 else -(-n_out // BLOCK) if grid.type == "fp8-block" else n_out
    shape = rows, -(-n_in // grid.columns(n_in))
    sign = torch.randint(2, (n_out, n_in), generator=make) << (grid.bits - 1)
    size = torch.randint(127 if grid.bits == 8 else 8, (n_out, n_in), generator=make)  # 127 is E4M3's NaN
    if grid.type in ("mxfp8", "mxfp4"):
        exponents = torch.randint(-14, -11, shape, generator=make) + (8 if grid.type == "mxfp4" else 0)
        scales = torch.exp2(exponents.float()).to(torch.float8_e8m0fnu)
    elif grid.type == "nvfp4":
        scales = (torch.rand(shape, generator=make) * 200 + 50).to(torch.float8_e4m3fn)
    else:
        scales = (torch.rand(shape, generator=make) * 1e-4 + 1e-4).to(dtype)
    overall = torch.tensor(2.0**13) if grid.type == "nvfp4" else None
    zeros = torch.zeros(shape, dtype=torch.uint8)
    return QuantizedLinear((sign + size).to(torch.uint8), scales, zeros, grid, global_scale=overall)


def _inputs(spec: Activations, grid: Grid) -> Inputs:
    """Static scales for inputs up to 4 in size, which few of a norm's are beyond."""
    columns = columns_of(spec, grid)
    if not spec.calibrated:
        return Inputs(spec, columns)
    if spec.type == "nvfp4":
        return Inputs(spec, columns, torch.tensor(512.0))
    if spec.symmetric:
        return Inputs(spec, columns, torch.tensor(4 / (127 if spec.type == "int8" else 448)))
    return Inputs(spec, columns, torch.tensor(7 / 255), torch.tensor(-19.0))


def equal(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    """Every field the same, dtypes too."""
    pairs = [(a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros)]
    if (a.g_idx is None) != (b.g_idx is None):
        return False
    if a.g_idx is not None and b.g_idx is not None:
        pairs.append((a.g_idx, b.g_idx))
    if (a.global_scale is None) != (b.global_scale is None):
        return False
    if a.global_scale is not None and b.global_scale is not None:
        pairs.append((a.global_scale, b.global_scale))
    return a.grid == b.grid and all(x.dtype == y.dtype and torch.equal(_bytes(x), _bytes(y)) for x, y in pairs)


def _bytes(x: Tensor) -> Tensor:
    """8-bit floats have no comparison of their own."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def with_scales(q: QuantizedLinear, dtype: torch.dtype) -> QuantizedLinear:
    return replace(q, scales=q.scales.to(dtype))


def read_stream(words: Tensor, bits: int, n: int) -> Any:
    """Codes [rows, n] in int32 [rows, words]: code j is bits [j*bits, (j+1)*bits) of the row's little-endian stream."""
    raw = np.ascontiguousarray(words.numpy()).view(np.uint32)
    out = np.zeros((raw.shape[0], n), dtype=np.int64)
    for row in range(raw.shape[0]):
        stream = sum(int(word) << (32 * k) for k, word in enumerate(raw[row]))
        out[row] = [stream >> (j * bits) & ((1 << bits) - 1) for j in range(n)]
    return out
