"""Codes as other tools publish them, back to weights: the arithmetic, tensors in and tensors out.

Every rule is that of a format's own reader: block scales of DeepSeek-V3 (multiplied, although they are called
`scale_inv`), OCP Microscaling v1.0 (E8M0 and E2M1), NVFP4, packed integers of compressed-tensors, AutoGPTQ and AutoAWQ.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..numbers.grid import decode
from ..numbers.types import Grid
from . import bits as bitstream

E2M1 = Grid(type="mxfp4")  # what two codes a byte mean, whatever their scales
ONE_BYTE_SCALES = (torch.uint8, torch.float8_e8m0fnu)  # E8M0: a power of two, the byte less 127
_BLOCK = 128  # rows and columns that share a scale where nothing says otherwise


class ScaleGrid(NamedTuple):
    """How scales lie over a weight: their shape as [..., rows, columns], and the rows and columns that share one."""

    shape: tuple[int, ...]
    down: int
    across: int

    def __str__(self) -> str:
        if self.shape[-2:] == (1, 1):
            return "tensor"
        if self.down == 1:
            return "channel" if self.shape[-1] == 1 else f"{self.across} columns"
        return f"{self.down} x {self.across} block"


def scale_grid(name: str, weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None) -> ScaleGrid:
    """How scales of shape `scale` lie over a weight [out, in] or [experts, out, in].

    block: rows and columns of a block as the config states them. Raises BadInput for scales that fit in no known way.
    """
    lead, (n_out, n_in) = weight[:-2], weight[-2:]
    count = 1
    for n in scale:
        count *= n
    if count == 1:
        grid: tuple[int, ...] = (*(1 for _ in lead), 1, 1)
    elif scale == weight[:-1]:
        grid = (*scale, 1)
    elif lead and scale == lead:
        grid = (*scale, 1, 1)
    else:
        grid = scale
    fits = len(grid) == len(weight) and all(have in (1, want) for have, want in zip(grid, lead, strict=False))
    rows, columns = block or (_BLOCK, _BLOCK)
    down = _block(n_out, grid[-2], rows) if fits else 0
    if down == 1 and block is None:
        columns = 1  # groups of a row, which are of one size, unlike blocks
    across = _block(n_in, grid[-1], columns) if fits else 0
    if not down or not across:
        raise BadInput(f"{name}: scales of shape {list(scale)} fit no known layout for a weight {list(weight)}")
    if block and min(down, across) > 1 and (down not in (rows, n_out) or across not in (columns, n_in)):
        raise BadInput(
            f"{name}: scales of shape {list(scale)} are not those of the {rows} x {columns} blocks that the config "
            f"states, for a weight {list(weight)}; is it the config that belongs to these weights?"
        )
    return ScaleGrid(grid, down, across)


def _block(n: int, count: int, stated: int) -> int:
    """Rows (or columns) that share one of `count` scales; 0 when that cannot be told."""
    if count == n:
        return 1
    if count == 1:
        return n
    if -(-n // stated) == count:
        return stated
    return n // count if n % count == 0 else 0


def group_size(name: str, n_in: int, groups: int, stated: int | None) -> int:
    """The inputs that share one of `groups` scales; of the stated size the last group may be smaller.

    Raises BadInput where neither what the config states nor an even division gives as many groups.
    """
    if stated is not None and stated > 0 and -(-n_in // stated) == groups:
        return stated
    if n_in % groups:
        raise BadInput(f"{name}: {groups} groups do not divide {n_in} inputs, and the config says {stated} inputs each")
    return n_in // groups


def scaled(numbers: Tensor, scale: Tensor, grid: ScaleGrid, zero: Tensor | None = None) -> Tensor:
    """(numbers - zero) * scale, float32 [out, in], for numbers [out, in] and scales (and zeros) shaped as `grid`."""
    down, across = grid.down, grid.across
    out = numbers.to(torch.float32)
    if zero is not None:
        out = out - _spread(zero.to(torch.float32), out.shape, down, across)
    return out * _spread(as_float(scale), out.shape, down, across)


def _spread(values: Tensor, shape: torch.Size, down: int, across: int) -> Tensor:
    """One value for each weight; rows and columns of one value stay as they are, to be broadcast."""
    if values.shape[0] > 1 and down > 1:
        values = values.repeat_interleave(down, 0)[: shape[0]]
    if values.shape[1] > 1 and across > 1:
        values = values.repeat_interleave(across, 1)[:, : shape[1]]
    return values


def as_float(scale: Tensor) -> Tensor:
    """Scales as float32; one byte each is E8M0."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def e2m1(pairs: Tensor) -> Tensor:
    """Two E2M1 codes a byte, uint8 or int8 [..., n], the low nibble first -> float32 [..., 2 n]."""
    pairs = pairs.view(torch.uint8)
    return decode(torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2), E2M1)


def signed_nibbles(packed: Tensor) -> Tensor:
    """Two signed codes a byte, the even row in the low nibble, uint8 [out / 2, in] -> int8 [out, in]."""
    both = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1)
    return (both.to(torch.int16) - ((both & 8).to(torch.int16) << 1)).to(torch.int8)


def word_bits(name: str, words: int, n: int, stated: set[int]) -> tuple[int, bool]:
    """The bits of each of `n` codes in `words` int32, and whether the stream is dense.

    compressed-tensors before 0.19 kept codes of 3 bits out of two words at once. stated: the widths that the config
    names, any when empty. Raises BadInput when that leaves none, or several.
    """
    dense = {b for b in range(1, 9) if bitstream.n_words(n, b) == words and (not stated or b in stated)}
    if len(dense) == 1:
        return dense.pop(), True
    padded = {b for b in range(1, 9) if -(-n // (32 // b)) == words and (not stated or b in stated)}
    if not dense and len(padded) == 1:
        return padded.pop(), False
    why = "do not tell their bits, and the config does not either"
    if stated and not dense | padded:
        said = " or ".join(map(str, sorted(stated)))
        why = f"are not the {said} bits a code that config.json says; is it the one that belongs to these weights?"
    raise BadInput(f"{name}: {words} words for {n} codes a row {why}")


def words(packed: Tensor, bits: int, n: int, dense: bool = True) -> Tensor:
    """int32 [..., words] -> codes [..., n] uint8."""
    if dense:
        return bitstream.unpack(packed, bits, n)
    each = [packed >> (bits * i) & ((1 << bits) - 1) for i in range(32 // bits)]
    return torch.stack(each, dim=-1).flatten(-2)[..., :n].to(torch.uint8)


def grouped(codes: Tensor, scales: Tensor, zeros: Tensor | int, group_of: Tensor) -> Tensor:
    """(code - zero) * scale, float32 [out, in]: scales and zeros [out, groups], group_of int64 [in]."""
    centred = codes.to(torch.float32)
    centred -= zeros if isinstance(zeros, int) else zeros.to(torch.float32)[:, group_of]
    return centred.mul_(scales.to(torch.float32)[:, group_of])
