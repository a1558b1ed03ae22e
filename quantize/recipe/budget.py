"""A size for the artifact, and the number formats that its linears may have."""

from typing import Self

from pydantic import Field, model_validator

from ..core.schema import Bytes, Strict
from ..numbers.types import Grid


class Budget(Strict):
    """Each group of linears that servers fuse gets the number format that changes the predictions least."""

    bytes: Bytes | None = Field(None, ge=1, description="size of all the weights in the artifact, such as 3.2G")
    bits: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="average bits of a weight in the blocks' linears, scales and zeros included",
    )
    menu: tuple[Grid | None, ...] = Field(
        (Grid(bits=4, group_size=64), Grid(bits=8, group_size=64), None),
        min_length=2,
        strict=False,
        description="number formats to choose from, as `weights`; null is 16 bit",
    )

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if (self.bytes is None) == (self.bits is None):
            raise ValueError("give one of bytes and bits")
        if len(set(self.menu)) != len(self.menu):
            raise ValueError("menu names one number format twice")
        return self

    @property
    def grids(self) -> list[Grid]:
        """The menu without 16 bit."""
        return [grid for grid in self.menu if grid is not None]
