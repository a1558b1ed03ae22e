"""What a recipe may say about the method, and what the files of the format can hold."""

from typing import ClassVar, Literal

from pydantic import Field

from quantpress.numbers.types import NumberType
from quantpress.plugin import FileFormat, MethodSettings


class Stochastic(MethodSettings):
    """Stochastic rounding: up or down by chance, so that the mean of many roundings is the weight itself."""

    types: ClassVar[tuple[NumberType, ...]] = ("int",)

    name: Literal["stochastic"] = Field("stochastic", description="selects stochastic rounding")
    seed: int = Field(0, ge=0, description="of the chance")


BYTES = FileFormat(types=("int",))
