"""Number formats: what a recipe rounds weights and inputs to."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ..core.errors import BadInput
from ..core.schema import Strict

Bits = Literal[2, 3, 4, 5, 6, 7, 8]  # of integers
GgmlType = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
NumberType = Literal["int", "fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4"]
ScaleSearch = Literal["minmax", "mse", "activation"]

SUPER_BLOCK = 256  # columns that share a super scale in ggml's K types, whose scales are whole numbers

# Bits, group sizes and symmetry of the number types that fix them; group size 0: one scale a tensor.
_LAYOUT: dict[str, tuple[int, tuple[int, ...], bool]] = {
    "fp8": (8, (-1, 0), True), "fp8-block": (8, (128,), True), "mxfp8": (8, (32,), True), "mxfp4": (4, (32,), True),
    "nvfp4": (4, (16,), True),
    "Q4_0": (4, (32,), True), "Q4_1": (4, (32,), False), "Q5_0": (5, (32,), True), "Q5_1": (5, (32,), False),
    "Q8_0": (8, (32,), True), "Q2_K": (2, (16,), False), "Q3_K": (3, (16,), True), "Q4_K": (4, (32,), False),
    "Q5_K": (5, (32,), False), "Q6_K": (6, (16,), True),
}  # fmt: skip


def _group_size(value: int) -> int:
    if value not in (-1, 0) and (value < 8 or value % 8):
        raise ValueError("a multiple of 8, -1 for per channel or 0 for one scale a tensor")
    return value


GroupSize = Annotated[int, AfterValidator(_group_size)]


class Grid(Strict):
    """The number grid of a linear's weight: its codes, and which weights share a scale.

    `int` has 2^bits evenly spaced codes in groups of `group_size` columns of a row. The float types fix their layout:
    fp8 is E4M3 with a scale a row or a tensor, fp8-block one a 128x128 block; mxfp8 (E4M3) and mxfp4 (E2M1) one power
    of two a group of 32 (OCP Microscaling v1.0); nvfp4 E2M1 with an E4M3 scale a group of 16 and one float32 a tensor.
    """

    type: NumberType = Field("int", description="int has evenly spaced levels; the others are floating-point types")
    bits: Bits = Field(4, description="bits of a code, of type int; the others fix theirs")
    group_size: GroupSize = Field(128, description="columns sharing one scale; -1: per channel; 0: the whole tensor")
    symmetric: bool = Field(True, description="of type int: zero is the middle level; false: a zero a group")
    scale_search: ScaleSearch = Field(
        "mse",
        description="minmax: the full range; mse: the range with the least squared error (of 4-bit floats: a power "
        "above 2; of rows of more than 2,048 in fp8 without calibration: minmax); activation: the range with the "
        "least error in the output, by the inputs seen in calibration",
    )

    @model_validator(mode="before")
    @classmethod
    def _most_types_fix_their_layout(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] in _LAYOUT:
            bits, groups, symmetric = _LAYOUT[value["type"]]
            return {"bits": bits, "group_size": groups[0], "symmetric": symmetric} | value
        return value

    @model_validator(mode="after")
    def _layout_fits_the_type(self) -> Self:
        if self.type == "int":
            if self.group_size == 0:
                raise ValueError("group_size 0 (one scale a tensor) is for type fp8; use -1 (per channel)")
            return self
        bits, groups, symmetric = _LAYOUT[self.type]
        if self.bits != bits or self.group_size not in groups or self.symmetric != symmetric:
            sizes, how = " or ".join(map(str, groups)), "is" if symmetric else "is not"
            raise ValueError(
                f"type {self.type} has bits {bits}, group_size {sizes} and {how} symmetric; leave them out"
            )
        return self

    @property
    def uniform(self) -> bool:
        """Whether codes are whole numbers 0 … 2^bits-1 rather than bit patterns of floats."""
        return self.type == "int"

    @property
    def nested(self) -> bool:
        """Whether scales are whole numbers times a super scale, which a span of columns shares."""
        return False

    @property
    def levels(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def shares_rows(self) -> bool:
        """Whether rows of a weight share a scale: all of them, or those of a block."""
        return self.group_size == 0 or self.type == "fp8-block"

    @property
    def shares_across_linears(self) -> bool:
        """Whether linears with the same input must share a scale, because servers fuse them."""
        return self.type == "nvfp4" or self.group_size == 0

    def columns(self, in_features: int) -> int:
        """Columns that share one scale in a row of `in_features`."""
        return in_features if self.group_size in (-1, 0) else self.group_size

    def span(self, in_features: int) -> int:
        """Columns whose scales are fitted together: a super-block where scales are nested, else a group."""
        return self.columns(in_features)

    def divides(self, in_features: int) -> bool:
        """Whether groups fill a row of `in_features`."""
        return self.type == "fp8-block" or in_features % self.columns(in_features) == 0

    def check(self, name: str, in_features: int) -> None:
        """Raise BadInput when `group_size` does not divide `in_features`."""
        if not self.divides(in_features):
            divisors = [str(d) for d in range(8, 257, 8) if in_features % d == 0]
            choose = f"choose {', '.join([*divisors, '-1 (per channel)'])}" if self.type == "int" else "choose fp8"
            raise BadInput(
                f"{name}: in_features {in_features} is not a multiple of group_size {self.group_size}; "
                f"{choose}, or add the layer to `ignore`"
            )

    def __str__(self) -> str:
        if self.type in ("mxfp8", "mxfp4", "nvfp4", "fp8-block"):
            return self.type
        group = {-1: "channel", 0: "tensor"}.get(self.group_size, f"g{self.group_size}")
        if self.type == "fp8":
            return f"fp8 {group}"
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}"


class BlockGrid(Grid):
    """One of ggml's block types, for tensors of GGUF files; `gguf.type` chooses it, not `weights`.

    Evenly spaced codes with a fixed zero: in the middle, or 0 in the asymmetric types, which have an offset beside the
    scale. The K types store both as whole numbers times a float16 that 256 columns share.
    """

    type: GgmlType  # type: ignore[assignment]

    @property
    def uniform(self) -> bool:
        return True

    @property
    def nested(self) -> bool:
        return self.type.endswith("_K")

    def span(self, in_features: int) -> int:
        return SUPER_BLOCK if self.nested else self.group_size

    def check(self, name: str, in_features: int) -> None:
        """Raise BadInput when rows of `in_features` are not whole blocks."""
        if in_features % self.span(in_features):
            raise BadInput(
                f"{name}: {self.type} needs rows of a multiple of {self.span(in_features)}, not {in_features}"
            )

    def __str__(self) -> str:
        return self.type


class Activations(Strict):
    """What the inputs of quantized linears are rounded to at run time.

    A dynamic scale is computed for each token (mxfp8, mxfp4: for each group of 32 of a token); a static one, one a
    tensor, is measured in calibration. nvfp4 has both: a static float32 a tensor and a dynamic E4M3 a group of 16.
    """

    type: Literal["int8", "fp8", "mxfp8", "mxfp4", "nvfp4", "as-weights"] = Field(
        description="number type; it has to go with the type of the weights. as-weights: beside nvfp4 weights nvfp4, "
        "beside fp8 weights fp8, static where they have one scale a tensor (group_size 0)"
    )
    dynamic: bool = Field(
        True,
        description="true: a scale for each token, at run time; false: one, from calibration; int8 inputs in which a "
        "token would lose three tenths of its norm by it keep dynamic ones, but for those of experts",
    )
    symmetric: bool = Field(True, description="false: int8 inputs have a zero point, too")

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if not self.dynamic and self.type not in ("int8", "fp8"):
            raise ValueError(f"activations of type {self.type} have dynamic scales: leave `dynamic` out")
        if not self.symmetric and self.type != "int8":
            raise ValueError(f"activations of type {self.type} are symmetric: leave `symmetric` out")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether a scale has to be measured in calibration, of some linear at least."""
        return not self.dynamic or self.type in ("nvfp4", "as-weights")

    @property
    def at_run_time(self) -> "Activations":
        """The same numbers with dynamic scales."""
        return self.model_copy(update={"dynamic": True})

    def beside(self, weights: Grid) -> "Activations":
        """The inputs of a linear with such weights: themselves, but for as-weights.

        Raises BadInput for as-weights beside weights that have no inputs of their own type.
        """
        if self.type != "as-weights":
            return self
        if weights.type not in ("fp8", "nvfp4"):
            raise BadInput(f"activations of type as-weights go with fp8 and nvfp4 weights, not with {weights}")
        return Activations(type=weights.type, dynamic=weights.group_size != 0)

    def __str__(self) -> str:
        how = ("dynamic" if self.dynamic else "static") if self.type in ("int8", "fp8") else ""
        return " ".join(filter(None, (self.type, how, "" if self.symmetric else "asym")))
