"""A GGUF file rounded by our own methods: the types of its tensors, its size, and its bytes."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from safetensors import safe_open

from ..calibrate.sensitivity import measure
from ..core.errors import BadInput
from ..formats import ggml_blocks as ggml
from ..methods import ROUNDERS
from ..models.placed_model import LinearLayer
from ..models.skeleton import Skeleton
from ..numbers.grid import Grid
from ..numbers.types import BlockGrid, GgmlType, ScaleSearch
from ..recipe import Recipe, Rtn
from . import budget
from .conversion import Conversion
from .imatrix import Array
from .layout import Entry, float_type
from .mixes import Choice, TensorType
from .tensor_map import to_gguf
from .tensor_types import Types, our_types, own_types
from .writer import FileTensor, sizes, write

_ROWS = 4096  # of an embedding or head that are rounded at a time
_MOSTLY = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # file type by the type of most tensors


@dataclass(frozen=True)
class RoundedFile:
    """The GGUF file of a recipe with one of our own methods.

    types: of each tensor by its GGUF name, None for one left in float32.
    """

    recipe: Recipe
    conversion: Conversion
    types: Types

    @classmethod
    def of(cls, recipe: Recipe, conversion: Conversion) -> Self:
        """The file with the types of the recipe's mix. Raises BadInput for a type that we have no grid for."""
        return cls(recipe, conversion, our_types(recipe, conversion))

    def schemes(self, linears: list[LinearLayer]) -> dict[str, Grid | None]:
        """The grid of each linear by its on-disk name, None where its tensor is not quantized."""
        recipe = self.recipe
        weighted = not recipe.method.calibrated and (recipe.calibrated or bool(recipe.gguf_file.imatrix))
        search: ScaleSearch = "activation" if weighted else "mse"
        of: dict[str, Grid | None] = {}
        for entry in self.conversion.entries:
            choice, grid = self.types[entry.name], None
            if entry.by_rows and choice is not None and choice.type != "F16":
                grid = BlockGrid(type=choice.type, scale_search=search)
            of |= dict.fromkeys(entry.parameters, grid)
        return {linear.name: of.get(f"{linear.name}.weight") for linear in linears}

    @property
    def allowed_bytes(self) -> int | None:
        """The most that `gguf.budget` allows the file, or its parts together; None without a budget."""
        wanted = self.recipe.gguf_file.budget
        if wanted is None or wanted.bits_per_weight is None:
            return None if wanted is None else wanted.bytes
        parameters = sum(int(torch.Size(entry.shape).numel()) for entry in self.conversion.entries)
        return int(wanted.bits_per_weight * parameters / 8)

    def most_bytes(self, room: int) -> int:
        """The most that the file takes of the `room` that `gguf.budget` allows: all, or what the largest types take.

        Raises BadInput where the smallest types there are take more.
        """
        own = own_types(self.recipe, self.conversion.entries)
        smallest, largest = dict(self.types), dict(self.types)
        for entry in self.conversion.entries:
            if self.types[entry.name] is not None and entry.name not in own:
                sizes = {kind: budget.bytes_in_file(entry.shape, kind) for kind in budget.candidates(entry.shape[-1])}
                smallest[entry.name] = Choice(min(sizes, key=sizes.__getitem__))
                largest[entry.name] = Choice(max(sizes, key=sizes.__getitem__))
        least, most = (sum(replace(self, types=types).sizes()) for types in (smallest, largest))
        if least > room:
            raise BadInput(
                f"gguf.budget allows {room} bytes, and with the smallest types the file takes {least}; raise it"
            )
        return min(room, most)

    def within_budget(self, skeleton: Skeleton, tokens: torch.Tensor, work: Path) -> Types:
        """The types that change the predictions least within `gguf.budget`; those of `gguf.tensor_types` stay.

        skeleton: the original in float32. tokens [samples, seq_len]: the text to measure its sensitivity on. work: a
        folder for temporary hidden states. Raises BadInput where even the smallest types are too large.
        """
        uses = measure(skeleton, tokens, work)
        shapes = {entry.name: entry.shape for entry in self.conversion.entries}
        prices: dict[str, dict[TensorType, float]] = {}
        own = own_types(self.recipe, self.conversion.entries)
        for entry in self.conversion.entries:
            choice = self.types[entry.name]
            if choice is not None and (entry.name in own or not entry.by_rows):
                prices[entry.name] = {choice.type: 0.0}
            elif choice is not None:
                # Rows in the order of `uses`.
                plain = replace(entry, changes=tuple(change for change in entry.changes if change == "transposed"))
                weight = self.conversion.read(plain)
                of = [uses[parameter.removesuffix(".weight")] for parameter in entry.parameters]
                prices[entry.name] = budget.costs(weight.unbind() if entry.stacked else [weight], of)
        fixed = sum(self.sizes()) - sum(
            budget.bytes_in_file(shapes[name], choice.type) for name, choice in self.types.items() if choice is not None
        )
        found = budget.assign(shapes, prices, (self.allowed_bytes or 0) - fixed)
        return {name: Choice(found[name]) if name in found else None for name in self.types}

    def sizes(self) -> list[int]:
        """The bytes of the file, or of each of its parts."""
        nothing = {name: lambda: np.empty(0) for name in self.types}
        return sizes(self._metadata(), self._tensors(nothing), self.recipe.gguf_file.split)

    def save(self, target: Path, parts: Mapping[str, Path], importance: Mapping[str, Array]) -> None:
        """Write the file; quantized tensors outside the blocks are rounded to nearest here.

        parts: the safetensors file that holds each rounded weight, by on-disk name. importance: mean squares [1, in] of
        the inputs of tensors outside the blocks, by GGUF name, where they are known.
        """
        known = {name: torch.from_numpy(columns[0]) for name, columns in importance.items()}
        bytes_of = {
            entry.name: _bytes(self.conversion, entry, self.types[entry.name], parts, known.get(entry.name))
            for entry in self.conversion.entries
        }
        write(target, self._metadata(), self._tensors(bytes_of), self.recipe.gguf_file.split)

    def _metadata(self) -> dict[str, Any]:
        name: str = self.recipe.gguf_file.type
        if self.recipe.gguf_file.budget is not None:
            most = Counter(choice.type for choice in self.types.values() if choice is not None).most_common(1)[0][0]
            name = _MOSTLY.get(most, most)
        kind = int(LlamaFileType[f"MOSTLY_{name}"])
        version = gguf.GGML_QUANT_VERSION
        return self.conversion.metadata | {"general.file_type": kind, "general.quantization_version": version}

    def _tensors(self, bytes_of: Mapping[str, Callable[[], np.ndarray[Any, Any]]]) -> list[FileTensor]:
        out = self.conversion.constants()
        for entry in self.conversion.entries:
            choice = self.types[entry.name]
            if choice is None or choice.type == "F16":
                kind = GGMLQuantizationType.F32 if choice is None else GGMLQuantizationType.F16
                out.append(self.conversion.tensor(entry, float_type(entry, kind)))
            else:
                kind = GGMLQuantizationType[choice.type]
                out.append(FileTensor(entry.name, kind, entry.shape, bytes_of[entry.name]))
        return out


def _bytes(
    conversion: Conversion,
    entry: Entry,
    choice: Choice | None,
    parts: Mapping[str, Path],
    importance: torch.Tensor | None,
) -> Callable[[], np.ndarray[Any, Any]]:
    """A function that makes the bytes of a quantized tensor: from its block's part, or by rounding to nearest."""

    def packed(name: str) -> torch.Tensor:
        with safe_open(parts[name], framework="pt") as file:
            rows: torch.Tensor = file.get_tensor(name)
        # Each row is rounded by itself, so rows can still be reordered; the columns are already in GGUF's order.
        changes = tuple(change for change in entry.changes if change != "transposed")
        return to_gguf(changes, rows, conversion.config)

    def from_parts() -> np.ndarray[Any, Any]:
        rows = [packed(name) for name in entry.parameters]
        return (torch.stack(rows) if entry.stacked else rows[0]).numpy()

    def nearest() -> np.ndarray[Any, Any]:
        assert choice is not None
        grid = BlockGrid(type=cast(GgmlType, choice.type), scale_search="mse" if importance is None else "activation")
        rows = torch.split(conversion.read(entry).reshape(-1, entry.shape[-1]), _ROWS)
        return torch.cat([ggml.pack(ROUNDERS["rtn"](w, grid, Rtn(), importance, None).linear) for w in rows]).numpy()

    return from_parts if entry.parameters and entry.parameters[0] in parts else nearest
