"""The interface of a format: QuantizedLinear to tensors and back, and the quantization_config that goes with them."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from ..core.errors import BadInput
from ..core.patterns import regex_matches
from ..numbers.grid import Inputs, QuantizedLinear
from ..numbers.types import Activations, Grid
from ..plugin import FileFormat
from ..recipe.file_formats import FILE_FORMATS

_CACHES = {("float", 8): "fp8", ("int", 8): "int8"}
_T = TypeVar("_T")
Kind = tuple[str, int, int, bool]  # type, bits, group_size, symmetric: the part of a grid that a file records


@dataclass(frozen=True)
class ModelScheme:
    """What a quantized model consists of, as far as its quantization_config has to say.

    schemes: the grid of each linear, None for one left in 16 bit; outer: of head and embeddings, where they are
    quantized; outside: linears outside of the blocks, left in 16
    bit; shuffled: groups are scattered columns, named by g_idx; activations: what the inputs of every quantized linear
    are rounded to; kv_cache: `fp8` or `int8` when the files hold scales for it; dynamic: linears whose inputs have
    dynamic scales where the others' are static.
    """

    schemes: dict[str, Grid | None]
    outside: Sequence[str] = ()
    shuffled: bool = False
    activations: Activations | None = None
    kv_cache: str | None = None
    outer: Mapping[str, Grid] = field(default_factory=dict)
    dynamic: Collection[str] = ()


class Format(ABC):
    """One on-disk format. No files are opened here: tensors go in and out by name.

    name: its name in recipes and in FILE_FORMATS. method: its `quant_method` in a quantization_config. suffixes: the
    names of the tensors that `pack` may write, after the linear's name. cache_suffixes: the names of the scales of keys
    and of values, after the attention module's name.
    """

    name: ClassVar[str]
    method: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    cache_suffixes: ClassVar[tuple[str, str]] = ("k_scale", "v_scale")

    @property
    def holds(self) -> FileFormat:
        """What files of this format can hold."""
        return FILE_FORMATS[self.name]

    def reads(self, quantization: dict[str, Any]) -> bool:
        """Whether a checkpoint with this quantization_config is in this format.

        Raises BadInput for a variant of the format that cannot be read.
        """
        return bool(quantization.get("quant_method") == self.method)

    def check(self, grid: Grid, out_features: int, in_features: int, shuffled: bool) -> None:
        """Raise BadInput when a linear cannot be held; `shuffled`: groups are scattered columns, named by g_idx.

        Formats extend it by what their layout requires of bits and shapes.
        """
        if grid.type not in self.holds.types:
            other = next(name for name, held in FILE_FORMATS.items() if held.convertible)
            raise BadInput(f"{self.name} holds weights of type {', '.join(self.holds.types)}, not {grid}; use {other}")
        if shuffled and not self.holds.scattered:
            able = ", ".join(name for name, held in FILE_FORMATS.items() if held.scattered)
            raise BadInput(f"{self.name} has no g_idx: scattered groups (static_groups: false) need format {able}")

    def kinds(self, contents: ModelScheme) -> list[Grid]:
        """The distinct weight grids of a model; raises BadInput for contents that the files cannot hold."""
        if not self.holds.input_scales and (contents.activations is not None or contents.kv_cache is not None):
            raise BadInput(f"{self.name} holds weights only: no activations, no kv_cache; use compressed-tensors")
        if contents.kv_cache not in (None, "fp8"):
            raise BadInput(f"kv_cache {contents.kv_cache}: {self.name} holds fp8 scales for it; use fp8")
        grids = {
            kind(grid): grid for grid in (*contents.schemes.values(), *contents.outer.values()) if grid is not None
        }
        if not grids:
            raise BadInput("no linear is quantized")
        return list(grids.values())

    def one_kind(self, contents: ModelScheme) -> Grid:
        """The weight grid of a model that has only one kind; raises BadInput where there are several."""
        grids = self.kinds(contents)
        if len(grids) > 1:
            raise BadInput(
                f"{self.name} has one kind of weight for all layers, and these have {', '.join(map(str, grids))}; "
                "use compressed-tensors, or `ignore` in the place of `overrides`"
            )
        return grids[0]

    @abstractmethod
    def pack(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of linear `name`. Raises BadInput for what cannot be stored exactly."""

    @abstractmethod
    def unpack(self, name: str, read: Callable[[str], Tensor], grid: Grid, shape: tuple[int, int]) -> QuantizedLinear:
        """The record of linear `name`, weight [out, in] = `shape`; raises BadInput for tensors that do not fit."""

    def scattered(self, name: str, read: Callable[[str], Tensor], grid: Grid, in_features: int) -> bool:
        """Whether the groups of linear `name` are scattered columns, by its tensors and not by the config."""
        return False

    @abstractmethod
    def packed_bytes(
        self, grid: Grid, out_features: int, in_features: int, scale_bytes: int, activations: Activations | None = None
    ) -> int:
        """Bytes of the tensors `pack` makes of one linear with such inputs, scales of `scale_bytes` each."""

    def keeps_codes(self, grid: Grid, activations: Activations | None = None) -> bool:
        """Whether what `pack` makes of the codes of a weight with such inputs lies in their own memory."""
        return False

    @abstractmethod
    def linears(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> dict[str, tuple[int, int]]:
        """The quantized linears among the tensors {name: shape} of a checkpoint: {name: (out, in)}."""

    @abstractmethod
    def config(self, contents: ModelScheme) -> dict[str, Any]:
        """The quantization_config of a model; raises BadInput for schemes that cannot be mixed in one model."""

    @abstractmethod
    def grids(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Grid | None]:
        """Read a quantization_config: the grid of each linear, None for one it explicitly leaves in 16 bit.

        Names it does not mention are absent. Raises BadInput for a config that cannot be read.
        """

    def activations(self, config: dict[str, Any]) -> Activations | None:
        """How a quantization_config quantizes inputs; raises BadInput for what cannot be computed here."""
        return None

    def dynamic(self, config: dict[str, Any], names: Iterable[str]) -> frozenset[str]:
        """Those of the linears `names` whose inputs have dynamic scales where `activations` are static."""
        return frozenset()

    def inputs(self, name: str, read: Callable[[str], Tensor], spec: Activations, grid: Grid) -> Inputs:
        """How the inputs of linear `name` are rounded, with the static scales stored beside it."""
        raise BadInput(f"{name}: this format holds no activation scales ({spec})")

    def kv_cache(self, config: dict[str, Any]) -> str | None:
        """`fp8` or `int8` when a quantization_config announces scales of a key-value cache, else None."""
        scheme = config.get("kv_cache_scheme")
        if scheme is None:
            return None
        found = (scheme.get("type"), scheme.get("num_bits")) if isinstance(scheme, dict) else scheme
        if found not in _CACHES:
            raise BadInput(f"quantization_config: kv_cache_scheme {scheme} cannot be read; known: 8-bit float and int")
        return _CACHES[found]

    def extra_files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """JSON files written beside config.json."""
        return {}


AS_WEIGHTS = Activations(type="as-weights")


def beside_weights(inputs: Iterable[tuple[Activations | None, Grid]]) -> bool:
    """Whether the inputs of all linears are those that as-weights stands for."""
    return all(grid.type in ("fp8", "nvfp4") and spec == AS_WEIGHTS.beside(grid) for spec, grid in inputs)


def kind(grid: Grid) -> Kind:
    return grid.type, grid.bits, grid.group_size, grid.symmetric


def grid_of(bits: Any, group_size: Any, symmetric: Any) -> Grid:
    """The integer grid of a config; raises BadInput for one that is not supported."""
    try:
        return Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    except ValidationError:
        raise BadInput(
            f"the artifact is quantized to {bits} bits, group size {group_size}, symmetric {symmetric}; "
            "known are 2 to 8 bits in groups of a multiple of 8, or per channel (-1)"
        ) from None


def take(name: str, read: Callable[[str], Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Read a tensor; raises BadInput for another shape, or another dtype where one is given."""
    tensor = read(name)
    if dtype is not None and tensor.dtype != dtype:
        found, wanted = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
        raise BadInput(f"{name}: {found} where {wanted} is read")
    if tuple(tensor.shape) != shape:
        raise BadInput(f"{name}: shape {list(tensor.shape)} where the config asks for {list(shape)}")
    return tensor


def positive(name: str, scale: Tensor) -> Tensor:
    """`scale`, which may be stored as [] or [1], as float32 []; raises BadInput unless it is finite and above 0."""
    scale = scale.to(torch.float32)
    if scale.numel() != 1 or not 0 < float(scale) < math.inf:
        raise BadInput(f"{name}: one positive, finite number is needed")
    return scale.reshape(())


def in_float16(format: str, name: str, scales: Tensor) -> Tensor:
    """`scales` as float16; raises BadInput where that changes one."""
    out = scales.to(torch.float16)
    lost = out.to(torch.float32) != scales.to(torch.float32)
    if bool(lost.any()):
        worst = scales[lost].to(torch.float32).abs().min()
        raise BadInput(
            f"{name}: {format} stores scales in float16, and {worst.item():.9g} ({scales.dtype}) is not exact there; "
            "use compressed-tensors"
        )
    return out


def left_out(format: str, schemes: dict[str, Grid | None], extra: Iterable[str]) -> list[str]:
    """Names of the modules left in 16 bit, for readers that skip every module whose name contains one of them.

    transformers also reads a name as a regular expression. Raises BadInput when a quantized linear would be skipped,
    and when only some experts of a layer are quantized, which servers hold as one.
    """
    quantized = [name for name, grid in schemes.items() if grid is not None]
    names = list(dict.fromkeys([*(name for name, grid in schemes.items() if grid is None), *extra]))
    if "embed_out" in names:
        names.append("lm_head")  # what transformers calls the same head
    for layer in dict.fromkeys(name.partition(".experts.")[0] for name in names if ".experts." in name):
        names.append(f"{layer}.experts")
    for name in names:
        taken = next((q for q in quantized if name in q or regex_matches(name, q)), None)
        if taken is not None:
            raise BadInput(
                f"{format} leaves out modules by a part of their name, and {name} (16 bit) is part of {taken} "
                "(quantized); use compressed-tensors, or quantize both or neither"
            )
    return names


def patterns(schemes: Mapping[str, _T]) -> dict[str, _T]:
    """Few anchored regular expressions that match the names: {pattern: kind}, no name matched by two.

    Layers whose names differ only in numbers share a pattern if they are all of one kind.
    """
    families: dict[tuple[str | None, ...], dict[str, _T]] = {}  # by their names' parts, None for a number
    for name, value in schemes.items():
        family = tuple(None if part.isdigit() else part for part in name.split("."))
        families.setdefault(family, {})[name] = value
    out: dict[str, _T] = {}
    for family, members in families.items():
        if len(set(members.values())) == 1:
            pattern = r"\.".join(r"\d+" if part is None else re.escape(part) for part in family)
            out[f"^{pattern}$"] = next(iter(members.values()))
        else:
            out |= {f"^{re.escape(name)}$": value for name, value in members.items()}
    return out
