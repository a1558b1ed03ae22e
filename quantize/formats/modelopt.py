"""NVIDIA ModelOpt's checkpoints, as TensorRT-LLM and vLLM read them: one `quant_algo` for all layers, or
MIXED_PRECISION with one for each in `quantized_layers`.

For a weight [out, in]:
FP8                        weight E4M3 [out, in], weight_scale float32 []; the inputs' static input_scale float32 []
FP8_PER_CHANNEL_PER_TOKEN  weight E4M3 [out, in], weight_scale float32 [out]; inputs dynamic
NVFP4, W4A16_NVFP4         weight uint8 [out, in/2], E2M1, the even column in the low nibble; weight_scale E4M3
                           [out, in/16], times weight_scale_2 float32 []; NVFP4 also input_scale float32 []
W4A16_AWQ                  weight uint8 [out/2, in], signed, the even row in the low nibble; weight_scale
                           [out, in/group]; pre_quant_scale [in], which inputs are multiplied by: ones
W8A16                      weight int8 [out, in], weight_scale [out]

The algorithm is in config.json and again in hf_quant_config.json, which TensorRT-LLM prefers.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..numbers.grid import Inputs, QuantizedLinear
from ..numbers.types import Activations, Grid
from .base import AS_WEIGHTS, Format, Kind, ModelScheme, beside_weights, grid_of, kind, left_out, positive, take

_STATIC, _DYNAMIC = Activations(type="fp8", dynamic=False), Activations(type="fp8")
_NVFP4 = Activations(type="nvfp4")
_GROUPS = (64, 128)  # what TensorRT-LLM's 4-bit kernel takes
_ALGORITHMS: dict[tuple[Kind, Activations | None], str] = {
    (("fp8", 8, 0, True), _STATIC): "FP8",
    (("fp8", 8, -1, True), _DYNAMIC): "FP8_PER_CHANNEL_PER_TOKEN",
    (("nvfp4", 4, 16, True), _NVFP4): "NVFP4",
    (("nvfp4", 4, 16, True), None): "W4A16_NVFP4",
    **{(("int", 4, group, True), None): "W4A16_AWQ" for group in _GROUPS},
    (("int", 8, -1, True), None): "W8A16",
}
_KINDS = {weights for weights, _ in _ALGORITHMS}
_MIXED = "MIXED_PRECISION"
_SCALED = "inputs are scaled, which cannot be read as an artifact's; such files can be read as a model to quantize"


class ModelOpt(Format):
    name = method = "modelopt"
    suffixes = ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale", "input_scale")
    cache_suffixes = ("k_proj.k_scale", "v_proj.v_scale")

    def reads(self, quantization: dict[str, Any]) -> bool:
        return str(quantization.get("quant_method")).startswith(self.method)  # modelopt_fp4 too

    def check(self, grid: Grid, out_features: int, in_features: int, shuffled: bool) -> None:
        if kind(grid) not in _KINDS:
            raise BadInput(
                f"modelopt: no reader takes {grid} weights; those known are nvfp4, fp8, int8 channel sym and int4 sym "
                f"in groups of {' or '.join(map(str, _GROUPS))}. Choose one, or compressed-tensors"
            )
        super().check(grid, out_features, in_features, shuffled)
        if kind(grid)[:2] == ("int", 4) and out_features % 2:
            raise BadInput(f"modelopt packs two rows of 4 bits a byte, and out_features {out_features} is odd")

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        self.check(q.grid, q.out_features, q.in_features, q.g_idx is not None)
        tensors: dict[str, Tensor] = {}
        inverse = False
        match q.grid.type, q.grid.bits:
            case "fp8", _:
                weight = q.codes.view(torch.float8_e4m3fn)
                scales = q.scales.to(torch.float32).reshape(() if q.grid.group_size == 0 else -1)
            case "nvfp4", _:
                assert q.global_scale is not None
                weight, scales, inverse = q.codes[:, 0::2] | q.codes[:, 1::2] << 4, q.scales, True
                tensors["weight_scale_2"] = 1 / q.global_scale
            case _, 4:
                signed = q.codes ^ 8  # the nibble of code - 8
                weight, scales = signed[0::2] | signed[1::2] << 4, q.scales
                tensors["pre_quant_scale"] = torch.ones(q.in_features, dtype=q.scales.dtype, device=q.scales.device)
            case _:
                weight, scales = (q.codes ^ 128).view(torch.int8), q.scales.reshape(-1)
        if q.inputs is not None and q.inputs.scale is not None:
            tensors["input_scale"] = 1 / q.inputs.scale if inverse else q.inputs.scale
        tensors |= {"weight": weight, "weight_scale": scales}
        return {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}

    def unpack(self, name: str, read: Callable[[str], Tensor], grid: Grid, shape: tuple[int, int]) -> QuantizedLinear:
        n_out, n_in = shape
        self.check(grid, n_out, n_in, False)
        grid.check(name, n_in)
        groups, overall = n_in // grid.columns(n_in), None
        match grid.type, grid.bits:
            case "fp8", _:
                codes = take(f"{name}.weight", read, shape).view(torch.uint8)
                scales = _scale(name, read).reshape(1, 1) if grid.group_size == 0 else _rows(name, read, n_out)
            case "nvfp4", _:
                codes = _halves(take(f"{name}.weight", read, (n_out, n_in // 2), torch.uint8), -1)
                scales = take(f"{name}.weight_scale", read, (n_out, groups))
                overall = 1 / _scale(name, read, "weight_scale_2")
            case _, 4:
                codes = _halves(take(f"{name}.weight", read, (n_out // 2, n_in), torch.uint8), 0) ^ 8
                scales = take(f"{name}.weight_scale", read, (n_out, groups))
                if not bool((take(f"{name}.pre_quant_scale", read, (n_in,)) == 1).all()):
                    raise BadInput(f"{name}.pre_quant_scale: {_SCALED}")
            case _:
                codes = take(f"{name}.weight", read, shape).view(torch.uint8) ^ 128
                scales = _rows(name, read, n_out)
        middle = 1 << (grid.bits - 1) if grid.type == "int" else 0
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8)
        return QuantizedLinear(codes, scales, zeros, grid, global_scale=overall)

    def packed_bytes(
        self, grid: Grid, out_features: int, in_features: int, scale_bytes: int, activations: Activations | None = None
    ) -> int:
        size = out_features * in_features * grid.bits // 8
        size += 4 if activations is not None and activations.calibrated else 0  # input_scale
        if grid.type == "fp8":
            return size + 4 * (1 if grid.group_size == 0 else out_features)
        if grid.type == "nvfp4":
            return size + out_features * in_features // 16 + 4
        columns = in_features if grid.bits == 4 else 0  # pre_quant_scale
        return size + scale_bytes * (out_features * (in_features // grid.columns(in_features)) + columns)

    def keeps_codes(self, grid: Grid, activations: Activations | None = None) -> bool:
        return grid.type != "int" and grid.bits == 8

    def linears(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> dict[str, tuple[int, int]]:
        out = {}
        for name in (n.removesuffix(".weight_scale") for n in shapes if n.endswith(".weight_scale")):
            weight = shapes.get(f"{name}.weight", ())
            if len(weight) != 2:
                raise BadInput(f"{name}: a weight matrix is needed beside weight_scale")
            rows, columns = weight
            if f"{name}.weight_scale_2" in shapes:
                columns *= 2
            elif len(scale := shapes[f"{name}.weight_scale"]) == 2:
                rows *= 2
                # ModelOpt itself leaves out those that it could fold.
                if f"{name}.pre_quant_scale" not in shapes and scale[0] == rows:
                    raise BadInput(f"{name}: no pre_quant_scale is there, and others' {_SCALED}")
            out[name] = (rows, columns)
        return out

    def config(self, contents: ModelScheme) -> dict[str, Any]:
        grids = self.kinds(contents)
        _check_experts(contents.schemes)
        stated = {kind(grid): _statement(grid, contents.activations) for grid in grids}
        layers = {
            name: stated[kind(grid)] | _scaling(stated[kind(grid)]["quant_algo"])
            for name, grid in contents.schemes.items()
            if grid is not None
        }
        mixed: dict[str, Any] = {"quant_algo": _MIXED, "quantized_layers": layers}
        cache = (
            {} if contents.kv_cache is None else {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
        )
        return {
            "quant_method": "modelopt",
            **(mixed if len(grids) > 1 else stated[kind(grids[0])]),
            **cache,
            "ignore": left_out("modelopt", contents.schemes, contents.outside),
            "producer": {"name": "modelopt", "version": f"quantpress-{version('quantpress')}"},
        }

    def extra_files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        inner: dict[str, Any] = {
            "quant_algo": config["quant_algo"],
            "kv_cache_quant_algo": "FP8" if "kv_cache_scheme" in config else None,
            "exclude_modules": config["ignore"],
            **_scaling(config["quant_algo"]),
        }
        inner |= {key: config[key] for key in ("group_size", "quantized_layers") if key in config}
        return {"hf_quant_config.json": {"producer": config["producer"], "quantization": inner}}

    def grids(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Grid | None]:
        if _is_mixed(config):
            layers = _layers(config)
            return {name: _stated_grid(layers[name]) for name in names if name in layers}
        grid = _stated_grid(config)
        ignored = [str(part) for part in config.get("ignore") or []]
        return {
            name: None if any(part in name or fnmatch.fnmatchcase(name, part) for part in ignored) else grid
            for name in names
        }

    def activations(self, config: dict[str, Any]) -> Activations | None:
        if not _is_mixed(config):
            return _known(config)[1]
        layers = list(_layers(config).values())
        found = {_known(layer)[1] for layer in layers}
        if len(found) > 1 and beside_weights((_known(layer)[1], _stated_grid(layer)) for layer in layers):
            return AS_WEIGHTS
        if len(found) > 1:
            kinds = ", ".join(sorted(str(spec or "16 bit") for spec in found))
            raise BadInput(
                f"quantization_config: modelopt layers with inputs of several kinds ({kinds}) cannot be read"
            )
        return found.pop()

    def inputs(self, name: str, read: Callable[[str], Tensor], spec: Activations, grid: Grid) -> Inputs:
        if not spec.calibrated:
            return Inputs(spec)
        scale = _scale(name, read, "input_scale")
        return Inputs(spec, grid.group_size, 1 / scale) if spec.type == "nvfp4" else Inputs(spec, scale=scale)


def _statement(grid: Grid, activations: Activations | None) -> dict[str, Any]:
    """What a config says of layers of such weights."""
    algorithm = _algorithm(grid, None if activations is None else activations.beside(grid))
    return {"quant_algo": algorithm} | ({"group_size": grid.group_size} if grid.bits == 4 else {})


def _scaling(algorithm: str) -> dict[str, bool]:
    """What hf_quant_config.json says further of an algorithm."""
    return {"has_zero_point": False, "pre_quant_scale": True} if algorithm == "W4A16_AWQ" else {}


def _check_experts(schemes: Mapping[str, Grid | None]) -> None:
    """Raise BadInput where the experts of a block differ: servers hold them as one, by the first that is named."""
    found: dict[str, Grid] = {}
    for name, grid in schemes.items():
        block, inside, _ = name.partition(".experts.")
        if inside and grid is not None and kind(found.setdefault(block, grid)) != kind(grid):
            raise BadInput(f"modelopt: the experts of {block} have {found[block]} and {grid} weights; give them one")


def _is_mixed(config: dict[str, Any]) -> bool:
    return str(config.get("quant_algo")).upper() == _MIXED


def _layers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a mixed config says of each layer."""
    layers = config.get("quantized_layers")
    if not isinstance(layers, dict) or not layers or not all(isinstance(layer, dict) for layer in layers.values()):
        raise BadInput(f"quantization_config: modelopt {_MIXED} needs `quantized_layers`, an algorithm for each layer")
    return layers


def _stated_grid(stated: dict[str, Any]) -> Grid:
    """The weights of a config, or of a layer of a mixed one."""
    weights, _ = _known(stated)
    group_size = stated.get("group_size", weights[2])
    if weights[:2] == ("int", 4) and "group_size" not in stated:
        raise BadInput("quantization_config: modelopt W4A16_AWQ needs `group_size`")
    grid = grid_of(weights[1], group_size, True) if weights[0] == "int" else _float(weights)
    if kind(grid) not in _KINDS:
        raise BadInput(f"quantization_config: {stated['quant_algo']} in groups of {group_size} cannot be read")
    return grid


def _algorithm(grid: Grid, activations: Activations | None) -> str:
    """The quant_algo of such weights and inputs; raises BadInput, naming the inputs that go with the weights."""
    found = _ALGORITHMS.get((kind(grid), activations))
    if found is None:
        fitting = [str(spec or "16 bit") for weights, spec in _ALGORITHMS if weights == kind(grid)]
        asked = "16 bit" if activations is None else str(activations)
        raise BadInput(
            f"modelopt: no reader takes {grid} weights with {asked} activations; "
            + (f"with these weights: {' or '.join(fitting)}" if fitting else "use compressed-tensors")
            + ("; static activations go with group_size 0, dynamic ones with -1" if grid.type == "fp8" else "")
        )
    return found


def _known(config: dict[str, Any]) -> tuple[Kind, Activations | None]:
    """The weights and inputs of a `quant_algo`."""
    stated = str(config.get("quant_algo")).upper()
    for key, algorithm in _ALGORITHMS.items():
        if algorithm == stated:
            return key
    raise BadInput(
        f"quantization_config: modelopt quant_algo {config.get('quant_algo')!r} cannot be read; known: "
        + ", ".join(dict.fromkeys(_ALGORITHMS.values()))
    )


def _float(weights: Kind) -> Grid:
    return Grid.model_validate({"type": weights[0], "group_size": weights[2]})


def _scale(name: str, read: Callable[[str], Tensor], suffix: str = "weight_scale") -> Tensor:
    """A scalar, float32 []; some tools store it as [1]."""
    return positive(f"{name}.{suffix}", read(f"{name}.{suffix}"))


def _rows(name: str, read: Callable[[str], Tensor], n_out: int) -> Tensor:
    """weight_scale, one a row, as [out, 1]."""
    scales = read(f"{name}.weight_scale")
    if tuple(scales.shape) not in ((n_out,), (n_out, 1)):
        raise BadInput(f"{name}.weight_scale: shape {list(scales.shape)} where the config asks for [{n_out}]")
    return scales.reshape(n_out, 1)


def _halves(packed: Tensor, dim: int) -> Tensor:
    """Two nibbles a byte along `dim`, the low one first, as codes uint8."""
    both = torch.stack([packed & 15, packed >> 4], dim=dim % 2 + 1)
    return both.flatten(dim % 2, dim % 2 + 1)
