"""Quantized checkpoints as other tools publish them, each packed by hand from the format's own rule.

Every packer returns the tensors that stand in a weight's place, and the weight that its reader makes of them, computed
here one element at a time: nothing of the product's own packing is used.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..tiny import build

Packed = tuple[dict[str, Tensor], Tensor]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def by_block(scale: Tensor, shape: tuple[int, ...], down: int, across: int) -> Tensor:
    """The scale of each element."""
    rows, columns = torch.arange(shape[0]) // down, torch.arange(shape[1]) // across
    return scale.float()[rows][:, columns]


def fp8_block(weight: Tensor, down: int = 64, across: int = 64, name: str = "weight_scale_inv") -> Packed:
    """DeepSeek-V3: the last block of a side may be smaller."""
    rows, columns = -(-weight.shape[0] // down), -(-weight.shape[1] // across)
    scale = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = weight[i * down : (i + 1) * down, j * across : (j + 1) * across]
            scale[i, j] = part.float().abs().max() / 448
    each = by_block(scale, tuple(weight.shape), down, across)
    codes = (weight.float() / each).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scale}, codes.float() * each


def fp8_tensor(weight: Tensor, name: str = "weight_scale", shape: tuple[int, ...] = ()) -> Packed:
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scale.reshape(shape), "input_scale": torch.tensor(0.5)}, codes.float() * scale


def fp8_channel(weight: Tensor) -> Packed:
    """fbgemm_fp8, and FP8 of compressed-tensors: a scale a row, [out, 1]."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def mxfp8(weight: Tensor) -> Packed:
    exponent = torch.randint(118, 124, (weight.shape[0], weight.shape[1] // 32))
    each = 2.0 ** (by_block(exponent, tuple(weight.shape), 1, 32) - 127)
    codes = (weight.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": exponent.to(torch.uint8)}, codes.float() * each


def nibbles(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Random E2M1 codes [..., n]: two a byte, the low nibble first, and the numbers they stand for."""
    codes = torch.randint(0, 16, shape)
    packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return codes, packed, torch.tensor(E2M1)[codes]


def nvfp4(weight: Tensor, modelopt: bool) -> Packed:
    _, packed, numbers = nibbles(tuple(weight.shape))
    scale = (torch.rand(weight.shape[0], weight.shape[1] // 16) * 100 + 1).to(torch.float8_e4m3fn)
    each = by_block(scale, tuple(weight.shape), 1, 16)
    overall = torch.tensor(3e-4)
    if modelopt:
        tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": overall, "input_scale": torch.tensor(0.1)}
        return tensors, numbers * (each * overall)
    stored = (1 / overall).reshape(1)
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": stored}
    return tensors | {"input_global_scale": torch.ones(1)}, numbers * (each / stored)


def mxfp4(weight: Tensor) -> Packed:
    _, packed, numbers = nibbles(tuple(weight.shape))
    exponent = torch.randint(120, 124, (weight.shape[0], weight.shape[1] // 32))
    each = 2.0 ** (by_block(exponent, tuple(weight.shape), 1, 32) - 127)
    return {"weight_packed": packed, "weight_scale": exponent.to(torch.uint8)}, numbers * each


def in_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] as AutoGPTQ packs them: one stream of bits a row, the lowest first, cut into int32 words."""
    rows = []
    for row in codes.tolist():
        stream = 0
        for i, code in enumerate(row):
            stream |= code << (bits * i)
        words = [stream >> (32 * k) & 0xFFFFFFFF for k in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def integers(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Codes [out, in], scales and zeros [out, groups], with all values that a zero may have."""
    n_out, n_in = weight.shape
    codes = torch.randint(0, 1 << bits, (n_out, n_in))
    scales = (torch.rand(n_out, n_in // group) * 0.02 + 0.001).half()
    return codes, scales, torch.randint(1, 1 << bits, scales.shape), group


def gptq(weight: Tensor, bits: int = 4, group: int = 32, version: int = 1, act: bool = False) -> Packed:
    codes, scales, zeros, _ = integers(weight, bits, group)
    order = torch.arange(weight.shape[1]) // group
    order = order[torch.randperm(len(order))] if act else order
    stored = zeros - 1 if version == 1 else zeros
    tensors = {
        "qweight": in_words(codes, bits).T.contiguous(), "qzeros": in_words(stored.T, bits),
        "scales": scales.T.contiguous(), "g_idx": order.to(torch.int32),
    }  # fmt: skip
    return tensors, (codes - zeros[:, order]) * scales.float()[:, order]


def awq(weight: Tensor, group: int = 32) -> Packed:
    codes, scales, zeros, _ = integers(weight, 4, group)

    def eights(values: Tensor) -> Tensor:
        return in_words(values.reshape(len(values), -1, 8)[:, :, AWQ_ORDER].reshape(len(values), -1), 4)

    tensors = {"qweight": eights(codes.T), "qzeros": eights(zeros.T), "scales": scales.T.contiguous()}
    order = torch.arange(weight.shape[1]) // group
    return tensors, (codes - zeros[:, order]) * scales.float()[:, order]


def words(weight: Tensor, bits: int = 4, group: int = 32, symmetric: bool = False) -> Packed:
    """compressed-tensors' pack-quantized."""
    codes, scales, zeros, _ = integers(weight, bits, group)
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    tensors = {"weight_packed": in_words(codes, bits), "weight_scale": scales.bfloat16()}
    tensors["weight_shape"] = torch.tensor(weight.shape)
    if not symmetric:
        tensors["weight_zero_point"] = in_words(zeros.T, bits).T.contiguous()
    order = torch.arange(weight.shape[1]) // group
    return tensors, (codes - zeros[:, order]) * scales.bfloat16().float()[:, order]


def modelopt_int4(weight: Tensor, group: int = 32) -> Packed:
    """W4A16_AWQ: two rows a byte; what the inputs are multiplied by is worth as much on the columns of the weight."""
    codes = torch.randint(-8, 8, tuple(weight.shape))
    low, high = codes[0::2] & 15, codes[1::2] & 15
    scale, factors = torch.rand(weight.shape[0], weight.shape[1] // group) * 0.02, torch.rand(weight.shape[1]) + 0.5
    tensors = {"weight": (low | high << 4).to(torch.uint8), "weight_scale": scale, "pre_quant_scale": factors}
    return tensors, codes * by_block(scale, tuple(weight.shape), 1, group) * factors


def int8(weight: Tensor) -> Packed:
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def ct(format: str, **weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed"} | group(
        **weights
    )


Kind = tuple[Callable[[Tensor], Packed], dict[str, Any] | None, dict[str, Any]]  # config.json's statement; files beside
KINDS: dict[str, Kind] = {
    "fp8 block": (fp8_block, {"quant_method": "fp8", "weight_block_size": [64, 64]}, {}),
    "fp8 block of 128": (lambda w: fp8_block(w, 128, 128),
                         {"quant_method": "fp8", "weight_block_size": [128, 128]}, {}),
    "fp8 block stripped": (lambda w: fp8_block(w, 32, 32), None, {}),
    "deepseek scale": (lambda w: fp8_block(w, 64, 64, "scale"), {"quant_method": "fp8", "weight_block_size": [64, 64]},
                       {}),
    "ministral": (lambda w: fp8_tensor(w, "weight_scale_inv"),
                  {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, {}),
    "fp8 tensor": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, {}),
    "fp8 beside": (fp8_tensor, None, {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}),
    "fp8 stripped": (fp8_tensor, None, {}),
    "fbgemm": (fp8_channel, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, {}),
    "ct fp8": (fp8_channel, ct("float-quantized", num_bits=8, type="float", strategy="channel"), {}),
    "ct fp8 tensor": (lambda w: fp8_tensor(w, shape=(1,)),
                      ct("float-quantized", num_bits=8, type="float", strategy="tensor"), {}),
    "mxfp8": (mxfp8, ct("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32), {}),
    "ct nvfp4": (lambda w: nvfp4(w, False),
                 ct("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16), {}),
    "nvfp4": (lambda w: nvfp4(w, True), None,
              {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}}),
    "ct mxfp4": (mxfp4, ct("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32), {}),
    "ct int4": (words, ct("pack-quantized", num_bits=4, type="int", symmetric=False, strategy="group", group_size=32),
                {}),
    "ct int3": (lambda w: words(w, 3, symmetric=True),
                ct("pack-quantized", num_bits=3, type="int", symmetric=True, strategy="group", group_size=32), {}),
    "ct int4 stripped": (lambda w: words(w, symmetric=True), None, {}),
    "ct int8": (int8, ct("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel"), {}),
    "modelopt int4": (modelopt_int4, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 32}, {}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, {}),
    "gptq v2": (lambda w: gptq(w, version=2),
                {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
                {}),
    "gptq 3 bits": (lambda w: gptq(w, bits=3), {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False}, {}),
    "gptq 8 bits": (lambda w: gptq(w, bits=8), {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False}, {}),
    "gptq act": (lambda w: gptq(w, act=True), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, {}),
    "gptq old": (gptq, None, {"quantize_config.json": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, {}),
    "awq old": (awq, None, {"quant_config.json": {"w_bit": 4, "q_group_size": 32, "zero_point": True,
                                                  "version": "GEMM"}}),
    "awq stripped": (awq, None, {}),
}  # fmt: skip


def write(folder: Path, kind: str, family: str = "llama") -> dict[str, Tensor]:
    """A tiny model of `family`, its linears quantized by `kind`; returns the unquantized tensors it stands for."""
    build(family, folder, torch.bfloat16)
    return repack(folder, kind)


def repack(folder: Path, kind: str) -> dict[str, Tensor]:
    """As `write`, of the model in `folder`."""
    pack, stated, beside = KINDS[kind]
    tensors, plain = {}, {}
    torch.manual_seed(1)
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            made, plain[name] = pack(weight)
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": t.contiguous() for suffix, t in made.items()}
        else:
            tensors[name] = plain[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if stated is not None:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    for file, content in beside.items():
        (folder / file).write_text(json.dumps(content))
    return {name: weight.to(torch.bfloat16) for name, weight in plain.items()}
