"""Weights of quantized originals at the edges of their formats, equal to what the formats' own readers make of them."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from quantpress.core.errors import BadInput
from quantpress.formats.packed_weights import TensorType, packed_weights
from quantpress.formats.statement import stated_quantization

from ..published import awq, ct, fp8_block, gptq, in_words

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def read(tensors: dict[str, Tensor], stated: dict[str, Any] | None) -> Tensor:
    """The weight of the linear `x` that these tensors stand for."""
    named = {f"x.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    headers = {name: TensorType(tuple(tensor.shape), tensor.dtype) for name, tensor in named.items()}
    made, used = packed_weights(headers, named.__getitem__, stated)
    assert used == named.keys()
    return made["x.weight"].decode(named.__getitem__, torch.float32)


def all_bytes(rows: int, columns: int) -> Tensor:
    """Codes of one byte, every one of them; NaN and infinities among the floats."""
    return torch.arange(rows * columns).reshape(rows, columns).remainder(256).to(torch.uint8)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other.float(), rtol=0, atol=0, equal_nan=True)


SCALES = [0.0, -0.25, 2.0**-120, 3e38, 1.0, 0.1]  # the last is not a sum of few powers of two


@pytest.mark.parametrize(
    ("format", "args", "codes", "scale"),
    [
        ("float-quantized", {"strategy": "tensor"}, E4M3, (1,)),
        ("float-quantized", {"strategy": "channel"}, E4M3, (96, 1)),
        ("float-quantized", {"strategy": "block", "block_structure": [32, 128]}, E4M3, (3, 2)),
        ("int-quantized", {"strategy": "channel", "type": "int"}, torch.int8, (96, 1)),
        ("int-quantized", {"strategy": "group", "type": "int", "group_size": 128}, torch.int8, (96, 2)),
    ],
)
def test_codes_of_one_byte(format: str, args: dict[str, Any], codes: torch.dtype, scale: tuple[int, ...]) -> None:
    weights = {"num_bits": 8, "type": "float", "symmetric": True} | args
    scales = torch.tensor(SCALES).repeat(scale[0])[: scale[0] * (scale[1] if scale[1:] else 1)].reshape(scale)
    tensors = {"weight": all_bytes(96, 256).view(codes), "weight_scale": scales}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    theirs = BaseCompressor.get_value_from_registry(format).decompress(tensors, scheme)["weight"]
    same(read(tensors, ct(format, **weights)), theirs)


@pytest.mark.parametrize("group", [96, 64, 120])
@pytest.mark.parametrize("bits", [4, 8])
def test_words_in_groups_that_a_block_of_128_would_count_alike(bits: int, group: int) -> None:
    """960 columns are 8 groups of 120, and 8 blocks of 128, the last of them smaller."""
    codes = torch.randint(0, 1 << bits, (6, 8 * group), generator=torch.Generator().manual_seed(bits))
    scales = torch.rand(6, 8).bfloat16()
    tensors = {
        "weight_packed": in_words(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(tensors, scheme)["weight"]
    ours = read(tensors, ct("pack-quantized", **weights))
    same(ours, (codes - (1 << (bits - 1))) * scales.float().repeat_interleave(group, 1))
    torch.testing.assert_close(ours, theirs.float(), rtol=2**-8, atol=0)  # theirs is a product in bfloat16


def test_nvfp4_and_mxfp4_with_every_code_and_scale() -> None:
    packed, scale = all_bytes(32, 128), all_bytes(32, 8)
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors = {"weight_packed": packed, "weight_scale": scale}
    theirs = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized").decompress(tensors, scheme)["weight"]
    ours = read(tensors, None)
    last = scale.repeat_interleave(32, 1) == 255  # NaN by the standard (OCP MX 1.0, 5.4.1); theirs is infinite
    assert ours[last].isnan().all()
    same(ours[~last], theirs[~last])

    scales = all_bytes(32, 16).view(E4M3)
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    for overall in (448.0 * 6, 0.3):
        tensors = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": torch.tensor([overall])}
        decompressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
        theirs = decompressor.decompress(tensors, scheme)["weight"]
        torch.testing.assert_close(read(tensors, None), theirs.float(), rtol=2**-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, E8M0, torch.uint8])
@pytest.mark.parametrize("grid", [(2, 4), (1, 1), (64, 8)])
def test_fp8_as_transformers_reads_it(scale: torch.dtype, grid: tuple[int, int]) -> None:
    one_byte = scale in (E8M0, torch.uint8)
    if one_byte:
        scales = (torch.arange(grid[0] * grid[1]) % 254 + 1).to(torch.uint8).reshape(grid).view(scale)
    else:
        scales = torch.tensor(SCALES).repeat(grid[0] * grid[1])[: grid[0] * grid[1]].reshape(grid).to(scale)
    tensors = {"weight": all_bytes(64, 256).view(E4M3), "weight_scale_inv": scales}
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["weight"], scales, torch.float32)
    shape = [64 // grid[0], 256 // grid[1]]
    same(read(tensors, {"quant_method": "fp8", "weight_block_size": shape}), theirs)


@pytest.mark.parametrize("shape", [(200, 150), (128, 129), (1, 300), (257, 64)])
def test_the_last_blocks_may_be_smaller(shape: tuple[int, int]) -> None:
    """As in DeepSeek-V3's files, whose kv_a_proj has 576 rows."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors, wanted = fp8_block(weight, 128, 128)
    same(read(tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}), wanted)
    if min(shape) > 1:
        same(read(tensors, None), wanted)


AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}


@pytest.mark.parametrize(
    ("version", "more"),
    [
        (1, {"packing_format": "auto_round:auto_gptq"}),
        (1, {}),
        (1, {"sym": True, "extra_config": {"model.layers.0.self_attn.q_proj": {"sym": False}}}),
        (1, {"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"}),
        (2, {"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2"}),
    ],
)
def test_auto_round_as_gptq(version: int, more: dict[str, Any]) -> None:
    """Its files have no g_idx."""
    tensors, wanted = gptq(torch.empty(64, 96), version=version)
    del tensors["g_idx"]
    same(read(tensors, stated_quantization({"quantization_config": AUTO_ROUND | more}, lambda _: None)), wanted)


def test_auto_round_as_awq_and_fp8_and_what_of_it_is_refused() -> None:
    def stated(**more: Any) -> dict[str, Any] | None:
        return stated_quantization({"quantization_config": AUTO_ROUND | more}, lambda _: None)

    tensors, wanted = awq(torch.empty(64, 96))
    same(read(tensors, stated(packing_format="auto_round:auto_awq")), wanted)
    tensors, wanted = fp8_block(torch.ones(200, 150).bfloat16(), 64, 64)
    fp8 = stated(data_type="fp", bits=8, group_size=[64, 64], packing_format="auto_round:fp8")
    same(read(tensors, fp8), wanted)
    with pytest.raises(BadInput, match="auto-round's mx_int4 weights in packing_format 'auto_round:mx' cannot be"):
        read(tensors, stated(data_type="mx_int4", packing_format="auto_round:mx"))


@pytest.mark.parametrize("pack", [gptq, awq])
def test_a_last_group_may_be_smaller(pack: Any) -> None:
    """96 inputs in groups of 40 are three groups, and would be three of 32."""
    tensors, _ = pack(torch.empty(64, 96))  # three groups of 32
    whole = {"bits": 4, "sym": False, "quant_method": pack.__name__}
    tensors.pop("g_idx", None)
    even, uneven = read(tensors, whole | {"group_size": 32}), read(tensors, whole | {"group_size": 40})
    same(uneven[:, :32], even[:, :32])
    assert (uneven[:, 32:40] != even[:, 32:40]).any()
    same(uneven[:, 80:], even[:, 80:])
    tensors["qweight"] = tensors["qweight"][: 8 if pack is gptq else 64]
    with pytest.raises(BadInput, match="3 groups do not divide 64 inputs, and the config says 16 inputs each"):
        read(tensors, whole | {"group_size": 16})
