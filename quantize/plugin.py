"""What the settings of a plug-in are made of; torch and the recipe are not imported here.

A package adds a rounding method, a file format or a server by entry points; see docs/plug-ins.md. Modules that
`quantpress.methods`, `quantpress.file_formats` and `quantpress.servers` name are imported with every recipe: they may
import this module, `quantpress.core`, `quantpress.numbers.types` and `quantpress.exports.servers`, and not torch.
"""

from dataclasses import dataclass
from typing import ClassVar, get_args

from .core.schema import Strict
from .numbers.types import Grid, NumberType

__all__ = ["FileFormat", "MethodSettings"]


@dataclass(frozen=True)
class FileFormat:
    """What the files of a format can hold, as far as a recipe has to know.

    types: number types of weights it has a layout for. input_scales: whether it holds scales for the inputs of
    linears and for a key-value cache. scattered: whether it names the group of each column (g_idx, desc_act). conv1d:
    whether readers of it find the transposed linears of GPT-2. convertible: whether it is safetensors with one linear's
    tensors side by side, which `convert` reads and writes.
    """

    types: tuple[NumberType, ...]
    input_scales: bool = False
    scattered: bool = False
    conv1d: bool = False
    convertible: bool = True


class MethodSettings(Strict):
    """A method's settings, and what it declares about itself: recipe and engine ask these and know no method by name.

    types: the number types it can round weights to. block_types: whether it rounds to ggml's too, for GGUF files.
    calibrated: whether it needs the inputs that the calibration text makes. A rounder is given them as their second
    moment; a linear that no token reached has none, is rounded to nearest instead, and the manifest says so.
    """

    name: str
    types: ClassVar[tuple[NumberType, ...]] = get_args(NumberType)
    block_types: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False

    @property
    def paired(self) -> bool:
        """Whether the original model runs beside the rounded one, so that a rounder is given the drift of its inputs.

        See `gptq` for what that is.
        """
        return False

    @property
    def shuffled(self) -> bool:
        """Whether groups become scattered columns, named by g_idx (desc_act files)."""
        return False

    @property
    def rounder(self) -> "MethodSettings":
        """The settings of what rounds a linear: these, unless the method goes on from another's result."""
        return self

    def check(self, grid: Grid) -> None:
        """Raise ValueError for weights of a recipe that it cannot round to."""
        if grid.type not in self.types:
            raise ValueError(
                f"method {self.name} takes weights of type {', '.join(self.types)}, not {grid}; use gptq or rtn"
            )
