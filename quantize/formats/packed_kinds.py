"""The ways of storing a weight as codes: for each, which tensors it takes and how the weight is computed from them."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import BadInput
from . import awq, decoding, gptq
from . import bits as bitstream
from .statement import block_shape, stated_group, widths

Read = Callable[[str], Tensor]
_BNB_PARTS = (
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)  # fmt: skip


class TensorType(NamedTuple):
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is stored as codes.

    shape: of the weight in the unquantized model. parts: the tensors it is computed from, the codes first. kind: what
    the codes are, in a few words. decode: the weight in a dtype, from a reader of tensors.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    kind: str
    decode: Callable[[Read, torch.dtype], Tensor]


@dataclass(frozen=True)
class Stored:
    """The tensors of a checkpoint by their headers, a reader for the few small ones that hold shapes, and the
    quantization_config, empty when there is none.

    conv1d: the model keeps some weights as [in, out], which GPTQ and AWQ turn.
    """

    tensors: Mapping[str, TensorType]
    read: Read
    stated: dict[str, Any]
    conv1d: bool = False

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises BadInput for a tensor that is not there."""
        if name not in self.tensors:
            raise BadInput(f"the checkpoint lacks {name}, which the codes beside it need")
        return self.tensors[name].shape

    def first(self, *names: str) -> str | None:
        """The first of the names that is there."""
        return next((name for name in names if name in self.tensors), None)

    def scale_of(self, name: str) -> str | None:
        """The scales of the codes in `name`: a linear's weight, or a parameter of its own such as fused experts."""
        own = (f"{_base(name)}.scale",) if name.endswith(".weight") else ()  # DeepSeek's own name for it
        return self.first(f"{name}_scale_inv", f"{name}_scale", *own, f"{name}_weight_scale")

    def input_factors(self, name: str) -> str | None:
        """ModelOpt's factors on the inputs of a linear, which may as well be on the columns of its weight."""
        return self.first(f"{_base(name)}.pre_quant_scale")


def scaled(stored: Stored, name: str, kind: str) -> PackedWeight:
    """FP8 or INT8 codes [out, in] or [experts, out, in], times a scale of the tensor, a row, a group or a block."""
    shape, scale = stored.shape(name), stored.scale_of(name)
    assert scale is not None
    if len(shape) not in (2, 3):
        raise BadInput(f"{name}: codes of shape {list(shape)} where a matrix is needed")
    layout = decoding.scale_grid(scale, shape, stored.shape(scale), block_shape(stored.stated))
    zero, factors = stored.first(f"{name}_zero_point"), stored.input_factors(name)

    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        codes, scales = read(name), read(scale).reshape(layout.shape)
        zeros = None if zero is None else read(zero).reshape(layout.shape)
        if codes.dim() == 2:
            return _on_inputs(decoding.scaled(codes, scales, layout, zeros), factors, read).to(dtype)
        out = torch.empty(shape, dtype=dtype)
        for e, one in enumerate(codes):  # of fused experts only one at a time is held in float32
            at = e % len(scales)
            out[e] = decoding.scaled(one, scales[at], layout, None if zeros is None else zeros[at])
        return out

    one_byte = stored.tensors[scale].dtype in decoding.ONE_BYTE_SCALES
    block = block_shape(stored.stated) if len(stored.shape(scale)) > 1 else None  # small weights have one block
    each = str(layout) if block is None else f"{block[0]} x {block[1]} block"
    label = "mxfp8" if one_byte and (layout.down, layout.across) == (1, 32) else f"{kind}, a scale for each {each}"
    return PackedWeight(shape, _parts(name, scale, zero, factors), label, decode)


def mxfp4(stored: Stored, name: str, codes: str, scale: str) -> PackedWeight:
    """Two E2M1 codes a byte [out, in / 2] with a power of two for 32 of them [out, in / 32]."""
    rows, columns = stored.shape(codes)[0], 2 * stored.shape(codes)[1]
    if stored.shape(scale) != (rows, columns // 32) or columns % 32:
        raise BadInput(f"{scale}: shape {list(stored.shape(scale))} does not fit groups of 32 of {codes}")
    layout, factors = decoding.ScaleGrid((rows, columns // 32), 1, 32), stored.input_factors(name)

    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        weight = decoding.scaled(decoding.e2m1(read(codes)), read(scale), layout)
        return _on_inputs(weight, factors, read).to(dtype)

    return PackedWeight((rows, columns), _parts(codes, scale, factors), "mxfp4", decode)


def nvfp4(stored: Stored, name: str, codes: str, scale: str, overall: str, divided: bool) -> PackedWeight:
    """Two E2M1 codes a byte [out, in / 2], an E4M3 scale for 16 of them, and one float32 for all scales.

    divided: the scales are divided by that (compressed-tensors) and not multiplied (ModelOpt).
    """
    rows, columns = stored.shape(codes)[0], 2 * stored.shape(codes)[1]
    if stored.shape(scale) != (rows, columns // 16) or columns % 16:
        raise BadInput(f"{scale}: shape {list(stored.shape(scale))} does not fit groups of 16 of {codes}")
    layout, factors = decoding.ScaleGrid((rows, columns // 16), 1, 16), stored.input_factors(name)

    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        scales, one = read(scale).to(torch.float32), read(overall).to(torch.float32)
        if one.numel() != 1:
            raise BadInput(f"{overall}: shape {list(one.shape)}, and only one scale for a whole tensor can be read")
        scales = scales / one.reshape(()) if divided else scales * one.reshape(())
        weight = decoding.scaled(decoding.e2m1(read(codes)), scales, layout)
        return _on_inputs(weight, factors, read).to(dtype)

    return PackedWeight((rows, columns), _parts(codes, scale, overall, factors), "nvfp4", decode)


def gpt_oss(stored: Stored, name: str) -> PackedWeight:
    """The experts of gpt-oss: E2M1 blocks [experts, out, in / 32, 16], scales [experts, out, in / 32].

    The unquantized parameter is [experts, in, out].
    """
    codes, scale = f"{name}_blocks", f"{name}_scales"
    shape = stored.shape(codes)
    if len(shape) != 4 or shape[3] != 16 or stored.shape(scale) != shape[:3]:
        raise BadInput(f"{codes}: shape {list(shape)} and scales {list(stored.shape(scale))} are not gpt-oss' MXFP4")
    experts, rows, groups, _ = shape
    layout = decoding.ScaleGrid((rows, groups), 1, 32)

    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        blocks, scales = read(codes), read(scale)
        out = torch.empty((experts, 32 * groups, rows), dtype=dtype)
        for e in range(experts):
            out[e] = decoding.scaled(decoding.e2m1(blocks[e].flatten(1)), scales[e], layout).T
        return out

    return PackedWeight((experts, 32 * groups, rows), (codes, scale), "mxfp4", decode)


def half_rows(stored: Stored, name: str, scale: str) -> PackedWeight:
    """ModelOpt's W4A16_AWQ: two signed codes a byte [out / 2, in], along `out`, with scales [out, groups]."""
    half, columns = stored.shape(name)
    layout = decoding.scale_grid(scale, (2 * half, columns), stored.shape(scale), None)
    factors = stored.input_factors(name)

    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        weight = decoding.scaled(decoding.signed_nibbles(read(name)), read(scale), layout)
        return _on_inputs(weight, factors, read).to(dtype)

    return PackedWeight((2 * half, columns), _parts(name, scale, factors), "int4 (modelopt)", decode)


def words(stored: Stored, name: str) -> PackedWeight:
    """compressed-tensors' packed integers: codes with 2^(bits - 1) added, in int32 words along `in`."""
    base = _base(name)
    codes, scale = f"{base}.weight_packed", f"{base}.weight_scale"
    if f"{base}.weight_shape" not in stored.tensors or len(stored.shape(codes)) != 2:
        raise BadInput(f"{codes}: codes in words need a weight_shape of two numbers")
    n_out, n_in = (int(n) for n in stored.read(f"{base}.weight_shape").tolist())
    bits, dense = decoding.word_bits(codes, stored.shape(codes)[1], n_in, widths(stored.stated))
    zero, order = stored.first(f"{base}.weight_zero_point"), stored.first(f"{base}.weight_g_idx")
    layout = decoding.scale_grid(scale, (n_out, n_in), stored.shape(scale), None)
    grouped = layout.down == 1

    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        groups = layout.shape[1]
        found = decoding.words(read(codes), bits, n_in, dense)
        scales = read(scale).reshape(layout.shape).expand(n_out, groups)
        zeros: Tensor | int = 1 << (bits - 1)
        if zero is not None and grouped:
            zeros = decoding.words(read(zero).T.contiguous(), bits, n_out, dense).T
        elif zero is not None:
            zeros = read(zero).reshape(1, 1).expand(n_out, groups).to(torch.float32) + (1 << (bits - 1))
        group_of = torch.arange(n_in) // layout.across if order is None else read(order).long()
        return decoding.grouped(found, scales, zeros, group_of).to(dtype)

    return PackedWeight((n_out, n_in), _parts(codes, scale, zero, order), f"int{bits} (compressed-tensors)", decode)


def qweight(stored: Stored, name: str) -> PackedWeight:
    """AutoGPTQ's words along `in`, or AutoAWQ's along `out`: the scales [groups, out] tell which."""
    base = _base(name)
    codes, scales, zeros = (f"{base}.{suffix}" for suffix in ("qweight", "scales", "qzeros"))
    (rows, columns), (groups, n_out) = stored.shape(codes), stored.shape(scales)
    turned = stored.conv1d
    if columns * 8 == n_out:
        made = _awq(stored, base, rows, n_out, groups)
    elif columns == n_out:
        bits = stored.shape(zeros)[1] * 32 // n_out
        made = _gptq(stored, base, rows * 32 // max(1, bits), n_out, groups, bits)
    else:
        raise BadInput(f"{codes}: shape {[rows, columns]} beside {n_out} scales a group is neither GPTQ's nor AWQ's")
    if not turned:
        return made
    inner = made.decode

    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        return inner(read, dtype).T.contiguous()

    return PackedWeight(made.shape[::-1], made.parts, made.kind, decode)


def _awq(stored: Stored, base: str, n_in: int, n_out: int, groups: int) -> PackedWeight:
    if stored.stated:
        awq.Awq().reads(stored.stated | {"quant_method": "awq"})  # raises for other layouts
    zero = stored.first(f"{base}.qzeros")
    size = decoding.group_size(f"{base}.scales", n_in, groups, stated_group(stored.stated))

    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        codes, scales = awq.unpack(read(f"{base}.qweight")).T, read(f"{base}.scales").T
        zeros: Tensor | int = 8 if zero is None else awq.unpack(read(zero)).T
        return decoding.grouped(codes, scales, zeros, torch.arange(n_in) // size).to(dtype)

    parts = _parts(f"{base}.qweight", f"{base}.scales", zero)
    return PackedWeight((n_out, n_in), parts, "int4 (awq)", decode)


def _gptq(stored: Stored, base: str, n_in: int, n_out: int, groups: int, bits: int) -> PackedWeight:
    if bits not in (2, 3, 4, 8):
        raise BadInput(f"{base}.qweight: codes of {bits} bits cannot be read")
    size = decoding.group_size(f"{base}.scales", n_in, groups, stated_group(stored.stated))
    if stored.stated:
        gptq.is_lowered(stored.stated)  # raises for layouts made for one kernel
    order = stored.first(f"{base}.g_idx")

    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        codes = bitstream.unpack(read(f"{base}.qweight").T.contiguous(), bits, n_in)
        zeros = gptq.true_zeros(base, bitstream.unpack(read(f"{base}.qzeros"), bits, n_out), bits, stored.stated)
        group_of = torch.arange(n_in) // size if order is None else read(order).long()
        return decoding.grouped(codes, read(f"{base}.scales").T, zeros.T, group_of).to(dtype)

    parts = _parts(f"{base}.qweight", f"{base}.scales", f"{base}.qzeros", order)
    return PackedWeight((n_out, n_in), parts, f"int{bits} (gptq)", decode)


def bitsandbytes(stored: Stored, name: str) -> PackedWeight | None:
    """bitsandbytes' codes, dequantized by its own library; None for codes that are not its own.

    Raises BadInput when the library is not installed.
    """
    around = tuple(part for end in _BNB_PARTS if (part := f"{name}.{end}") in stored.tensors)
    stats = stored.first(f"{_base(name)}.SCB")
    if not around and stats is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput(f"{name} is quantized by bitsandbytes, and only its own library dequantizes that: "
                       "pip install bitsandbytes")  # fmt: skip
    if stats is not None:
        return PackedWeight(stored.shape(name), (name, stats), "int8 (bitsandbytes)", _bitsandbytes_rows(name, stats))
    state = next((part for part in around if ".quant_state." in part), None)
    if state is None:
        raise BadInput(f"the checkpoint lacks {name}.quant_state, which bitsandbytes' codes need")
    shape = tuple(json.loads(bytes(stored.read(state).tolist()))["shape"])

    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        found = QuantState.from_dict({part: read(part) for part in around}, device=torch.device("cpu"))
        out: Tensor = dequantize_4bit(read(name), found)
        return out.reshape(shape).to(dtype)

    return PackedWeight(shape, (name, *around), f"{state[-3:]} (bitsandbytes)", decode)


def _bitsandbytes_rows(name: str, stats: str) -> Callable[[Read, torch.dtype], Tensor]:
    def decode(read: Read, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        out: Tensor = int8_vectorwise_dequant(read(name), read(stats))
        return out.to(dtype)

    return decode


def _on_inputs(weight: Tensor, factors: str | None, read: Read) -> Tensor:
    return weight if factors is None else weight * read(factors).to(torch.float32)


def _parts(*names: str | None) -> tuple[str, ...]:
    return tuple(name for name in names if name is not None)


def _base(name: str) -> str:
    return name.rpartition(".")[0]
