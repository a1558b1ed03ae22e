"""Random records, and the files' rules said again in numpy, bit by bit."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantpress.quantize.grid import Grid, QuantizedLinear

BITS = (2, 3, 4, 8)
GRIDS = [
    Grid(bits=bits, group_size=group, symmetric=symmetric)
    for bits in BITS
    for group in (16, 32, -1)
    for symmetric in (True, False)
]


def record(
    grid: Grid, n_out: int, n_in: int, *, dtype: torch.dtype = torch.bfloat16, shuffled: bool = False, seed: int = 0
) -> QuantizedLinear:
    """Random codes, zeros and scales [n_out, groups] around 0.01; the first zeros are the smallest and largest."""
    make = torch.Generator().manual_seed(seed)
    groups = n_in // grid.columns(n_in)
    codes = torch.randint(0, grid.levels + 1, (n_out, n_in), generator=make, dtype=torch.uint8)
    zeros = torch.randint(0, grid.levels + 1, (n_out, groups), generator=make, dtype=torch.uint8)
    zeros.view(-1)[0], zeros.view(-1)[-1] = 0, grid.levels
    if grid.symmetric:
        zeros.fill_(1 << (grid.bits - 1))
    scales = (torch.rand(n_out, groups, generator=make) * 0.01 + 0.005).to(dtype)
    order = torch.randperm(n_in, generator=make)
    g_idx = (torch.arange(n_in) // grid.columns(n_in))[order].to(torch.int32) if shuffled else None
    return QuantizedLinear(codes, scales, zeros, grid, g_idx)


def equal(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    """Every field the same, dtypes too."""
    pairs = [(a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros)]
    if (a.g_idx is None) != (b.g_idx is None):
        return False
    if a.g_idx is not None and b.g_idx is not None:
        pairs.append((a.g_idx, b.g_idx))
    return a.grid == b.grid and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


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
