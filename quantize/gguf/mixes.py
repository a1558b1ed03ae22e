"""llama.cpp's mixes: the type of each tensor in a file of type Q4_K_M, Q2_K and so on.

This restates `llama_tensor_get_type` of llama.cpp's src/llama-quant.cpp (as vendored by llama-cpp-python 0.3.36) for
the file types made of types in `GgmlType`. Its special cases for falcon and glm5-next are left out, since we do not
convert those architectures.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ..numbers.types import BlockGrid, GgmlType

FileType = Literal[
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "Q6_K",
]  # fmt: skip
TensorType = GgmlType | Literal["F16"]

_FALLBACK: dict[str, GgmlType] = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight", "ssm_conv1d",
    "shortconv.conv.weight",
)  # fmt: skip
_IN_16_BIT = "per_layer_model_proj.weight"  # not quantized, and not small
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Traits:
    """What the rule reads from the file's metadata, beside tensor names and shapes; experts: 0 for a dense model."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def shares_values(self) -> bool:
        """Whether four query heads or more share a value head, whose small tensor then gets more bits."""
        return self.kv_heads > 0 and self.heads // self.kv_heads >= 4

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes the model for a 70B one, whose value projections get more bits."""
        if self.architecture == "llama":
            return self.blocks == 80 and self.heads != self.kv_heads
        return self.architecture in ("qwen2", "olmo", "deci") and self.blocks == 80


@dataclass(frozen=True)
class Choice:
    """The type of a tensor. wanted: the mix's type, where that could not be used since it does not divide the rows."""

    type: TensorType
    wanted: GgmlType | None = None


def choose(
    mix: FileType,
    tensors: Mapping[str, tuple[int, ...]],
    model: Traits,
    *,
    imatrix: bool,
    own: Mapping[str, str] | None = None,
) -> dict[str, Choice | None]:
    """The type of each tensor {GGUF name: shape, the columns last}; None for those that are not quantized.

    imatrix: whether the file is made with an importance matrix, which changes the type of a few tensors. own: tensors
    with a type from the recipe, which the rule does not count; a type that we have no grid for is returned as F16.
    """
    order = sorted(tensors, key=lambda name: (_layer(name), name))  # the rule depends on how many tensors it has seen
    rule = _Rule(mix, model, imatrix, tied="output.weight" not in tensors, values=sum(map(_is_value, tensors)))
    out: dict[str, Choice | None] = dict.fromkeys(tensors)
    for name in order:
        if not quantizable(name, tensors[name]):
            continue
        if name == _IN_16_BIT:
            out[name] = Choice("F16")
            continue
        if own is None or name not in own:
            out[name] = fitting(rule.type_of(name, tensors[name][-1]), tensors[name][-1])
        elif own[name] in get_args(GgmlType):
            out[name] = fitting(cast(GgmlType, own[name]), tensors[name][-1])
        else:
            out[name] = Choice("F16")
    return out


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp quantizes a tensor at all: it needs two dimensions larger than 1."""
    matrix = any(n > 1 for n in shape[:-1])
    return matrix and name.endswith("weight") and not any(part in name for part in _KEPT)


def fitting(wanted: GgmlType, columns: int) -> Choice:
    """The type if its blocks divide rows of `columns`, else its fallback if that one's do, else F16."""
    if columns % BlockGrid(type=wanted).span(columns) == 0:
        return Choice(wanted)
    fallback = _FALLBACK.get(wanted, wanted)
    if columns % BlockGrid(type=fallback).span(columns) == 0:
        return Choice(fallback, wanted)
    return Choice("F16", wanted)


def default_type(mix: FileType) -> GgmlType:
    """The type of most tensors in the mix."""
    name = re.sub(r"_[SML]$", "", mix)
    assert name in get_args(GgmlType)
    return cast(GgmlType, name)


def _layer(name: str) -> int:
    found = _BLOCK.match(name)
    return int(found[1]) if found else -1


def _is_value(name: str) -> bool:
    return any(f"{part}.weight" in name for part in ("attn_qkv", "attn_kv_b", "attn_v"))


@dataclass
class _Rule:
    """The rule, with the number of value and down projections it has seen so far."""

    mix: FileType
    model: Traits
    imatrix: bool
    tied: bool
    values: int
    value: int = 0
    down: int = 0

    def type_of(self, name: str, columns: int) -> GgmlType:
        usual = default_type(self.mix)
        if name == "output.weight" or (self.tied and name in _EMBEDDINGS):
            whole = columns % BlockGrid(type=usual).span(columns) == 0
            return "Q8_0" if usual == "Q8_0" or not whole else "Q6_K"
        if name in _EMBEDDINGS:
            return usual
        if _is_value(name):
            self.value += 1
            return self._value(usual, self.value - 1)
        if "attn_k.weight" in name:
            return "Q8_0" if self.model.experts == 8 else usual
        if "attn_output.weight" in name:
            return self._attention_output(usual)
        if "ffn_down" in name and "attn_q.weight" not in name:
            self.down += 1
            return self._down(usual, _layer(name) if self.model.experts > 1 else self.down - 1)
        return usual

    def _value(self, usual: GgmlType, i: int) -> GgmlType:
        mix, many = self.mix, self.model.shares_values
        out = usual
        if mix == "Q2_K":
            out = "Q4_K" if many else "Q3_K"
        elif mix == "Q2_K_S" and many:
            out = "Q4_K"
        elif mix == "Q3_K_M":
            out = "Q5_K" if i < 2 else "Q4_K"
        elif mix == "Q3_K_L" or (mix == "Q4_K_S" and i < 4):
            out = "Q5_K"
        elif mix in ("Q4_K_M", "Q5_K_M") and _more_bits(i, self.values):
            out = "Q6_K"
        if self.model.is_70b and out in ("Q3_K", "Q4_K"):
            out = "Q5_K"
        return "Q8_0" if self.model.experts == 8 else out

    def _attention_output(self, usual: GgmlType) -> GgmlType:
        if self.model.experts == 8:
            return "Q5_K" if self.mix in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") else usual
        more: dict[str, GgmlType] = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
        return more.get(self.mix, usual)

    def _down(self, usual: GgmlType, i: int) -> GgmlType:
        mix, n = self.mix, self.model.blocks
        early = i < n // 8
        match mix:
            case "Q2_K":
                return "Q3_K"
            case "Q2_K_S" if early:
                return "Q4_K"
            case "Q3_K_M":
                return "Q5_K" if i < n // 16 else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_S" if early:
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _more_bits(i, n):
                return "Q6_K"
            case "Q4_0" | "Q5_0" if early and self.imatrix:
                return "Q4_1" if mix == "Q4_0" else "Q5_1"
        return usual


def _more_bits(i: int, n: int) -> bool:
    """Whether layer `i` of `n` is in the first or last eighth, or every third in between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
