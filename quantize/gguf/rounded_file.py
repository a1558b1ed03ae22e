"""A GGUF file rounded by our own methods: its types within a budget, and its bytes from what the blocks left."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from safetensors import safe_open

from ..calibrate.tokens import Tokens
from ..core.errors import BadInput
from ..formats import ggml_blocks as ggml
from ..methods import ROUNDERS
from ..models.skeleton import Linear, Skeleton
from ..numbers.grid import Grid
from ..numbers.types import BlockGrid, GgmlType, ScaleSearch
from ..recipe import Recipe, Rtn
from . import budget
from .conversion import Conversion
from .imatrix import Array
from .layout import Entry, float_type
from .mixes import Choice, TensorType
from .sensitivity import measure
from .tensor_map import to_gguf
from .tensor_types import Types, own_types
from .writer import Tensor, sizes, write

if TYPE_CHECKING:
    from ..engine.job import Job

_ROWS = 4096  # of an embedding or a head rounded at a time
_MOSTLY = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # the file type named after a type of tensor


def schemes(recipe: Recipe, entries: list[Entry], linears: list[Linear], chosen: Types) -> dict[str, Grid | None]:
    """The grid of each linear, None where its tensor is not quantized; RTN's scales are weighted by what it knows."""
    tensor = {parameter: entry.name for entry in entries for parameter in entry.parameters}
    weighted = not recipe.method.calibrated and (recipe.calibrated or bool(recipe.gguf_file.imatrix))
    search: ScaleSearch = "activation" if weighted else "mse"
    out: dict[str, Grid | None] = {}
    for linear in linears:
        choice = chosen[tensor[f"{linear.name}.weight"]]
        out[linear.name] = None
        if choice is not None and choice.type != "F16":
            out[linear.name] = BlockGrid(type=choice.type, scale_search=search)
    return out


def within_budget(job: "Job", conversion: Conversion, chosen: Types, tokens: Tokens, work: Path) -> Types:
    """The types that cost least within `gguf.budget`, by what errors in each tensor do to the predictions.

    Those of `gguf.tensor_types` stay. `work`: where hidden states may lie meanwhile. Raises BadInput where the smallest
    file is larger.
    """
    skeleton = Skeleton(job.checkpoint, device=job.skeleton.device, dtype=torch.float32)
    uses = measure(skeleton, tokens.ids, work)
    shapes = {entry.name: entry.shape for entry in conversion.entries}
    prices: dict[str, dict[TensorType, float]] = {}
    own = own_types(job.recipe, conversion.entries)
    for entry in conversion.entries:
        choice = chosen[entry.name]
        if choice is not None and entry.name in own:
            prices[entry.name] = {choice.type: 0.0}
        elif choice is not None:
            plain = replace(entry, change=entry.change if entry.change == "transposed" else None)  # rows as in `uses`
            weight = conversion.read(plain)
            of = [uses[parameter.removesuffix(".weight")] for parameter in entry.parameters]
            prices[entry.name] = budget.costs(weight.unbind() if entry.stacked else [weight], of)
    fixed = sum(file_sizes(job.recipe, conversion, chosen)) - sum(
        budget.tensor_bytes(shapes[name], choice.type) for name, choice in chosen.items() if choice is not None
    )
    found = budget.assign(shapes, prices, (allowed(job.recipe, conversion) or 0) - fixed)
    return {name: Choice(found[name]) if name in found else None for name in chosen}


def check_budget(recipe: Recipe, conversion: Conversion, chosen: Types) -> None:
    """Raise BadInput where the smallest types there are make a larger file than `gguf.budget` allows."""
    room, own = allowed(recipe, conversion), own_types(recipe, conversion.entries)
    smallest = dict(chosen)
    for entry in conversion.entries:
        if chosen[entry.name] is not None and entry.name not in own:
            kinds = budget.candidates(entry.shape[-1])
            smallest[entry.name] = Choice(min(kinds, key=lambda kind: budget.tensor_bytes(entry.shape, kind)))
    least = sum(file_sizes(recipe, conversion, smallest))
    if room is not None and least > room:
        raise BadInput(
            f"gguf.budget: {room} bytes for the file, and with the smallest types it takes {least}; raise it"
        )


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


def save(
    job: "Job",
    conversion: Conversion,
    chosen: Types,
    parts: list[Path],
    target: Path,
    importance: Mapping[str, Array] | None = None,
) -> None:
    """Write the file from the parts that the blocks left; what is outside of them is rounded to nearest here.

    importance: that of columns [1, in] by tensor, of those outside where it is known.
    """
    of = {f"{x.name}.weight": parts[x.block] for x in job.linears if job.schemes[x.name] is not None}
    known = {name: torch.from_numpy(columns[0]) for name, columns in (importance or {}).items()}
    bytes_of = {
        entry.name: _bytes(conversion, entry, chosen[entry.name], of, known.get(entry.name))
        for entry in conversion.entries
    }
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
    conversion: Conversion,
    entry: Entry,
    choice: Choice | None,
    parts: Mapping[str, Path],
    importance: torch.Tensor | None,
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
        grid = BlockGrid(type=cast(GgmlType, choice.type), scale_search="mse" if importance is None else "activation")
        rows = torch.split(conversion.read(entry), _ROWS)
        return torch.cat([ggml.pack(ROUNDERS["rtn"](w, grid, Rtn(), importance, None).linear) for w in rows]).numpy()

    return from_parts if entry.parameters[0] in parts else nearest
