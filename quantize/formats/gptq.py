"""GPTQ files: qweight, qzeros, scales and g_idx, as AutoGPTQ laid them out and every server reads them.

For a weight [out, in] in groups: qweight int32 [in*bits/32, out], codes packed along `in`; qzeros int32
[groups, out*bits/32], packed along `out`; scales float16 [groups, out]; g_idx int32 [in].

Version 1 stores each zero one lower and readers add it back, some with a carry into the neighbouring zero when the
sum leaves its bits: a zero of 0 does not survive. So symmetric models are version 1, which all readers know, and
asymmetric ones version 2 (`checkpoint_format: gptq_v2`), which stores zeros as they are.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.patterns import regex_matches
from ..numbers.grid import QuantizedLinear
from ..numbers.types import Activations, Grid
from . import bits as bitstream
from .base import Format, Kind, ModelScheme, grid_of, in_float16, kind, patterns, take

# Servers fuse these into one tensor and look up the name of that, not the names of its parts.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_STEPS = {2: 16, 3: 32, 4: 8, 8: 4}  # bits: codes that fill whole words


class Gptq(Format):
    """`lowered`: for files whose asymmetric zeros are stored one lower (version 1), which are only read."""

    name = method = "gptq"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, lowered: bool = False) -> None:
        self.lowered = lowered

    def reads(self, quantization: dict[str, Any]) -> bool:
        return super().reads(quantization) and self.lowered == is_lowered(quantization)

    def check(self, grid: Grid, out_features: int, in_features: int, shuffled: bool) -> None:
        super().check(grid, out_features, in_features, shuffled)
        if grid.bits not in _STEPS:
            raise BadInput(f"no reader takes gptq files of {grid.bits} bits; use compressed-tensors")
        for what, n in (("in_features", in_features), ("out_features", out_features)):
            if n * grid.bits % 32:
                step = _STEPS[grid.bits]
                raise BadInput(
                    f"gptq cannot hold {grid.bits}-bit codes for {what} {n}, which is not a multiple of {step}; "
                    "use compressed-tensors or add the layer to `ignore`"
                )
        if self.lowered and not grid.symmetric:
            raise BadInput("asymmetric gptq version 1 is only read; write gptq, which stores it as version 2")

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        self.check(q.grid, q.out_features, q.in_features, q.g_idx is not None)
        scales = in_float16("gptq", name, q.scales)
        zeros = q.zeros - 1 if q.grid.symmetric else q.zeros
        return {
            f"{name}.qweight": bitstream.pack(q.codes, q.grid.bits).T.contiguous(),
            f"{name}.qzeros": bitstream.pack(zeros.T.contiguous(), q.grid.bits),
            f"{name}.scales": scales.T.contiguous(),
            f"{name}.g_idx": q.column_groups().to(torch.int32),
        }

    def unpack(self, name: str, read: Callable[[str], Tensor], grid: Grid, shape: tuple[int, int]) -> QuantizedLinear:
        n_out, n_in = shape
        self.check(grid.model_copy(update={"symmetric": True}), n_out, n_in, False)
        groups = n_in // grid.columns(n_in)
        words = take(f"{name}.qweight", read, (bitstream.n_words(n_in, grid.bits), n_out), torch.int32)
        zeros = take(f"{name}.qzeros", read, (groups, bitstream.n_words(n_out, grid.bits)), torch.int32)
        scales = take(f"{name}.scales", read, (groups, n_out))
        return QuantizedLinear(
            codes=bitstream.unpack(words.T.contiguous(), grid.bits, n_in),
            scales=scales.T.contiguous(),
            zeros=self._zeros(name, bitstream.unpack(zeros, grid.bits, n_out), grid).T.contiguous(),
            grid=grid,
            g_idx=self._g_idx(name, read, grid, n_in),
        )

    def scattered(self, name: str, read: Callable[[str], Tensor], grid: Grid, in_features: int) -> bool:
        return self._g_idx(name, read, grid, in_features) is not None

    def _g_idx(self, name: str, read: Callable[[str], Tensor], grid: Grid, n_in: int) -> Tensor | None:
        """The group of each column, int32 [in]; None in plain order, even if the config says desc_act."""
        groups = n_in // grid.columns(n_in)
        g_idx = take(f"{name}.g_idx", read, (n_in,)).to(torch.int32)
        if g_idx.min() < 0 or g_idx.max() >= groups:
            raise BadInput(f"{name}.g_idx: names groups {g_idx.min()} to {g_idx.max()} where there are {groups}")
        return None if torch.equal(g_idx.long(), torch.arange(n_in) // grid.columns(n_in)) else g_idx

    def _zeros(self, name: str, stored: Tensor, grid: Grid) -> Tensor:
        if not grid.symmetric:
            return stored + 1 & grid.levels if self.lowered else stored
        middle = 1 << (grid.bits - 1)
        # Readers of symmetric files ignore the zeros, so the middle may be stored as in either version.
        if not ((stored == middle - 1) | (stored == middle)).all():
            raise BadInput(f"{name}.qzeros: the config says symmetric, and the zeros are not {middle}")
        return torch.full_like(stored, middle)

    def packed_bytes(
        self, grid: Grid, out_features: int, in_features: int, scale_bytes: int, activations: Activations | None = None
    ) -> int:
        groups = in_features // grid.columns(in_features)
        words = bitstream.n_words(in_features, grid.bits) * out_features
        words += bitstream.n_words(out_features, grid.bits) * groups
        return 4 * (words + in_features) + 2 * groups * out_features

    def linears(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> dict[str, tuple[int, int]]:
        names = [name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")]
        for name in names:
            if len(shapes[f"{name}.qweight"]) != 2 or len(shapes.get(f"{name}.g_idx", ())) != 1:
                raise BadInput(f"{name}: a qweight matrix and a g_idx vector are needed")
        return {name: (shapes[f"{name}.qweight"][1], shapes[f"{name}.g_idx"][0]) for name in names}

    def config(self, contents: ModelScheme) -> dict[str, Any]:
        self.kinds(contents)
        kinds: dict[str, Kind | None] = {n: None if g is None else kind(g) for n, g in contents.schemes.items()}
        counted = Counter(value for value in kinds.values() if value is not None)
        if len({symmetric for *_, symmetric in counted}) > 1:
            raise BadInput(
                "gptq cannot hold symmetric and asymmetric layers in one model, whose zeros are all of one version; "
                "use compressed-tensors or one kind"
            )
        base = counted.most_common(1)[0][0]
        kinds.update(dict.fromkeys(contents.outside))
        kinds.pop("lm_head", None)  # covered by `lm_head: false`
        dynamic: dict[str, dict[str, Any]] = {}
        for pattern, value in patterns(_with_fused(kinds)).items():
            if value is None:
                dynamic[f"-:{pattern}"] = {}
            elif value != base:
                dynamic[f"+:{pattern}"] = {"bits": value[1], "group_size": value[2], "sym": value[3]}
        return {
            "quant_method": "gptq",
            "bits": base[1],
            "group_size": base[2],
            "sym": base[3],
            "desc_act": contents.shuffled,
            "lm_head": False,
            "checkpoint_format": "gptq" if base[3] else "gptq_v2",
        } | ({"dynamic": dynamic} if dynamic else {})

    def extra_files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": config}

    def grids(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Grid | None]:
        out: dict[str, Grid | None] = {}
        only = _flat(config.get("modules_in_block_to_quantize") or [])
        for name in names:
            found = _override(config.get("dynamic") or {}, name)
            if found is None or (only and not any(part in name for part in only)):
                out[name] = None
                continue
            values = config | found
            if values.get("bits") is None or values.get("group_size") is None:
                raise BadInput("quantization_config: gptq needs `bits` and `group_size`")
            out[name] = grid_of(values["bits"], values["group_size"], values.get("sym", True))
        return out


def is_lowered(config: Mapping[str, Any]) -> bool:
    """Whether zeros are asymmetric and stored one lower; raises BadInput for layouts made for one kernel."""
    layout = config.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        raise BadInput(f"gptq checkpoint_format {layout!r} is laid out for one kernel and cannot be read; known: "
                       "gptq, gptq_v2")  # fmt: skip
    return layout == "gptq" and _is_asymmetric(config)


def true_zeros(name: str, stored: Tensor, bits: int, stated: Mapping[str, Any]) -> Tensor:
    """The zeros of linear `name` in a file by any writer, from the stored ones.

    stated: the quantization_config, empty when there is none. Raises BadInput where it and the zeros disagree, and
    where it is missing and the zeros do not show their version.
    """
    middle, levels = 1 << (bits - 1), (1 << bits) - 1
    asymmetric = bool(stated) and _is_asymmetric(stated)
    if not asymmetric and bool(((stored == middle - 1) | (stored == middle)).all()):
        return torch.full_like(stored, middle)  # as readers of symmetric files, who ignore what is stored
    if not stated:
        raise BadInput(f"{name}.qzeros: no quantization_config says whether zeros are stored one lower (version 1) or "
                       "as they are (gptq_v2); give the config.json that belongs to these weights")  # fmt: skip
    if not asymmetric:
        raise BadInput(f"{name}.qzeros: the config says symmetric, and the zeros are not {middle}")
    return stored + 1 & levels if is_lowered(stated) else stored


def _is_asymmetric(config: Mapping[str, Any]) -> bool:
    parts = [config, *(v for v in (config.get("dynamic") or {}).values() if isinstance(v, dict))]
    return any(part.get("sym") is False for part in parts)


def _with_fused(kinds: dict[str, Kind | None]) -> dict[str, Kind | None]:
    """The names, and those of the tensors that servers fuse from them, where all parts are of one kind."""
    out = dict(kinds)
    for fused, parts in FUSED.items():
        for name in kinds:
            block, _, part = name.rpartition(".")
            siblings = [f"{block}.{sibling}" for sibling in parts]
            if part == parts[0] and all(s in kinds and kinds[s] == kinds[name] for s in siblings):
                out[f"{block}.{fused}"] = kinds[name]
    return out


def _override(dynamic: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The settings of the first matching rule; None when it excludes the layer."""
    for rule, values in dynamic.items():
        if regex_matches(rule.removeprefix("-:").removeprefix("+:"), name):
            return None if rule.startswith("-:") else dict(values)
    return {}


def _flat(value: Any) -> list[str]:
    return [name for part in value for name in _flat(part)] if isinstance(value, list) else [str(value)]
