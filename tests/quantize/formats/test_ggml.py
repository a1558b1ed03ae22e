"""ggml's block types against the gguf package's own reading of the bytes, and llama.cpp's."""

import ctypes
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantpress.formats import ggml_blocks as ggml
from quantpress.numbers.ggml_scales import BLOCK_BYTES
from quantpress.numbers.types import BlockGrid, GgmlType

COLUMNS = {kind: n for kind, (n, _) in ((t.name, gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType)}
TYPES: tuple[GgmlType, ...] = get_args(GgmlType)
every_type = pytest.mark.parametrize("kind", TYPES)
HALVES = {  # where in a block float16 numbers lie
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def blocks(kind: str, rows: int, per_row: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bytes [rows, row bytes], every bit pattern but NaN and inf in the float16 places."""
    random = np.random.default_rng(seed)
    out = random.integers(0, 256, (rows * per_row, BLOCK_BYTES[kind]), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = out[:, at : at + 2].copy().view(np.float16)
        out[:, at : at + 2] = np.where(np.isfinite(halves), halves, np.float16(-0.0)).view(np.uint8)
    return out.reshape(rows, -1)


def test_sizes_are_ggmls() -> None:
    for kind in TYPES:
        assert (BlockGrid(type=kind).span(512), BLOCK_BYTES[kind]) == gguf.GGML_QUANT_SIZES[
            gguf.GGMLQuantizationType[kind]
        ]


@every_type
@pytest.mark.parametrize(("rows", "per_row"), [(1, 1), (7, 3), (64, 4)])
def test_unpacked_rows_are_what_the_gguf_package_reads(kind: GgmlType, rows: int, per_row: int) -> None:
    data = blocks(kind, rows, per_row, seed=rows)
    grid, n = BlockGrid(type=kind), per_row * COLUMNS[kind]
    record = ggml.unpack(torch.from_numpy(data), grid, n)
    want = dequantize(data, gguf.GGMLQuantizationType[kind])
    assert want.shape == (rows, n)
    assert np.array_equal(record.dequantize().numpy(), want)
    again = ggml.pack(record).numpy()
    assert np.array_equal(again, data)
    assert ggml.row_bytes(grid, n) == data.shape[1]


@every_type
@pytest.mark.parametrize("byte", [0, 255, 0x7B])  # float16 0x7b7b is near the largest
def test_extreme_bytes(kind: GgmlType, byte: int) -> None:
    data = np.full((2, 3 * BLOCK_BYTES[kind]), byte, dtype=np.uint8)
    record = ggml.unpack(torch.from_numpy(data), BlockGrid(type=kind), 3 * COLUMNS[kind])
    assert np.array_equal(ggml.pack(record).numpy(), data)
    with np.errstate(all="ignore"):
        want = dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(record.dequantize().numpy(), want, equal_nan=True)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_a_nan_keeps_its_bits(kind: GgmlType) -> None:
    data = np.zeros((1, BLOCK_BYTES[kind]), dtype=np.uint8)
    data[0, 2:4] = 0x01, 0x7D  # a signalling NaN, which arithmetic would make a quiet one
    assert np.array_equal(ggml.pack(ggml.unpack(torch.from_numpy(data), BlockGrid(type=kind), 32)).numpy(), data)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TYPES), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_any_bytes_come_back(kind: GgmlType, rows: int, per_row: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (rows, per_row * BLOCK_BYTES[kind]), dtype=np.uint8)
    record = ggml.unpack(torch.from_numpy(data), BlockGrid(type=kind), per_row * COLUMNS[kind])
    assume(not bool(record.dequantize().isnan().any()))  # which of the many NaN a scale was need not come back
    assert np.array_equal(ggml.pack(record).numpy(), data)
    half = record.rows(rows // 2, rows)
    assert np.array_equal(ggml.pack(half).numpy(), data[rows // 2 :])


@every_type
def test_llama_cpp_reads_the_same_rows(kind: GgmlType) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    name = f"dequantize_row_{kind[0].lower()}{kind[1:]}"
    read = getattr(library, name)
    data = blocks(kind, 5, 3, seed=4)
    n = 3 * COLUMNS[kind]
    out = np.empty((5, n), dtype=np.float32)
    read(data.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size))
    got = ggml.unpack(torch.from_numpy(data), BlockGrid(type=kind), n).dequantize().numpy()
    # The compiler may fuse the multiplication and the subtraction of the offset into one rounding.
    np.testing.assert_allclose(got, out, rtol=1e-5, atol=1e-6 * np.abs(out).max())
