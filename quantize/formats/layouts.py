"""How compressed-tensors lays out one linear's weight: the tensors of each of the library's compression formats.

    codes      pack-quantized                        weight_packed int32 [out, words], weight_shape int64 [2]
               int-quantized                         weight int8 [out, in], signed
               float-quantized, mxfp8-quantized      weight float8_e4m3fn [out, in]
               mxfp4- and nvfp4-pack-quantized       weight_packed uint8 [out, in / 2], low nibble = even column
    scales     weight_scale: [out, groups], uint8 (the E8M0 byte) for mxfp, [1] for one a tensor,
               [out / 128, in / 128] for blocks; nvfp4 also weight_global_scale float32 [1]
    zeros      weight_zero_point, asymmetric integers only: int32 [words, groups] packed along `out`; where codes are
               one a byte, int8 [out, groups]

The library works with signed integers and adds 2^(bits-1) when it packs, which gives our unsigned codes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..numbers.grid import BLOCK, QuantizedLinear
from ..numbers.types import Activations, Grid
from . import bits as bitstream
from .base import positive, take

WORDS, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
_FLOATS = {
    "fp8": FLOAT, "fp8-block": FLOAT, "mxfp8": "mxfp8-quantized", "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}  # fmt: skip
SUFFIXES = (
    "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip


def layout_of(grid: Grid, activations: Activations | None) -> str:
    """The compression format that servers expect for such weights and inputs.

    vLLM takes integers with int8 inputs one a byte (W8A8 and W4A8, the latter at twice the bytes), with 16-bit or fp8
    inputs packed.
    """
    if grid.type != "int":
        return _FLOATS[grid.type]
    return INT if activations is not None and activations.type == "int8" else WORDS


def packs(grid: Grid, activations: Activations | None) -> bool:
    """Whether several numbers are packed into one, in a tensor that is not called `weight`."""
    return "pack" in layout_of(grid, activations)


def readable(grid: Grid) -> tuple[str, ...]:
    """The compression formats that such weights are read from."""
    if grid.type == "int":
        return WORDS, INT, NAIVE
    return (_FLOATS[grid.type], NAIVE) if grid.type in ("fp8", "fp8-block") else (_FLOATS[grid.type],)


def pack_weight(q: QuantizedLinear) -> dict[str, Tensor]:
    """The weight's tensors, by suffix."""
    grid = q.grid
    tensors = {"weight_scale": _scales_to_disk(q.scales, grid)}
    if grid.type != "int":
        if grid.bits == 8:
            tensors["weight"] = q.codes.contiguous().view(torch.float8_e4m3fn)
        else:
            tensors["weight_packed"] = q.codes[:, ::2] | q.codes[:, 1::2] << 4
        if q.global_scale is not None:
            tensors["weight_global_scale"] = q.global_scale.to(torch.float32).reshape(1)
        return tensors
    if layout_of(grid, None if q.inputs is None else q.inputs.spec) == INT:
        tensors["weight"] = _signed(q.codes, grid)
        return tensors if grid.symmetric else tensors | {"weight_zero_point": _signed(q.zeros, grid)}
    tensors["weight_packed"] = bitstream.pack(q.codes, grid.bits)
    tensors["weight_shape"] = torch.tensor(q.codes.shape, dtype=torch.int64)
    if not grid.symmetric:
        tensors["weight_zero_point"] = bitstream.pack(q.zeros.T.contiguous(), grid.bits).T.contiguous()
    return tensors


def unpack_weight(
    name: str, read: Callable[[str], Tensor], grid: Grid, shape: tuple[int, int], words: bool
) -> QuantizedLinear:
    """The record, weight [out, in] = `shape`; `words`: integers are packed. Raises BadInput for other shapes."""
    n_out, n_in = shape
    stored, collapsed = _scale_shapes(grid, n_out, n_in)
    scales = _scales_from_disk(take(f"{name}.weight_scale", read, stored), grid).reshape(collapsed)
    zeros = torch.zeros(collapsed, dtype=torch.uint8)
    if grid.type != "int":
        if grid.bits == 8:
            codes = take(f"{name}.weight", read, shape).view(torch.uint8)
        else:
            pairs = take(f"{name}.weight_packed", read, (n_out, n_in // 2), torch.uint8)
            codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).reshape(n_out, n_in)
        overall = None
        if grid.type == "nvfp4":
            stored_as = f"{name}.weight_global_scale"
            overall = positive(stored_as, take(stored_as, read, (1,)))
        return QuantizedLinear(codes, scales, zeros, grid, global_scale=overall)
    if words:
        packed = take(f"{name}.weight_packed", read, (n_out, bitstream.n_words(n_in, grid.bits)), torch.int32)
        codes = bitstream.unpack(packed, grid.bits, n_in)
    else:
        codes = _unsigned(take(f"{name}.weight", read, shape), grid)
    if grid.symmetric:
        zeros.fill_(1 << (grid.bits - 1))
    elif words:
        packed = take(f"{name}.weight_zero_point", read, (bitstream.n_words(n_out, grid.bits), stored[1]), torch.int32)
        zeros = bitstream.unpack(packed.T.contiguous(), grid.bits, n_out).T.contiguous()
    else:
        zeros = _unsigned(take(f"{name}.weight_zero_point", read, stored), grid)
    return QuantizedLinear(codes, scales, zeros, grid)


def weight_bytes(grid: Grid, n_out: int, n_in: int, scale_bytes: int, layout: str) -> int:
    """Bytes of the tensors `pack_weight` makes; scales have `scale_bytes` each where the type does not fix them."""
    rows, groups = _scale_shapes(grid, n_out, n_in)[1]
    size = rows * groups * (1 if grid.type in ("mxfp8", "mxfp4", "nvfp4") else scale_bytes)
    if layout == WORDS:
        size += 4 * n_out * bitstream.n_words(n_in, grid.bits) + 16
        return size if grid.symmetric else size + 4 * groups * bitstream.n_words(n_out, grid.bits)
    if layout == INT:
        return size + n_out * n_in + (0 if grid.symmetric else rows * groups)
    return size + n_out * n_in * grid.bits // 8 + (4 if grid.type == "nvfp4" else 0)


def _scale_shapes(grid: Grid, n_out: int, n_in: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The scales' shape on disk, and in the record."""
    if grid.group_size == 0:
        return (1,), (1, 1)
    rows = -(-n_out // BLOCK) if grid.type == "fp8-block" else n_out
    shape = rows, -(-n_in // grid.columns(n_in))
    return shape, shape


def _scales_to_disk(scales: Tensor, grid: Grid) -> Tensor:
    if grid.type in ("mxfp8", "mxfp4"):
        return scales.contiguous().view(torch.uint8)
    return scales.reshape(1) if grid.group_size == 0 else scales.contiguous()


def _scales_from_disk(scales: Tensor, grid: Grid) -> Tensor:
    return scales.view(torch.float8_e8m0fnu) if grid.type in ("mxfp8", "mxfp4") else scales


def _signed(codes: Tensor, grid: Grid) -> Tensor:
    return (codes.to(torch.int16) - (1 << (grid.bits - 1))).to(torch.int8)


def _unsigned(codes: Tensor, grid: Grid) -> Tensor:
    return (codes.to(torch.int16) + (1 << (grid.bits - 1))).to(torch.uint8)
