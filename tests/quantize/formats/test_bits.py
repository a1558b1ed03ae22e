"""The bit stream, against its definition and against compressed-tensors' own packer."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.formats import bits as bitstream

from .records import BITS, read_stream


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 3), n=st.integers(1, 100), seed=st.integers(0, 99))
def test_any_codes_survive(bits: int, rows: int, n: int, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, n), generator=make, dtype=torch.uint8)
    words = bitstream.pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, bitstream.n_words(n, bits))
    assert (read_stream(words, bits, n) == codes.numpy()).all()
    assert torch.equal(bitstream.unpack(words, bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 200])
def test_the_library_packs_the_same_words(bits: int, n: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(bitstream.pack(codes, bits), pack_to_int32(signed, bits))
