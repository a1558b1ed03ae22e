"""AWQ files: qweight, qzeros and scales as AutoAWQ's GEMM version laid them out.

For a weight [out, in] in groups: qweight int32 [in, out/8] and qzeros int32 [groups, out/8], eight 4-bit codes a word
along `out` in the order of `_ORDER`; scales float16 [groups, out]. Zeros are stored as they are.

A symmetric model has zeros of 8 and still says `zero_point: true`, because readers disagree on false: vLLM's Marlin
kernel has no such type, others do not read qzeros then. `sym: true`, which other readers of AWQ files ignore, tells our
own.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..numbers.grid import QuantizedLinear
from ..numbers.types import Activations, Grid
from . import bits as bitstream
from .base import Format, ModelScheme, grid_of, in_float16, left_out, take

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column of each eight that is in bits 4i to 4i+3


class Awq(Format):
    name = method = "awq"
    suffixes = ("qweight", "qzeros", "scales")

    def reads(self, quantization: dict[str, Any]) -> bool:
        if not super().reads(quantization):
            return False
        version = str(quantization.get("version") or "gemm").lower()
        if version != "gemm":
            raise BadInput(f"awq version {version!r} is laid out for one kernel and cannot be read; known: gemm")
        return True

    def check(self, grid: Grid, out_features: int, in_features: int, shuffled: bool) -> None:
        if grid.type != "int" or grid.bits != 4:
            raise BadInput(f"awq holds 4-bit integers, not {grid}; use compressed-tensors")
        super().check(grid, out_features, in_features, shuffled)
        for what, n in (("in_features", in_features), ("out_features", out_features)):
            if n % 8:
                raise BadInput(
                    f"awq packs eight codes a word, and {what} {n} is not a multiple of 8; use compressed-tensors or "
                    "add the layer to `ignore`"
                )

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        self.check(q.grid, q.out_features, q.in_features, q.g_idx is not None)
        return {
            f"{name}.qweight": _pack(q.codes.T),
            f"{name}.qzeros": _pack(q.zeros.T),
            f"{name}.scales": in_float16("awq", name, q.scales).T.contiguous(),
        }

    def unpack(self, name: str, read: Callable[[str], Tensor], grid: Grid, shape: tuple[int, int]) -> QuantizedLinear:
        n_out, n_in = shape
        self.check(grid, n_out, n_in, False)
        grid.check(name, n_in)
        groups = n_in // grid.columns(n_in)
        codes = unpack(take(f"{name}.qweight", read, (n_in, n_out // 8), torch.int32))
        zeros = unpack(take(f"{name}.qzeros", read, (groups, n_out // 8), torch.int32))
        scales = take(f"{name}.scales", read, (groups, n_out))
        if grid.symmetric and not bool((zeros == 8).all()):
            raise BadInput(f"{name}.qzeros: the config says symmetric, and the zeros are not 8")
        return QuantizedLinear(codes.T.contiguous(), scales.T.contiguous(), zeros.T.contiguous(), grid)

    def packed_bytes(
        self, grid: Grid, out_features: int, in_features: int, scale_bytes: int, activations: Activations | None = None
    ) -> int:
        groups = in_features // grid.columns(in_features)
        return (in_features + groups) * out_features // 2 + 2 * groups * out_features

    def linears(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> dict[str, tuple[int, int]]:
        out = {}
        for name, shape in shapes.items():
            if name.endswith(".qweight"):
                if len(shape) != 2:
                    raise BadInput(f"{name}: shape {list(shape)} where a matrix is needed")
                out[name.removesuffix(".qweight")] = (8 * shape[1], shape[0])
        return out

    def config(self, contents: ModelScheme) -> dict[str, Any]:
        grid = self.one_kind(contents)
        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": grid.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left_out("awq", contents.schemes, contents.outside),
        }
        return config | ({"sym": True} if grid.symmetric else {})

    def grids(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Grid | None]:
        symmetric = config.get("sym") is True or config.get("zero_point") is False
        bits, group_size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
        if bits is None or group_size is None:
            raise BadInput("quantization_config: awq needs `bits` and `group_size`")
        grid = grid_of(bits, group_size, symmetric)
        skipped = config.get("modules_to_not_convert") or []
        return {name: None if any(part in name for part in skipped) else grid for name in names}


def _pack(codes: Tensor) -> Tensor:
    """Codes [rows, n] uint8 -> int32 [rows, n / 8]."""
    return bitstream.pack(codes.reshape(len(codes), -1, 8)[..., _ORDER].flatten(1), 4)


def unpack(words: Tensor) -> Tensor:
    """int32 [rows, n / 8] -> codes [rows, n] uint8."""
    eights = bitstream.unpack(words, 4, 8 * words.shape[1]).reshape(*words.shape, 8)
    out = torch.empty_like(eights)
    out[..., _ORDER] = eights
    return out.flatten(1)
