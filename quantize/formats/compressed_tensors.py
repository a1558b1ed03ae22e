"""compressed-tensors: the library's config classes for the layouts of layouts.py, for every number type.

Static scales of the inputs are stored beside the weight: input_scale [1] float32 (input_zero_point [1] int8 when they
are asymmetric), or for nvfp4 input_global_scale [1] float32.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.patterns import regex_matches
from ..numbers.activations import columns_of
from ..numbers.grid import BLOCK, Inputs, QuantizedLinear
from ..numbers.types import Activations, Grid
from . import layouts
from .base import AS_WEIGHTS, Format, Kind, ModelScheme, beside_weights, grid_of, kind, patterns, positive, take

# Arguments of the library's QuantizationArgs, as in its presets; those of integers and fp8 follow from the grid.
_WEIGHTS: dict[str, dict[str, Any]] = {
    "fp8-block": {"num_bits": 8, "strategy": "block", "block_structure": [BLOCK, BLOCK]},
    "mxfp8": {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
}
_FP8_TENSOR: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
_FLOAT_GRIDS = [Grid(type="fp8"), Grid(type="fp8", group_size=0), *(Grid(type=t) for t in _WEIGHTS)]  # type: ignore[arg-type]
_SPECS = [
    *(Activations(type="int8", dynamic=d, symmetric=s) for d in (True, False) for s in (True, False)),
    *(Activations(type="fp8", dynamic=d) for d in (True, False)),
    *(Activations(type=t) for t in ("mxfp8", "mxfp4", "nvfp4")),
]


_T = TypeVar("_T")
_Way = tuple[Kind, bool]  # of weights; whether the scales of their inputs are dynamic where others' are static


class CompressedTensors(Format):
    name = method = "compressed-tensors"
    suffixes = layouts.SUFFIXES

    def check(self, grid: Grid, out_features: int, in_features: int, shuffled: bool) -> None:
        super().check(grid, out_features, in_features, shuffled)
        if grid.type == "fp8-block" and (out_features % BLOCK or in_features % BLOCK):
            raise BadInput(
                f"readers of compressed-tensors need whole blocks of {BLOCK} x {BLOCK}, and the weight is "
                f"{out_features} x {in_features}; use type fp8, or add the layer to `ignore`"
            )

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        if q.g_idx is not None:
            raise BadInput(f"{name}: its groups are scattered columns (g_idx), which compressed-tensors cannot hold")
        tensors = layouts.pack_weight(q)
        inputs = q.inputs
        if inputs is not None and inputs.scale is not None:
            tensors[_input_scale(inputs.spec)] = inputs.scale.to(torch.float32).reshape(1)
            if inputs.zero is not None:
                tensors["input_zero_point"] = inputs.zero.to(torch.int8).reshape(1)
        return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def unpack(self, name: str, read: Callable[[str], Tensor], grid: Grid, shape: tuple[int, int]) -> QuantizedLinear:
        grid.check(name, shape[1])
        words = grid.type == "int" and _has(f"{name}.weight_shape", read)
        if words:
            stored = tuple(take(f"{name}.weight_shape", read, (2,)).tolist())
            if stored != shape:
                raise BadInput(f"{name}.weight_shape: {list(stored)} where the model has {list(shape)}")
        return layouts.unpack_weight(name, read, grid, shape, words)

    def packed_bytes(
        self, grid: Grid, out_features: int, in_features: int, scale_bytes: int, activations: Activations | None = None
    ) -> int:
        layout = layouts.layout_of(grid, activations)
        size = layouts.weight_bytes(grid, out_features, in_features, scale_bytes, layout)
        if activations is not None and activations.calibrated:
            size += 4 + (0 if activations.symmetric else 1)
        return size

    def keeps_codes(self, grid: Grid, activations: Activations | None = None) -> bool:
        return grid.bits == 8 and layouts.layout_of(grid, activations) != layouts.INT

    def linears(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> dict[str, tuple[int, int]]:
        out: dict[str, tuple[int, int]] = {}
        for name in shapes:
            linear, _, suffix = name.rpartition(".")
            if suffix == "weight_packed" and f"{linear}.weight_shape" in shapes:
                n_out, n_in = take(f"{linear}.weight_shape", read, (2,)).tolist()
            elif suffix in ("weight", "weight_packed") and f"{linear}.weight_scale" in shapes:
                if len(shapes[name]) != 2:
                    raise BadInput(f"{name}: shape {list(shapes[name])} where a matrix is needed")
                n_out, n_in = shapes[name]
                n_in *= 2 if suffix == "weight_packed" else 1
            else:
                continue
            out[linear] = (n_out, n_in)
        return out

    def config(self, contents: ModelScheme) -> dict[str, Any]:
        # Imported here, because the library takes a second and a half to import.
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
        )

        schemes = {**contents.schemes, **contents.outer}
        kinds: dict[str, _Way | None] = {
            n: None if g is None else (kind(g), n in contents.dynamic) for n, g in schemes.items()
        }
        ignored = [name for name, value in kinds.items() if value is None]
        ignored += [name for name in contents.outside if name not in ignored]
        if "embed_out" in ignored:
            ignored.append("lm_head")  # what transformers calls the same head
        _check_experts(kinds)
        grids = self.kinds(contents)
        spec = contents.activations
        found = set(kinds.values())
        ways = [(grid, dynamic) for grid in grids for dynamic in (False, True) if (kind(grid), dynamic) in found]
        named = patterns(kinds | dict.fromkeys(ignored))
        groups = {
            f"group_{k}": QuantizationScheme(
                targets=["Linear"]
                if len(ways) == 1 and not contents.outer
                else [f"re:{p}" for p, v in named.items() if v == (kind(grid), dynamic)],
                weights=QuantizationArgs(**_weight_args(grid)),
                input_activations=None
                if spec is None
                else QuantizationArgs(**_input_args(spec.at_run_time if dynamic else spec.beside(grid), grid)),
                format=layouts.layout_of(grid, spec),
            )
            for k, (grid, dynamic) in enumerate(ways)
        }
        formats = {scheme.format for scheme in groups.values()}
        config: dict[str, Any] = QuantizationConfig(
            config_groups=groups,
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=ignored,
            kv_cache_scheme=None if contents.kv_cache is None else QuantizationArgs(**_FP8_TENSOR),
        ).model_dump(mode="json")
        if spec is None and len(grids) == 1 and grids[0].type == "int" and not grids[0].symmetric:
            # For transformers, which from 5.23 on compares a file with the shapes that the library (0.20) makes for it,
            # where zero points are not packed. Asymmetric files, the library's own as well, then load only where they
            # are dequantized at once, which is done by one scheme for all layers. Other readers pass the key over.
            config["dequantize"] = True
        return config

    def grids(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Grid | None]:
        parsed = _parse(config)
        return _by_name(parsed, names, [_grid(scheme, parsed.format) for scheme in parsed.config_groups.values()])

    def activations(self, config: dict[str, Any]) -> Activations | None:
        parsed = _parse(config)
        grids = [(scheme, _grid(scheme, parsed.format)) for scheme in parsed.config_groups.values()]
        by_grid = [(_spec(scheme, grid), grid) for scheme, grid in grids]
        found = {spec for spec, _ in by_grid}
        static = [spec for spec in found if spec is not None and not spec.dynamic and spec.type == "int8"]
        if len(found) == 2 and static and static[0].at_run_time in found:
            return static[0]  # but for those of `dynamic`
        if len(found) > 1 and beside_weights(by_grid):
            return AS_WEIGHTS
        if len(found) > 1:
            raise BadInput(
                f"compressed-tensors with {len(found)} kinds of activations in one model cannot be read, only one "
                f"({', '.join(sorted(str(spec or '16 bit') for spec in found))})"
            )
        return next(iter(found), None)

    def dynamic(self, config: dict[str, Any], names: Iterable[str]) -> frozenset[str]:
        parsed, spec = _parse(config), self.activations(config)
        if spec is None or spec.dynamic or spec == AS_WEIGHTS:
            return frozenset()
        inputs = [_spec(scheme, _grid(scheme, parsed.format)) for scheme in parsed.config_groups.values()]
        return frozenset(name for name, one in _by_name(parsed, names, inputs).items() if one == spec.at_run_time)

    def inputs(self, name: str, read: Callable[[str], Tensor], spec: Activations, grid: Grid) -> Inputs:
        columns = columns_of(spec, grid)
        if not spec.calibrated:
            return Inputs(spec, columns)
        stored = f"{name}.{_input_scale(spec)}"
        scale = positive(stored, take(stored, read, (1,)))
        if spec.symmetric:
            return Inputs(spec, columns, scale)
        return Inputs(spec, columns, scale, take(f"{name}.input_zero_point", read, (1,)).to(torch.float32).reshape(()))

    def kv_cache(self, config: dict[str, Any]) -> str | None:
        return "fp8" if config.get("kv_cache_scheme") else None


def _by_name(parsed: Any, names: Iterable[str], values: Sequence[_T]) -> dict[str, _T | None]:
    """The value of its group, of `values`, by the name of each linear; None for one that is ignored."""
    ignore = parsed.ignore or []
    groups = [(scheme.targets, value) for scheme, value in zip(parsed.config_groups.values(), values, strict=True)]
    out: dict[str, _T | None] = {}
    for name in names:
        if _matches(name, ignore):
            out[name] = None
            continue
        # A name takes precedence over a class of modules, as in the library.
        by_name = [value for targets, value in groups if _matches(name, targets)]
        by_class = [value for targets, value in groups if "Linear" in targets]
        if by_name or by_class:
            out[name] = (by_name or by_class)[0]
    return out


def _input_scale(spec: Activations) -> str:
    return "input_global_scale" if spec.type == "nvfp4" else "input_scale"


def _weight_args(grid: Grid) -> dict[str, Any]:
    """The library's QuantizationArgs for weights of `grid`."""
    strategy = {-1: "channel", 0: "tensor"}.get(grid.group_size, "group")
    if grid.type == "int":
        group = {} if strategy == "channel" else {"group_size": grid.group_size}
        return {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": strategy} | group
    return {"type": "float"} | _WEIGHTS.get(grid.type, {"num_bits": 8, "strategy": strategy})


def _input_args(spec: Activations, grid: Grid) -> dict[str, Any]:
    """The library's QuantizationArgs for inputs beside weights of `grid`."""
    if spec.type == "nvfp4":
        return {"type": "float", "dynamic": "local"} | _WEIGHTS["nvfp4"]
    if spec.type in ("mxfp8", "mxfp4"):
        return {"type": "float", "dynamic": True} | _WEIGHTS[spec.type]
    number = {"num_bits": 8, "type": "int" if spec.type == "int8" else "float", "symmetric": spec.symmetric}
    if grid.type == "fp8-block":
        return number | {"strategy": "group", "group_size": BLOCK, "dynamic": True}
    return number | {"strategy": "token" if spec.dynamic else "tensor", "dynamic": spec.dynamic}


def _same(args: Any, wanted: dict[str, Any]) -> bool:
    """Whether parsed QuantizationArgs equal `wanted`; scale_dtype aside, which the layout implies."""
    defaults = {"symmetric": True, "dynamic": False, "group_size": None, "block_structure": None}
    keys = ("num_bits", "type", "strategy", *defaults)
    return all(getattr(args, key) == (defaults | wanted).get(key) for key in keys)


def _parse(config: dict[str, Any]) -> Any:
    """The config as the library's QuantizationConfig; raises BadInput for one it does not accept."""
    from compressed_tensors.quantization import QuantizationConfig

    try:
        return QuantizationConfig.model_validate(config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"quantization_config: compressed-tensors does not accept it: {reason}") from None


def _grid(scheme: Any, default: str) -> Grid:
    layout = getattr(scheme, "format", None) or default
    weights = scheme.weights
    if weights is None or weights.dynamic or scheme.output_activations is not None:
        raise BadInput("compressed-tensors without static weights, or with quantized outputs, cannot be read")
    if weights.type == "int":
        if weights.strategy not in ("group", "channel"):
            raise BadInput(f"compressed-tensors strategy {weights.strategy!r} cannot be read, only group and channel")
        grid = grid_of(weights.num_bits, weights.group_size if weights.strategy == "group" else -1, weights.symmetric)
    else:
        grids = [g for g in _FLOAT_GRIDS if _same(weights, _weight_args(g))]
        if not grids:
            raise BadInput(
                f"compressed-tensors floats of {weights.num_bits} bits, strategy {weights.strategy!r}, group size "
                f"{weights.group_size}, block {weights.block_structure} cannot be read; known are "
                f"{', '.join(map(str, _FLOAT_GRIDS))}"
            )
        grid = grids[0]
    if layout not in layouts.readable(grid):
        known = " or ".join(map(repr, layouts.readable(grid)))
        raise BadInput(f"compressed-tensors format {layout!r} cannot be read for {grid} weights, only {known}")
    return grid


def _spec(scheme: Any, grid: Grid) -> Activations | None:
    inputs = scheme.input_activations
    if inputs is None:
        return None
    for spec in _SPECS:
        if _same(inputs, _input_args(spec, grid)):
            return spec
    raise BadInput(
        f"compressed-tensors activations of {inputs.num_bits} bits ({inputs.type}, strategy {inputs.strategy!r}, "
        f"dynamic {inputs.dynamic}) beside {grid} weights cannot be computed here"
    )


def _check_experts(kinds: dict[str, _Way | None]) -> None:
    """transformers makes one tensor of all experts with the scheme of the first: others would be silently wrong."""
    experts = {value for name, value in kinds.items() if ".experts." in name and value is not None}
    if len(experts) > 1:
        raise BadInput(
            f"compressed-tensors: the experts have {len(experts)} formats, and readers know one for all of them; "
            "give every expert the same"
        )


def _has(name: str, read: Callable[[str], Tensor]) -> bool:
    try:
        read(name)
    except (BadInput, KeyError):
        return False
    return True


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(regex_matches(t[3:], name) if t.startswith("re:") else t == name for t in targets)
