"""A GGUF file rounded by our own methods: which type each tensor gets, and its bytes from what the blocks left."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ..calibration import Tokens
from ..errors import BadInput
from ..formats import ggml
from ..grid import Grid
from ..methods import ROUNDERS
from ..model import Linear
from ..recipe import BlockGrid, GgmlType, Recipe, Rtn, ScaleSearch, matches
from . import budget
from .architectures import to_gguf
from .convert import Conversion
from .layout import Entry, float_type
from .mixes import Choice, FileType, Model, TensorType, choose, fitting
from .writer import Tensor, sizes, write

if TYPE_CHECKING:
    from ..job import Job

_ROWS = 4096  # of an embedding or a head rounded at a time
_MOSTLY = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # the file type named after a type of tensor
Types = dict[str, Choice | None]


def types(recipe: Recipe, conversion: Conversion) -> Types:
    """The type of each tensor of the file, None for those left in float32: the mix's, then `tensor_types`.

    Raises BadInput for a file type that our rounders have no grids for.
    """
    wanted = recipe.gguf_file
    if wanted.type not in get_args(FileType) or not set(wanted.tensor_types.values()) <= {*get_args(GgmlType), "F16"}:
        raise BadInput(
            f"gguf.type {wanted.type}: method {recipe.method.name} rounds to {', '.join(get_args(FileType))}; "
            "others are made by method llama.cpp"
        )
    shapes = {entry.name: entry.shape for entry in conversion.entries}
    found = choose(cast(FileType, wanted.type), shapes, _model(conversion), imatrix=recipe.calibrated)
    for name, choice in found.items():
        own = next((kind for pattern, kind in wanted.tensor_types.items() if matches(pattern, name)), None)
        if own is not None and choice is not None:
            found[name] = Choice("F16") if own == "F16" else fitting(cast(GgmlType, own), shapes[name][-1])
    return found


def _model(conversion: Conversion) -> Model:
    name = str(conversion.metadata["general.architecture"])
    heads = int(conversion.metadata[f"{name}.attention.head_count"])
    return Model(
        architecture=name,
        blocks=int(conversion.metadata[f"{name}.block_count"]),
        heads=heads,
        kv_heads=int(conversion.metadata.get(f"{name}.attention.head_count_kv", heads)),
        experts=int(conversion.metadata.get(f"{name}.expert_count", 0)),
    )


def schemes(recipe: Recipe, entries: list[Entry], linears: list[Linear], chosen: Types) -> dict[str, Grid | None]:
    """The grid of each linear, None where its tensor is not quantized; with calibration scales are weighted by it."""
    tensor = {parameter: entry.name for entry in entries for parameter in entry.parameters}
    search: ScaleSearch = "activation" if recipe.calibrated and isinstance(recipe.method, Rtn) else "mse"
    out: dict[str, Grid | None] = {}
    for linear in linears:
        choice = chosen[tensor[f"{linear.name}.weight"]]
        out[linear.name] = None
        if choice is not None and choice.type != "F16":
            out[linear.name] = BlockGrid(type=choice.type, scale_search=search)
    return out


def within_budget(job: "Job", conversion: Conversion, chosen: Types, tokens: Tokens) -> Types:
    """The types that cost least within `gguf.budget`, by what errors in each tensor do to the predictions.

    The whole model is loaded for this. Raises BadInput where the smallest file is larger, and for a model whose
    matrices are not all linears and embeddings of their own.
    """
    wanted = job.recipe.gguf_file
    assert wanted.budget is not None
    model: Any = AutoModelForCausalLM.from_pretrained(job.source.path, dtype=torch.float32).eval()
    uses = {job.skeleton.disk_name(f"{n}.weight"): u for n, u in budget.measure(model, tokens.ids).items()}
    shapes = {entry.name: entry.shape for entry in conversion.entries}
    prices: dict[str, dict[TensorType, float]] = {}
    for entry in conversion.entries:
        if chosen[entry.name] is not None:
            if entry.parameters[0] not in uses or entry.stacked:
                raise BadInput(f"gguf.budget: {entry.name} is no matrix of its own in {job.source.id}; give gguf.type")
            weight = conversion.read(replace(entry, change=None if entry.change != "transposed" else entry.change))
            prices[entry.name] = budget.costs(weight, uses[entry.parameters[0]])
    fixed = sum(file_sizes(job.recipe, conversion, chosen)) - sum(
        budget.tensor_bytes(shapes[name], choice.type) for name, choice in chosen.items() if choice is not None
    )
    found = budget.assign(shapes, prices, (allowed(job.recipe, conversion) or 0) - fixed)
    return {name: Choice(found[name]) if name in found else None for name in chosen}


def allowed(recipe: Recipe, conversion: Conversion) -> int | None:
    """The bytes that the budget allows the file, or its parts together; None without one."""
    wanted = recipe.gguf_file.budget
    if wanted is None or wanted.bits_per_weight is None:
        return None if wanted is None else wanted.bytes
    parameters = sum(int(torch.Size(entry.shape).numel()) for entry in conversion.entries)
    return int(wanted.bits_per_weight * parameters / 8)


def file_sizes(recipe: Recipe, conversion: Conversion, chosen: Types) -> list[int]:
    """The bytes of the file, or of each of its parts, with these types."""
    nothing = {name: lambda: np.empty(0) for name in chosen}
    return sizes(_metadata(recipe, conversion, chosen), _tensors(conversion, chosen, nothing), recipe.gguf_file.split)


def notes(conversion: Conversion, chosen: Types) -> dict[str, str]:
    """Tensors whose rows are not whole blocks of the type they were to get: why, and what they got."""
    columns = {entry.name: entry.shape[-1] for entry in conversion.entries}
    return {
        name: f"rows of {columns[name]} are not whole {choice.wanted} blocks: {choice.wanted} -> {choice.type}"
        for name, choice in chosen.items()
        if choice is not None and choice.wanted is not None
    }


def save(job: "Job", conversion: Conversion, chosen: Types, parts: list[Path], target: Path) -> None:
    """Write the file from the parts that the blocks left; what is outside of them is rounded to nearest here."""
    of = {f"{x.name}.weight": parts[x.block] for x in job.linears if job.schemes[x.name] is not None}
    bytes_of = {entry.name: _bytes(conversion, entry, chosen[entry.name], of) for entry in conversion.entries}
    metadata = _metadata(job.recipe, conversion, chosen)
    write(target, metadata, _tensors(conversion, chosen, bytes_of), job.recipe.gguf_file.split)


def _metadata(recipe: Recipe, conversion: Conversion, chosen: Types) -> dict[str, Any]:
    name: str = recipe.gguf_file.type
    if recipe.gguf_file.budget is not None:
        most = Counter(choice.type for choice in chosen.values() if choice is not None).most_common(1)[0][0]
        name = _MOSTLY.get(most, most)
    kind = int(LlamaFileType[f"MOSTLY_{name}"])
    return conversion.metadata | {"general.file_type": kind, "general.quantization_version": gguf.GGML_QUANT_VERSION}


def _tensors(
    conversion: Conversion, chosen: Types, bytes_of: Mapping[str, Callable[[], np.ndarray[Any, Any]]]
) -> list[Tensor]:
    out = conversion.constants()
    for entry in conversion.entries:
        choice = chosen[entry.name]
        if choice is None or choice.type == "F16":
            kind = GGMLQuantizationType.F32 if choice is None else GGMLQuantizationType.F16
            out.append(conversion.tensor(entry, float_type(entry, kind)))
        else:
            kind = GGMLQuantizationType[choice.type]
            out.append(Tensor(entry.name, kind, entry.shape, bytes_of[entry.name]))
    return out


def _bytes(
    conversion: Conversion, entry: Entry, choice: Choice | None, parts: Mapping[str, Path]
) -> Callable[[], np.ndarray[Any, Any]]:
    """What makes the bytes of a quantized tensor: from the parts of its block, or rounded to nearest."""

    def packed(name: str) -> torch.Tensor:
        with safe_open(parts[name], framework="pt") as file:
            rows: torch.Tensor = file.get_tensor(name)
        # Rounding goes row by row, so that an order of rows is as good after it; columns are in place already.
        return rows if entry.change in (None, "transposed") else to_gguf(entry.change, rows, conversion.config)

    def from_parts() -> np.ndarray[Any, Any]:
        rows = [packed(name) for name in entry.parameters]
        return (torch.stack(rows) if entry.stacked else rows[0]).numpy()

    def nearest() -> np.ndarray[Any, Any]:
        assert choice is not None
        grid = BlockGrid(type=cast(GgmlType, choice.type))
        weight = conversion.read(entry)
        pieces = [ggml.pack(ROUNDERS["rtn"](w, grid, Rtn(), None, None).linear) for w in torch.split(weight, _ROWS)]
        return torch.cat(pieces).numpy()

    return from_parts if entry.parameters[0] in parts else nearest
