"""Which tensors of a checkpoint are codes, and the weight that each of them stands for.

They are recognised by their names, types and shapes, whoever wrote them; what a config states is asked only where these
do not tell. Codes that no rule explains are an error, since nothing may take them for weights.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..core.errors import BadInput
from . import decoding
from . import packed_kinds as kinds
from .packed_kinds import PackedWeight, Read, Stored, TensorType
from .statement import check_readable

__all__ = ["PackedWeight", "TensorType", "is_code", "packed_weights"]

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SMALL_INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)
_NAMED_AS_WEIGHT = re.compile(r"(^|[._])(weight|qweight|packed|blocks|proj|B)$")
# What tools store beside codes: scales and zeros of weights, of inputs, of the key-value cache.
_BESIDE = re.compile(
    r"([._]weight_(scale|scale_inv|scale_2|zero_point|shape|g_idx|global_scale|format)|_scale_inv"
    r"|[._](input|output)_(scale|scale_inv|scale_ub|zero_point|global_scale)|[._]activation_scale(_inv)?"
    r"|\.pre_quant_scale|\.qzeros|\.scales|\.g_idx|\.SCB|\.(k|v|q|kv|p|prob)_scale|\.[kv]_zero_point"
    r"|\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[^.]+))$"
)


def packed_weights(
    tensors: Mapping[str, TensorType], read: Read, stated: dict[str, Any] | None, conv1d: bool = False
) -> tuple[dict[str, PackedWeight], frozenset[str]]:
    """The weights stored as codes, by the names they have unquantized, and all tensors that are there for them.

    read: reads the few small tensors that hold shapes. stated: the checkpoint's quantization_config, None when it has
    none. conv1d: the model keeps some weights as [in, out], which GPTQ and AWQ turn. Raises BadInput for codes that
    cannot be understood.
    """
    if stated is not None:
        check_readable(stated)
    stored, found = Stored(tensors, read, stated or {}, conv1d), {}
    for name in tensors:
        if (made := _weight(stored, name)) is not None:
            found[made[0]] = made[1]
    used = {part for weight in found.values() for part in weight.parts}
    if found:
        used |= {name for name in tensors if _BESIDE.search(name) is not None}
    rest = [name for name in tensors if name not in used]
    for name in sorted(rest, key=lambda name: _BESIDE.search(name) is not None):  # a weight before its own scales
        _check_no_codes(name, tensors[name])
    return found, frozenset(used)


def is_code(dtype: torch.dtype) -> bool:
    """Whether a tensor of this type, where a weight is expected, can only hold codes."""
    return not dtype.is_floating_point or dtype.itemsize == 1


def _check_no_codes(name: str, kind: TensorType) -> None:
    integers = kind.dtype in _SMALL_INTS and len(kind.shape) > 1 and _NAMED_AS_WEIGHT.search(name) is not None
    if kind.dtype in _FP8 or integers:
        raise BadInput(
            f"{name}: {str(kind.dtype).removeprefix('torch.')} {list(kind.shape)} are codes of a quantized weight, and "
            "nothing beside them says in a known way what they stand for; give the original checkpoint"
        )


def _weight(stored: Stored, name: str) -> tuple[str, PackedWeight] | None:
    """The weight that tensor `name` holds the codes of, with its name; None when it holds no codes."""
    shape, dtype = stored.tensors[name]
    base, _, suffix = name.rpartition(".")
    if suffix == "qweight" and dtype == torch.int32 and len(shape) == 2:
        return f"{base}.weight", kinds.qweight(stored, name)
    if suffix == "weight_packed" and dtype == torch.int32:
        return f"{base}.weight", kinds.words(stored, name)
    if suffix == "weight_packed" and dtype == torch.uint8 and len(shape) == 2:
        scale, overall = f"{base}.weight_scale", f"{base}.weight_global_scale"
        if overall in stored.tensors:
            return f"{base}.weight", kinds.nvfp4(stored, name, name, scale, overall, divided=True)
        return f"{base}.weight", kinds.mxfp4(stored, name, name, scale)
    if name.endswith("_blocks") and dtype == torch.uint8:
        plain = name.removesuffix("_blocks")
        return (plain, kinds.gpt_oss(stored, plain)) if f"{plain}_scales" in stored.tensors else None
    if dtype in _FP8 and stored.scale_of(name) is not None:
        return name, kinds.scaled(stored, name, "fp8")
    if dtype in (torch.uint8, torch.int8):
        made = _of_bytes(stored, name)
        return None if made is None else (name, made)
    return None


def _of_bytes(stored: Stored, name: str) -> PackedWeight | None:
    """Codes of 8 bits, or two of 4 bits a byte, in the place of the weight."""
    if (made := kinds.bitsandbytes(stored, name)) is not None:
        return made
    scale, (shape, dtype) = stored.scale_of(name), stored.tensors[name]
    if scale is None or len(shape) != 2:
        return None
    (rows, columns), of = shape, stored.tensors[scale]
    powers = of.dtype in decoding.ONE_BYTE_SCALES
    if dtype == torch.uint8 and of.dtype == torch.float8_e4m3fn and f"{name}_scale_2" in stored.tensors:
        return kinds.nvfp4(stored, name, name, scale, f"{name}_scale_2", divided=False)
    if of.shape == (rows, columns // 16) and (powers or not scale.endswith("weight_scale")):
        return kinds.mxfp4(stored, name, name, scale)  # DeepSeek V4 has them as int8, with scales in float32
    if dtype == torch.int8 and not powers:
        return kinds.scaled(stored, name, "int8")
    if dtype == torch.uint8 and of.dtype.itemsize > 1 and of.shape[:1] == (2 * rows,):
        return kinds.half_rows(stored, name, scale)
    return None
