"""A format of safetensors that keeps each code in a byte, scales and zeros beside it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from quantpress.formats.base import Format, ModelScheme, grid_of, take
from quantpress.numbers.grid import QuantizedLinear
from quantpress.numbers.types import Activations, Grid


class Bytes(Format):
    """One kind of weight for all layers; the names of the quantized linears stand in config.json."""

    name = method = "bytes"
    suffixes = ("codes", "scales", "zeros")

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        return {f"{name}.codes": q.codes, f"{name}.scales": q.scales, f"{name}.zeros": q.zeros}

    def unpack(self, name: str, read: Callable[[str], Tensor], grid: Grid, shape: tuple[int, int]) -> QuantizedLinear:
        codes = take(f"{name}.codes", read, shape, torch.uint8)
        return QuantizedLinear(codes, read(f"{name}.scales"), read(f"{name}.zeros"), grid)

    def packed_bytes(
        self, grid: Grid, out_features: int, in_features: int, scale_bytes: int, activations: Activations | None = None
    ) -> int:
        return out_features * (in_features + (scale_bytes + 1) * in_features // grid.columns(in_features))

    def linears(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> dict[str, tuple[int, int]]:
        found = {name.removesuffix(".codes"): shape for name, shape in shapes.items() if name.endswith(".codes")}
        return {name: (shape[0], shape[1]) for name, shape in found.items()}

    def config(self, contents: ModelScheme) -> dict[str, Any]:
        grid = self.one_kind(contents)
        names = [name for name, own in contents.schemes.items() if own is not None]
        kind = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
        return {"quant_method": self.method, **kind, "linears": names}

    def grids(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Grid | None]:
        grid = grid_of(config["bits"], config["group_size"], config["symmetric"])
        return {name: grid if name in config["linears"] else None for name in names}
