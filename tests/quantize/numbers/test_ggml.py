"""The scales of ggml's block types: at least as good as the quantizers that everybody else uses."""

import ctypes
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from quantpress.core import machine
from quantpress.formats.ggml_blocks import pack, row_bytes, unpack
from quantpress.methods import ROUNDERS
from quantpress.numbers import ggml_scales as ggml
from quantpress.numbers.types import BlockGrid, GgmlType
from quantpress.recipe import Rtn

TYPES: tuple[GgmlType, ...] = get_args(GgmlType)
every_type = pytest.mark.parametrize("kind", TYPES)


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of different sizes, with a few large columns."""
    make = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=make) * torch.rand(rows, 1, generator=make).add(0.05) * 0.1
    w[:, ::37] *= 3
    return w


def importance(columns: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-3


def rounded(w: Tensor, kind: GgmlType, weigh: Tensor | None = None) -> Tensor:
    """Our rounding, read back from the packed bytes by the gguf package."""
    search, moment = ("mse", None) if weigh is None else ("activation", weigh)
    record = ROUNDERS["rtn"](w, BlockGrid(type=kind, scale_search=search), Rtn(), moment, None).linear
    out = torch.from_numpy(dequantize(pack(record).numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(out, record.dequantize())
    return out


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_less_error_than_the_gguf_package(kind: GgmlType) -> None:
    w = weight(96, 512)
    theirs = dequantize(quantize(w.numpy(), gguf.GGMLQuantizationType[kind]), gguf.GGMLQuantizationType[kind])
    ours = (rounded(w, kind) - w).square().sum(1)
    assert ours.sum() < 0.95 * (torch.from_numpy(theirs) - w).square().sum()


@every_type
@pytest.mark.parametrize("weighted", [False, True])
def test_less_error_than_llama_cpp(kind: GgmlType, weighted: bool) -> None:
    """With a matrix by what both weigh with; without one in plain squares, where llama.cpp weighs by size as well."""
    w, weigh = weight(64, 1024), importance(1024)
    blocks = -1, BlockGrid(type=kind).span(1024)
    each = ggml.by_size(w.reshape(blocks), weigh.expand(64, -1).reshape(blocks), BlockGrid(type=kind)).reshape(w.shape)
    theirs = by_llama_cpp(w, kind, weigh if weighted else torch.ones(1024))
    ours = rounded(w, kind, weigh if weighted else None)
    error, other = ((x - w).square().mul(each if weighted else 1).sum(1) for x in (ours, theirs))
    assert (error < other).all()


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_a_moment_finds_scales_with_less_error_in_the_output(kind: GgmlType) -> None:
    """Of inputs that have a mean, as most have: than its diagonal does, and than llama.cpp with that diagonal."""
    w, x = weight(64, 512), torch.randn(2000, 512, generator=torch.Generator().manual_seed(2))
    x = x * importance(512) ** 0.25 + importance(512) ** 0.5
    moment = x.T @ x / 2000
    grid = BlockGrid(type=kind, scale_search="activation")
    known = {"all of it": moment, "its diagonal": moment.diagonal()}
    q = {name: ROUNDERS["rtn"](w, grid, Rtn(), m, None).linear.dequantize() for name, m in known.items()}
    q["llama.cpp"] = by_llama_cpp(w, kind, moment.diagonal().contiguous())
    group = torch.arange(512) // grid.group_size
    inside = moment * (group == group[:, None])  # rounding to nearest sees no further than its group
    lost = {name: float(((rounded - w) @ inside).mul(rounded - w).sum()) for name, rounded in q.items()}
    assert lost["all of it"] < lost["its diagonal"], lost
    assert lost["all of it"] < lost["llama.cpp"], lost


def by_llama_cpp(w: Tensor, kind: GgmlType, weigh: Tensor) -> Tensor:
    """Quantized by llama.cpp with an importance matrix, read back by the gguf package."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    type = gguf.GGMLQuantizationType[kind]
    source, matrix = (np.ascontiguousarray(t.numpy(), dtype=np.float32) for t in (w, weigh))
    out = np.empty((w.shape[0], row_bytes(BlockGrid(type=kind), w.shape[1])), dtype=np.uint8)
    pointers = (a.ctypes.data_as(ctypes.c_void_p) for a in (source, out))
    shape = (ctypes.c_int64(n) for n in (0, *w.shape))
    written = library.ggml_quantize_chunk(
        ctypes.c_int(type.value), *pointers, *shape, matrix.ctypes.data_as(ctypes.c_void_p)
    )
    assert written == out.size
    return torch.from_numpy(dequantize(out, type))


@every_type
def test_importance_moves_the_error(kind: GgmlType) -> None:
    w, weigh = weight(64, 512), importance(512)
    with_it, without = ((rounded(w, kind, i) - w).square() @ weigh for i in (weigh, None))
    assert with_it.sum() < without.sum()


@every_type
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-2, 1.0, 1e4])
def test_weights_of_any_size(kind: GgmlType, size: float) -> None:
    w = weight(5, 512) * size
    w[0], w[1, :300] = 0, 0
    w[2] = size  # all the same, where a range has no width
    out = rounded(w, kind)
    assert torch.isfinite(out).all()
    assert (out[0] == 0).all()
    levels = 2 ** BlockGrid(type=kind).bits
    if size >= 1e-2:  # smaller ones are below what a float16 scale can tell apart
        assert (out - w).abs().max() <= 2.5 * w.abs().max() / levels
    assert (out - w).abs().max() <= w.abs().max()


@every_type
def test_what_is_on_the_grid_stays(kind: GgmlType) -> None:
    """The best scales of a weight that a block can hold exactly make next to no error."""
    first = rounded(weight(32, 512), kind)
    again = rounded(first, kind)
    error = (again - first).square().sum() / (first - weight(32, 512)).square().sum()
    assert error < 0.35


@every_type
def test_dead_columns_do_not_cost_the_others(kind: GgmlType) -> None:
    w, weigh = weight(16, 512), importance(512)
    weigh[::2] = 0
    out = rounded(w, kind, weigh)
    assert torch.isfinite(out).all()
    assert ((out - w).square() @ weigh).sum() <= ((rounded(w, kind) - w).square() @ weigh).sum()


def test_scales_are_the_same_where_small_numbers_are_flushed() -> None:
    """A run flushes float32 too small to be normal; a float16 scale that is not normal is not one of those."""
    w = weight(2, 256) * 1e-4
    before = {kind: rounded(w, kind) for kind in TYPES}
    machine.flush_denormals()
    try:
        assert all(torch.equal(rounded(w, kind), before[kind]) for kind in TYPES)
    finally:
        torch.set_flush_denormal(False)


def test_super_scales_are_float16_and_never_zero() -> None:
    for kind in TYPES:
        grid = BlockGrid(type=kind)
        if not grid.nested:
            continue
        overall = ggml.fit_super(weight(40, 256) * torch.logspace(-8, 4, 40)[:, None], grid, None)
        assert torch.equal(overall, overall.half().float())
        assert (overall != 0).all()
        record = unpack(pack(ROUNDERS["rtn"](weight(4, 256), grid, Rtn(), None, None).linear), grid, 256)
        steep = weight(4, 256) * torch.logspace(0, -6, 256 // grid.group_size).repeat_interleave(grid.group_size)
        small = unpack(pack(ROUNDERS["rtn"](steep, grid, Rtn(), None, None).linear), grid, 256)
        assert (small.scales != 0).all()  # even of groups too small for the super scale
        low, high = ggml.SCALE_CODES[kind]
        assert record.scales.min() >= low
        assert record.scales.max() <= high
        assert (record.scales != 0).all()


@every_type
@pytest.mark.parametrize("shape", [(5, 256), (64, 768)])
def test_a_sample_is_rounded_as_the_whole_is(kind: GgmlType, shape: tuple[int, int]) -> None:
    """By `nearest`, all super-blocks at once: the same weights but for near ties, at the same error."""
    w, weigh = weight(*shape), importance(shape[1])
    w[0] = 0
    whole, found = rounded(w, kind, weigh), ggml.nearest(w, BlockGrid(type=kind), weigh)
    assert (found == whole).float().mean() > 0.97
    off = [float(((x - w).square() @ weigh).sum()) for x in (found, whole)]
    assert off[0] == pytest.approx(off[1], rel=0.01)
