"""compressed-tensors `pack-quantized`: weight_packed, weight_scale, weight_zero_point and weight_shape.

For a weight [out, in] in groups: weight_packed int32 [out, words], codes packed along `in`; weight_scale
[out, groups]; weight_zero_point int32 [words, groups], packed along `out`, asymmetric only; weight_shape int64 [2].
The library thinks in signed codes and adds 2^(bits-1) as it packs, which gives our unsigned ones.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..grid import QuantizedLinear
from ..recipe import Activations, Grid
from . import bits as bitstream
from .base import Format, Kind, grid_of, kind, patterns, take

PACKED = "pack-quantized"


class CompressedTensors(Format):
    def check(self, grid: Grid, out_features: int, in_features: int, shuffled: bool) -> None:
        if shuffled:
            raise BadInput(
                "compressed-tensors has dropped g_idx: scattered groups (static_groups: false) need format gptq"
            )

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        if q.g_idx is not None:
            raise BadInput(f"{name}: its groups are scattered columns (g_idx), which compressed-tensors cannot hold")
        tensors = {
            f"{name}.weight_packed": bitstream.pack(q.codes, q.grid.bits),
            f"{name}.weight_scale": q.scales.contiguous(),
            f"{name}.weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
        }
        if not q.grid.symmetric:
            packed = bitstream.pack(q.zeros.T.contiguous(), q.grid.bits)
            tensors[f"{name}.weight_zero_point"] = packed.T.contiguous()
        return tensors

    def unpack(self, name: str, read: Callable[[str], Tensor], grid: Grid, shape: tuple[int, int]) -> QuantizedLinear:
        n_out, n_in = shape
        grid.check(name, n_in)
        stored = tuple(take(f"{name}.weight_shape", read, (2,)).tolist())
        if stored != shape:
            raise BadInput(f"{name}.weight_shape: {list(stored)} where the model has {list(shape)}")
        groups = n_in // grid.columns(n_in)
        words = take(f"{name}.weight_packed", read, (n_out, bitstream.n_words(n_in, grid.bits)))
        scales = take(f"{name}.weight_scale", read, (n_out, groups))
        if grid.symmetric:
            zeros = torch.full((n_out, groups), 1 << (grid.bits - 1), dtype=torch.uint8)
        else:
            packed = take(f"{name}.weight_zero_point", read, (bitstream.n_words(n_out, grid.bits), groups))
            zeros = bitstream.unpack(packed.T.contiguous(), grid.bits, n_out).T.contiguous()
        return QuantizedLinear(bitstream.unpack(words, grid.bits, n_in), scales, zeros, grid)

    def packed_bytes(self, grid: Grid, out_features: int, in_features: int, scale_bytes: int) -> int:
        groups = in_features // grid.columns(in_features)
        words = out_features * bitstream.n_words(in_features, grid.bits)
        words += 0 if grid.symmetric else groups * bitstream.n_words(out_features, grid.bits)
        return 4 * words + scale_bytes * out_features * groups + 16

    def linears(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> dict[str, tuple[int, int]]:
        out = {}
        for name in shapes:
            if name.endswith(".weight_packed"):
                linear = name.removesuffix(".weight_packed")
                n_out, n_in = take(f"{linear}.weight_shape", read, (2,)).tolist()
                out[linear] = (n_out, n_in)
        return out

    def suffixes(self) -> tuple[str, ...]:
        return ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def config(
        self,
        schemes: dict[str, Grid | None],
        *,
        ignored_extra: Iterable[str] = (),
        shuffled: bool = False,
        activations: Activations | None = None,
        kv_cache: str | None = None,
    ) -> dict[str, Any]:
        # Imported late: the library pulls in a second and a half of other modules.
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
        )

        kinds: dict[str, Kind | None] = {n: None if g is None else kind(g) for n, g in schemes.items()}
        ignored = [name for name, value in kinds.items() if value is None]
        ignored += [name for name in ignored_extra if name not in ignored]
        if "embed_out" in ignored:
            ignored.append("lm_head")  # what transformers calls the same head
        _check_experts(kinds)
        distinct = list(dict.fromkeys(value for value in kinds.values() if value is not None))
        if not distinct:
            raise BadInput("no linear is quantized")
        named = patterns(kinds | dict.fromkeys(ignored))
        groups = {}
        for k, value in enumerate(distinct):
            _, bits, group_size, symmetric = value
            weights = QuantizationArgs(
                num_bits=bits,
                type="int",
                symmetric=symmetric,
                strategy="channel" if group_size == -1 else "group",
                group_size=None if group_size == -1 else group_size,
            )
            targets = ["Linear"] if len(distinct) == 1 else [f"re:{p}" for p, v in named.items() if v == value]
            groups[f"group_{k}"] = QuantizationScheme(targets=targets, weights=weights, format=PACKED)
        config: dict[str, Any] = QuantizationConfig(
            config_groups=groups,
            format=PACKED,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=ignored,
        ).model_dump(mode="json")
        return config

    def grids(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Grid | None]:
        from compressed_tensors.quantization import QuantizationConfig

        try:
            parsed = QuantizationConfig.model_validate(config)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise BadInput(f"quantization_config: compressed-tensors does not accept it: {reason}") from None
        ignore = parsed.ignore or []
        schemes = [(scheme.targets, _grid(scheme, parsed.format)) for scheme in parsed.config_groups.values()]
        out: dict[str, Grid | None] = {}
        for name in names:
            if _matches(name, ignore):
                out[name] = None
                continue
            # A name decides before a class of modules, as in the library.
            by_name = [grid for targets, grid in schemes if _matches(name, targets)]
            by_class = [grid for targets, grid in schemes if "Linear" in targets]
            if by_name or by_class:
                out[name] = (by_name or by_class)[0]
        return out


def _check_experts(kinds: dict[str, Kind | None]) -> None:
    """transformers makes one tensor of all experts, with the first one's scheme: others would be silently wrong."""
    experts = {value for name, value in kinds.items() if ".experts." in name and value is not None}
    if len(experts) > 1:
        raise BadInput(
            f"compressed-tensors: the experts have {len(experts)} formats, and readers know one for all of them; "
            "give every expert the same"
        )


def _grid(scheme: Any, default: str) -> Grid:
    layout = getattr(scheme, "format", None) or default
    weights = scheme.weights
    if layout != PACKED or weights is None or weights.type != "int":
        raise BadInput(f"compressed-tensors format {layout!r} cannot be read yet, only {PACKED!r} integers")
    if scheme.input_activations is not None:
        raise BadInput("compressed-tensors with quantized activations cannot be read yet, only weights")
    if weights.strategy not in ("group", "channel"):
        raise BadInput(f"compressed-tensors strategy {weights.strategy!r} cannot be read, only group and channel")
    return grid_of(weights.num_bits, weights.group_size if weights.strategy == "group" else -1, weights.symmetric)


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(re.match(t[3:], name) is not None if t.startswith("re:") else t == name for t in targets)
