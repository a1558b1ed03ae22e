"""How a run stores the tensors of a GGUF file before it writes the file: each linear as the raw bytes of its rows."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..core.errors import BadInput
from ..numbers.grid import QuantizedLinear
from ..numbers.types import Activations, BlockGrid, Grid
from . import ggml_blocks as ggml
from .base import Format, ModelScheme, take


class Gguf(Format):
    """One tensor a linear, `weight` uint8 [out, row bytes]; its ggml type is known from the recipe only."""

    name = method = "gguf"
    suffixes = ("weight",)

    def check(self, grid: Grid, out_features: int, in_features: int, shuffled: bool) -> None:
        if not isinstance(grid, BlockGrid):
            raise BadInput(f"a GGUF file holds ggml's block types, not {grid}")

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        return {f"{name}.weight": ggml.pack(q)}

    def unpack(self, name: str, read: Callable[[str], Tensor], grid: Grid, shape: tuple[int, int]) -> QuantizedLinear:
        assert isinstance(grid, BlockGrid)
        data = take(f"{name}.weight", read, (shape[0], ggml.row_bytes(grid, shape[1])))
        return ggml.unpack(data, grid, shape[1])

    def packed_bytes(
        self, grid: Grid, out_features: int, in_features: int, scale_bytes: int, activations: Activations | None = None
    ) -> int:
        assert isinstance(grid, BlockGrid)
        return out_features * ggml.row_bytes(grid, in_features)

    def linears(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> dict[str, tuple[int, int]]:
        raise BadInput("the parts of a GGUF run do not say their types: read the GGUF file")

    def config(self, contents: ModelScheme) -> dict[str, Any]:
        return {}  # the file describes itself

    def grids(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Grid | None]:
        raise BadInput("the parts of a GGUF run do not say their types: read the GGUF file")
