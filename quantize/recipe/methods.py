"""Transforms and methods of a recipe: their settings, and what recipe and engine ask of them."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, Union

from pydantic import Field, model_validator

from ..core.plugins import added
from ..core.schema import Lax, Strict
from ..numbers.types import Grid, NumberType
from ..plugin import MethodSettings

Objective = Literal["kl", "next_token"]
LEAST_DAMP, MOST_DAMP = 0.01, 0.5  # where a recipe names no damping


class TransformSettings(Strict):
    """A transform's settings, and what it declares about itself.

    calibrated: whether it looks at the inputs that the calibration text makes.
    """

    name: str
    calibrated: ClassVar[bool] = True

    @property
    def scales_tried(self) -> int:
        """Scales it compares for each group of linears, at most; the plan's estimate of time counts them."""
        return 0


class SmoothQuant(TransformSettings):
    """SmoothQuant, arXiv:2211.10438: outliers of the inputs are moved into the weights, channel by channel."""

    name: Literal["smoothquant"] = Field("smoothquant", description="selects SmoothQuant")
    alpha: Annotated[float, Lax, Field(ge=0, le=1)] | Literal["search"] = Field(
        0.5, description="share of a channel's range that is moved; search: the one with the least output error"
    )

    @property
    def scales_tried(self) -> int:
        return 12


class Awq(TransformSettings):
    """AWQ, arXiv:2306.00978: channels with large inputs get larger weights, and so a finer grid."""

    name: Literal["awq"] = Field("awq", description="selects AWQ")
    points: int = Field(20, ge=2, le=100, description="number of strengths tried between none and full")

    @property
    def scales_tried(self) -> int:
        return self.points


class Hadamard(TransformSettings):
    """Offline rotation of the residual stream and of the value heads, folded into the weights (QuaRot, SpinQuant)."""

    calibrated: ClassVar[bool] = False

    name: Literal["hadamard"] = Field("hadamard", description="selects the Hadamard rotation")
    seed: int = Field(0, ge=0, description="of the random signs")


Transform = Annotated[SmoothQuant | Awq | Hadamard, Field(discriminator="name")]


class Rtn(MethodSettings):
    """Round to nearest: takes seconds; calibration only if scale_search, a transform or static scales need it."""

    block_types: ClassVar[bool] = True

    name: Literal["rtn"] = Field("rtn", description="selects rounding to nearest")


class Gptq(MethodSettings):
    """GPTQ, arXiv:2210.17323: later columns compensate the rounding error of earlier ones."""

    block_types: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    name: Literal["gptq"] = Field("gptq", description="selects GPTQ")
    damp: float | None = Field(
        None,
        gt=0,
        lt=1,
        strict=False,
        description="damping: this times the mean of the Hessian's diagonal is added to it; by default 0.01, and more "
        "where a linear sees few tokens for its inputs: inputs / (2 x tokens), at most 0.5",
    )
    order: Literal["group_aware", "activation", "natural"] = Field(
        "group_aware",
        description="order the columns are solved in: group_aware sorts inside groups and then the groups; "
        "activation sorts all columns by the Hessian's diagonal",
    )
    static_groups: bool = Field(
        True, description="with order activation: groups stay contiguous on disk. false writes desc_act files"
    )
    weighted_scales: bool = Field(
        True, description="scale search weighs each column by the variance that later columns cannot compensate"
    )
    error_correction: float = Field(
        0.5,
        ge=0,
        le=1,
        strict=False,
        description="QEP strength (arXiv:2504.09629), how far the weight moves to undo the error already in the "
        "linear's inputs; above 0 the original model runs beside, about twice the compute",
    )

    @model_validator(mode="after")
    def _groups_need_activation_order(self) -> Self:
        if not self.static_groups and self.order != "activation":
            raise ValueError(f"static_groups: false needs order: activation, not {self.order}")
        return self

    def damping(self, inputs: int, tokens: int) -> float:
        """For a linear of so many inputs that saw so many tokens.

        With few tokens the inputs of other text correlate otherwise than those of the calibration, and what later
        columns make up for here does harm there; damped more, they make up for less.
        """
        return self.damp or min(MOST_DAMP, max(LEAST_DAMP, inputs / (2 * max(1, tokens))))

    @property
    def paired(self) -> bool:
        return self.error_correction > 0

    @property
    def shuffled(self) -> bool:
        return not self.static_groups

    def check(self, grid: Grid) -> None:
        super().check(grid)
        if self.shuffled and grid.group_size == -1:
            raise ValueError("static_groups: false has no effect per channel (group_size -1); drop it")
        if self.shuffled and grid.type != "int":
            raise ValueError("static_groups: false is for weights of type int; drop it")


class Tuned(MethodSettings):
    """Shared settings of the methods that train a rounded block as a whole by gradient steps."""

    types: ClassVar[tuple[NumberType, ...]] = ("int",)
    calibrated: ClassVar[bool] = True

    batch_size: int = Field(
        2, ge=1, description="calibration sequences a step; small batches and more steps gain more for the same compute"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this many steps without a better block; null: never, since the error often rises "
        "before it falls. The best block is kept in any case",
    )
    seed: int = Field(0, ge=0, description="of the order of the sequences")
    start: Literal["gptq", "rtn"] = Field("gptq", description="what rounds the block before it is tuned")
    error_correction: float = Field(
        0.5,
        ge=0,
        le=1,
        strict=False,
        description="QEP strength of a start from gptq; the original model runs beside in any case",
    )

    @property
    def paired(self) -> bool:
        return True

    @property
    def rounder(self) -> MethodSettings:
        return Gptq(error_correction=self.error_correction) if self.start == "gptq" else Rtn()

    @property
    def n_steps(self) -> int:
        """Gradient steps a block."""
        raise NotImplementedError


class AutoRound(Tuned):
    """SignRound, arXiv:2309.05516: codes and ranges of a rounded block trained on the block's output.

    It goes on from GPTQ's result; at 4 bits that adds nothing that was measured, at 3 bits a little.
    """

    name: Literal["autoround"] = Field("autoround", description="selects AutoRound")
    light: bool = Field(False, description="50 steps instead of 200")
    steps: int | None = Field(None, ge=1, description="gradient steps a block; default: 200, light 50")
    lr: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="learning rate of the rounding, in grid steps (of the ranges: a fifth of it, relative); decays "
        "linearly to 0; default: 0.5 / steps",
    )

    @model_validator(mode="after")
    def _light_is_a_number_of_steps(self) -> Self:
        if self.light and self.steps is not None:
            raise ValueError(f"light means 50 steps and steps says {self.steps}: give one of them")
        return self

    @property
    def n_steps(self) -> int:
        return self.steps or (50 if self.light else 200)

    @property
    def first_rate(self) -> float:
        return self.lr or 0.5 / self.n_steps


class EndToEnd(Strict):
    """E2E-QP: the scales of the whole model trained together; a part of the calibration text is held out."""

    objective: Objective = Field(
        "kl",
        description="kl: the divergence from the original's predictions; next_token: the paper's, which also learns "
        "the calibration text",
    )
    steps: int = Field(32, ge=1, description="gradient steps")
    batch_size: int = Field(4, ge=1, description="calibration sequences a step")
    lr: float = Field(
        2e-3, gt=0, strict=False, description="learning rate of the scales, relative; decays linearly to 0"
    )


class Qat(Tuned):
    """EfficientQAT, arXiv:2407.11062: weights, scales and zeros of a rounded block trained through the rounding."""

    name: Literal["qat"] = Field("qat", description="selects EfficientQAT")
    steps: int = Field(200, ge=1, description="gradient steps a block")
    weight_lr: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="learning rate of the weights, in grid steps; decays linearly to 0; default: 0.3 / steps",
    )
    quant_lr: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="learning rate of scales (relative) and zeros (in grid steps); default: 0.1 / steps",
    )
    end_to_end: EndToEnd | None = Field(
        None,
        description="afterwards train the scales of the whole model together, which has to fit in memory; null: no",
    )

    @property
    def n_steps(self) -> int:
        return self.steps

    @property
    def weight_rate(self) -> float:
        return self.weight_lr or 0.3 / self.steps

    @property
    def quant_rate(self) -> float:
        return self.quant_lr or 0.1 / self.steps


class LlamaCppQuantizer(MethodSettings):
    """llama.cpp's own quantizer, for GGUF files; it comes with the extra `llamacpp`."""

    types: ClassVar[tuple[NumberType, ...]] = ()
    block_types: ClassVar[bool] = True

    name: Literal["llama.cpp"] = Field("llama.cpp", description="selects llama.cpp's own quantizer")
    threads: int = Field(0, ge=0, description="0: all cores")


METHODS: dict[str, type[MethodSettings]] = {
    "rtn": Rtn, "gptq": Gptq, "autoround": AutoRound, "qat": Qat, "llama.cpp": LlamaCppQuantizer,
}  # fmt: skip
METHODS |= added("quantpress.methods", MethodSettings, METHODS)

if TYPE_CHECKING:
    Method = MethodSettings
else:  # the union of all methods' settings, told apart by `name`
    Method = Annotated[Union[tuple(METHODS.values())], Field(discriminator="name")]  # noqa: UP007
