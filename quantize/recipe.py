"""The recipe: what one YAML file may say, checked as a whole before anything is read. No torch here.

recipe_file.py reads it from disk.
"""

import difflib
import fnmatch
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from .errors import BadInput

FormatName = Literal["compressed-tensors", "gptq", "awq", "modelopt"]
Bos = Literal["auto", "always", "never"]
NumberType = Literal["int", "fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4"]
ScaleSearch = Literal["minmax", "mse", "activation"]
Objective = Literal["kl", "next_token"]

# Bits, and the columns that share a scale, of the number types that leave no choice; 0: one scale a tensor.
_LAYOUT: dict[str, tuple[int, tuple[int, ...]]] = {
    "fp8": (8, (-1, 0)), "fp8-block": (8, (128,)), "mxfp8": (8, (32,)), "mxfp4": (4, (32,)), "nvfp4": (4, (16,)),
}  # fmt: skip

# The weight types a format has a layout for, and the input types that servers compute with (type, bits).
_HELD: dict[str, tuple[str, ...]] = {
    "compressed-tensors": ("int", "fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4"),
    "gptq": ("int",),
    "awq": ("int",),
    "modelopt": ("int", "fp8", "nvfp4"),
}
_INPUTS: dict[tuple[str, int], tuple[str, ...]] = {
    ("int", 8): ("int8",), ("int", 4): ("int8", "fp8"), ("fp8", 8): ("fp8",), ("fp8-block", 8): ("fp8",),
    ("mxfp8", 8): ("mxfp8",), ("mxfp4", 4): ("mxfp4",), ("nvfp4", 4): ("nvfp4",),
}  # fmt: skip


class Strict(BaseModel):
    """Unknown keys fail, and so does `true` for a number; only lists and floats (YAML reads 1e-2 as text) convert."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _fraction(value: Any) -> Any:
    """'3%' is 0.03; a bare number is the fraction itself."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


def _pattern(value: str) -> str:
    if not value:
        raise ValueError("an empty pattern matches nothing")
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
    return value


def _group_size(value: int) -> int:
    if value not in (-1, 0) and (value < 8 or value % 8):
        raise ValueError("a multiple of 8, -1 for per channel or 0 for one scale a tensor")
    return value


Lax = Field(strict=False)
Fraction = Annotated[float, Lax, BeforeValidator(_fraction)]
Pattern = Annotated[str, AfterValidator(_pattern)]
GroupSize = Annotated[int, AfterValidator(_group_size)]


class Text(Strict):
    """Where text comes from."""

    source: str = Field(
        "default",
        description="`default` (the embedded text), a .txt or .jsonl file, or a hub dataset id such as "
        "Salesforce/wikitext; for calibration also `self`: text the model itself generates",
    )
    config: str | None = Field(None, description="dataset configuration, such as wikitext-2-raw-v1")
    split: str = Field("train", description="dataset split")
    revision: str | None = Field(None, description="dataset commit, tag or branch")
    column: str = Field("text", description="the field of a JSONL line or dataset row that holds the text")
    bos: Bos = Field("auto", description="BOS before each sequence: auto does what the tokenizer does")

    @model_validator(mode="after")
    def _dataset_keys_need_a_dataset(self) -> Self:
        kind = Path(self.source).suffix.lower()
        if kind not in (".txt", ".jsonl") and self.source not in ("default", "self"):
            return self
        for key in ("config", "split", "revision") + (() if kind == ".jsonl" else ("column",)):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} {getattr(self, key)!r} means nothing for source {self.source!r}: drop it, or name a "
                    f"{'.jsonl file or ' if key == 'column' else ''}hub dataset"
                )
        return self


class Calibration(Text):
    """The text that shows the rounder what the activations look like."""

    samples: int = Field(128, ge=1, description="sequences")
    seq_len: int = Field(512, ge=8, description="tokens a sequence")
    seed: int = Field(0, ge=0, description="which part of the text is taken, and `self` generation")
    chat_template: bool = Field(False, description="wrap each text as a user's turn in the model's chat template")


class Evaluation(Text):
    """Perplexity, and divergence from the original, over windows of one text."""

    split: str = "test"
    windows: int = Field(16, ge=1, description="windows, from the start of the text")
    window: int = Field(1024, ge=16, description="tokens a window")
    stride: int | None = Field(None, ge=1, description="tokens between window starts; default: the window")

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride {self.stride} is larger than window {self.window}: tokens would be left out")
        if self.source == "self":
            raise ValueError("`self` is a calibration source; evaluate on text the model did not write")
        return self


class Gates(Strict):
    """Limits that fail the run with exit code 3."""

    max_perplexity_increase: Fraction | None = Field(None, ge=0, description="over the original: 3% or 0.03")
    max_kl: float | None = Field(
        None, ge=0, strict=False, description="mean KL divergence from the original, nats a token"
    )
    min_top1_agreement: Fraction | None = Field(None, ge=0, le=1, description="98% or 0.98")
    max_bytes: int | None = Field(None, ge=1, description="weights on disk")


class Grid(Strict):
    """The number grid of a linear's weight: its codes, and which of them share a scale.

    `int` has 2^bits evenly spaced codes in groups of `group_size` columns of a row. The float types fix their layout:
    fp8 is E4M3 with a scale a row or a tensor, fp8-block one a 128x128 block; mxfp8 (E4M3) and mxfp4 (E2M1) one power
    of two a group of 32 (OCP Microscaling v1.0); nvfp4 E2M1 with an E4M3 scale a group of 16 and one float32 a tensor.
    """

    type: NumberType = "int"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: GroupSize = Field(128, description="columns sharing one scale; -1: per channel; 0: the whole tensor")
    symmetric: bool = True
    scale_search: ScaleSearch = Field(
        "mse",
        description="minmax: the range; mse: the range with the least squared error; activation: that error weighted "
        "by the inputs that meet it in calibration",
    )

    @model_validator(mode="before")
    @classmethod
    def _float_types_fix_their_layout(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in _LAYOUT:
            bits, groups = _LAYOUT[value["type"]]
            return {"bits": bits, "group_size": groups[0]} | value
        return value

    @model_validator(mode="after")
    def _layout_fits_the_type(self) -> Self:
        if self.type == "int":
            if self.group_size == 0:
                raise ValueError("group_size 0 (one scale a tensor) is for type fp8; use -1 (per channel)")
            return self
        bits, groups = _LAYOUT[self.type]
        if self.bits != bits or self.group_size not in groups or not self.symmetric:
            sizes = " or ".join(map(str, groups))
            raise ValueError(f"type {self.type} has bits {bits}, group_size {sizes} and is symmetric; leave them out")
        return self

    @property
    def levels(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def shares_across_linears(self) -> bool:
        """Whether servers, which fuse linears with one input, want these to have one scale in common."""
        return self.type == "nvfp4" or self.group_size == 0

    def columns(self, in_features: int) -> int:
        """Columns that share one scale in a row of `in_features`."""
        return in_features if self.group_size in (-1, 0) else self.group_size

    def check(self, name: str, in_features: int) -> None:
        """Raise BadInput when `group_size` does not divide `in_features`."""
        if self.type != "fp8-block" and in_features % self.columns(in_features):
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


class Activations(Strict):
    """What the inputs of quantized linears are rounded to when the artifact runs.

    Dynamic scales are one a token (mxfp8, mxfp4: one a group of 32 of a token); a static one is one a tensor, measured
    in calibration. nvfp4 has both: a static float32 a tensor and an E4M3 scale a group of 16, found as it runs.
    """

    type: Literal["int8", "fp8", "mxfp8", "mxfp4", "nvfp4"]
    dynamic: bool = True
    symmetric: bool = True

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if not self.dynamic and self.type not in ("int8", "fp8"):
            raise ValueError(f"activations of type {self.type} find their scales as they run: leave `dynamic` out")
        if not self.symmetric and self.type != "int8":
            raise ValueError(f"activations of type {self.type} are symmetric: leave `symmetric` out")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether a scale has to be measured beforehand."""
        return not self.dynamic or self.type == "nvfp4"

    def __str__(self) -> str:
        how = ("dynamic" if self.dynamic else "static") if self.type in ("int8", "fp8") else ""
        return " ".join(filter(None, (self.type, how, "" if self.symmetric else "asym")))


class SmoothQuant(Strict):
    """SmoothQuant, arXiv:2211.10438: outliers of the inputs move into the weights, channel by channel."""

    name: Literal["smoothquant"] = "smoothquant"
    alpha: Annotated[float, Lax, Field(ge=0, le=1)] | Literal["search"] = Field(
        0.5, description="share of a channel's range that moves; search: the best by each linear group's output error"
    )


class Awq(Strict):
    """AWQ, arXiv:2306.00978: channels with large inputs get larger weights, and so a finer grid."""

    name: Literal["awq"] = "awq"
    points: int = Field(20, ge=2, le=100, description="strengths tried between none and full")


class Hadamard(Strict):
    """Offline rotation of the residual stream and of the value heads, folded into the weights (QuaRot, SpinQuant)."""

    name: Literal["hadamard"] = "hadamard"
    seed: int = Field(0, ge=0, description="of the random signs")


Transform = Annotated[SmoothQuant | Awq | Hadamard, Field(discriminator="name")]


class Rtn(Strict):
    """Round to nearest: seconds; no calibration unless the scale search, a transform or static inputs want it."""

    name: Literal["rtn"] = "rtn"


class Gptq(Strict):
    """GPTQ, arXiv:2210.17323: each column's rounding error is pushed onto the columns still to come."""

    name: Literal["gptq"] = "gptq"
    damp: float = Field(
        0.01, gt=0, lt=1, strict=False, description="times the mean of the Hessian's diagonal, added to it"
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
        True, description="scale search weighs each column by the variance later columns cannot make up for"
    )
    error_correction: float = Field(
        0.5,
        ge=0,
        le=1,
        strict=False,
        description="share of the error already in a linear's inputs that its weight makes up for; above 0 the "
        "original model runs beside, twice the work",
    )
    correction: Literal["qep", "gptaq"] = Field(
        "qep",
        description="how: qep, arXiv:2504.09629, moves the weight before it is rounded; gptaq, arXiv:2504.02692, moves "
        "the columns still to come as each is rounded (try error_correction 0.25 with it)",
    )

    @model_validator(mode="after")
    def _groups_need_activation_order(self) -> Self:
        if not self.static_groups and self.order != "activation":
            raise ValueError(f"static_groups: false needs order: activation, not {self.order}")
        return self


class Tuned(Strict):
    """What the methods share that tune a block as a whole, by gradient steps, once it is rounded."""

    batch_size: int = Field(4, ge=1, description="calibration sequences a step")
    patience: int | None = Field(
        None,
        ge=1,
        description="steps without a better block after which to stop; null: never, the error often rises before it "
        "falls. The best block met is kept in any case",
    )
    seed: int = Field(0, ge=0, description="of the order the sequences are met in")
    start: Literal["gptq", "rtn"] = Field("gptq", description="what rounds the block before it is tuned")
    error_correction: float = Field(
        0.5, ge=0, le=1, strict=False, description="of a start from gptq; the original model runs beside in any case"
    )

    @property
    def n_steps(self) -> int:
        """Gradient steps a block."""
        raise NotImplementedError


class AutoRound(Tuned):
    """SignRound, arXiv:2309.05516: a rounded block's codes and ranges tuned by gradient steps on its output."""

    name: Literal["autoround"] = "autoround"
    light: bool = Field(False, description="50 steps instead of 200")
    steps: int | None = Field(None, ge=1, description="gradient steps a block; default: 200, light 50")
    lr: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="what the first step moves a rounding, in steps of the grid (ranges: by a fifth of it as a "
        "share); falls to 0 in a line; default: 0.5 / steps",
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
    """E2E-QP: the scales of the whole model trained together, a part of the calibration text held out."""

    objective: Objective = Field(
        "kl",
        description="kl: the divergence from the original's predictions; next_token: the paper's, which also learns "
        "the calibration text",
    )
    steps: int = Field(32, ge=1, description="gradient steps, of `batch_size` sequences")
    lr: float = Field(
        2e-3, gt=0, strict=False, description="what the first step moves a scale, as a share; falls to 0 in a line"
    )


class Qat(Tuned):
    """EfficientQAT, arXiv:2407.11062: a rounded block's weights, scales and zeros trained through the rounding."""

    name: Literal["qat"] = "qat"
    steps: int = Field(200, ge=1, description="gradient steps a block")
    weight_lr: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="what the first step moves a weight, in steps of the grid; falls to 0 in a line; default: "
        "0.3 / steps",
    )
    quant_lr: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="what it moves a scale, as a share, and a zero, in steps of the grid; default: 0.1 / steps",
    )
    end_to_end: EndToEnd | None = Field(
        None, description="then the scales of the whole model together; it has to fit in memory. null: no"
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


Method = Annotated[Rtn | Gptq | AutoRound | Qat, Field(discriminator="name")]


class Override(Strict):
    """Layers that match get other settings; the last override that matches a layer decides each key."""

    match: Pattern = Field(description="a glob such as *.down_proj, or re: and a regular expression")
    type: NumberType | None = None
    bits: Literal[2, 3, 4, 8] | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    scale_search: ScaleSearch | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.settings():
            raise ValueError(f"override for {self.match!r} changes nothing; to leave layers alone use `ignore`")
        return self

    def settings(self) -> dict[str, Any]:
        return self.model_dump(exclude={"match"}, exclude_none=True)

    def applied_to(self, grid: Grid) -> Grid:
        """`grid` with these settings; another type brings its own layout."""
        settings = self.settings()
        kept = {"scale_search"} if settings.get("type", grid.type) != grid.type else set(Grid.model_fields)
        return Grid.model_validate(grid.model_dump(include=kept) | settings)


class Recipe(Strict):
    """Everything a run does, in one validated document."""

    name: str = Field("recipe", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: str = Field(
        "smollm2-135m", min_length=1, description="a folder, a hub id org/name[@revision], a .gguf file or smollm2-135m"
    )
    calibration: Calibration = Calibration()
    transforms: tuple[Transform, ...] = Field(
        (), strict=False, description="what is done to the weights, in this order, before they are rounded"
    )
    method: Method = Gptq()
    weights: Grid = Grid()
    activations: Activations | None = Field(None, description="inputs rounded as the artifact runs; null: 16 bit")
    kv_cache: Literal["fp8"] | None = Field(
        None, description="scales for a quantized key-value cache, one a layer, measured in calibration"
    )
    ignore: tuple[Pattern, ...] = Field(
        (), strict=False, description="patterns of linears left in 16 bit, beside embeddings and head"
    )
    overrides: tuple[Override, ...] = Field((), strict=False)
    formats: tuple[FormatName, ...] = Field(
        ("compressed-tensors",),
        min_length=1,
        strict=False,
        description="the first is the artifact, the others converted from it",
    )
    evaluation: Evaluation | None = Evaluation()
    gates: Gates = Gates()

    @field_validator("method", mode="before")
    @classmethod
    def _method_has_a_name(cls, value: Any) -> Any:
        """`method: {damp: 0.02}` and `--set method.damp=0.02` speak of the default method."""
        return {"name": "gptq"} | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _pairs_are_possible(self) -> Self:
        if len(set(self.formats)) != len(self.formats):
            raise ValueError(f"formats {list(self.formats)} names one twice")
        gates = self.gates
        measured = (gates.max_perplexity_increase, gates.max_kl, gates.min_top1_agreement)
        if self.evaluation is None and any(gate is not None for gate in measured):
            raise ValueError("gates on quality need an evaluation; `evaluation: null` switches it off")
        if any(isinstance(transform, Hadamard) for transform in self.transforms[1:]):
            raise ValueError("transform hadamard comes first, and once: what follows it has to see the rotated model")
        grids = [self.weights, *(o.applied_to(self.weights) for o in self.overrides)]
        if self.shuffled and any(grid.group_size == -1 for grid in grids):
            raise ValueError("static_groups: false means nothing per channel (group_size -1); drop it")
        if self.shuffled and any(grid.type != "int" for grid in grids):
            raise ValueError("static_groups: false is for weights of type int; drop it")
        for format in self.formats:
            wrong = [str(grid) for grid in grids if str(grid.type) not in _HELD[format]]
            if wrong:
                raise ValueError(
                    f"format {format} cannot hold {wrong[0]} weights; it takes type {', '.join(_HELD[format])}"
                )
        if self.tuned and any(grid.type != "int" for grid in grids):
            raise ValueError(f"method {self.method.name} tunes weights of type int; use gptq or rtn for others")
        if self.tuned and (self.activations is not None or self.kv_cache is not None):
            raise ValueError(
                f"method {self.method.name} tunes weights for 16-bit inputs: leave activations and kv_cache out"
            )
        if isinstance(self.method, Qat) and self.method.end_to_end is not None and self.calibration.samples < 2:
            raise ValueError("method.end_to_end holds a sequence out: calibration.samples has to be 2 or more")
        if self.activations is not None:
            kind = self.activations.type
            for grid in grids:
                if kind not in _INPUTS.get((grid.type, grid.bits), ()):
                    can = _INPUTS.get((grid.type, grid.bits), ())
                    raise ValueError(
                        f"{grid} weights with {kind} activations: no server computes that pair; "
                        + (f"activations of type {' or '.join(can)} go with them" if can else "leave activations out")
                    )
            if self.weights.type == "fp8-block" and not self.activations.dynamic:
                raise ValueError("fp8-block weights take dynamic activations: leave `dynamic` out")
            if {"gptq", "awq"} & set(self.formats):
                raise ValueError(
                    "formats gptq and awq hold weights only; activations need compressed-tensors or modelopt"
                )
        if self.kv_cache is not None and {"gptq", "awq"} & set(self.formats):
            raise ValueError("formats gptq and awq hold no kv_cache scales; use compressed-tensors or modelopt")
        return self

    @property
    def shuffled(self) -> bool:
        """Whether groups become scattered columns (desc_act files)."""
        return isinstance(self.method, Gptq) and not self.method.static_groups

    @property
    def tuned(self) -> bool:
        """Whether each block is tuned after it is rounded."""
        return isinstance(self.method, Tuned)

    @property
    def rounder(self) -> Rtn | Gptq:
        """What rounds a linear: the method itself, or the one that a tuned block starts from."""
        if isinstance(self.method, Tuned):
            return Gptq(error_correction=self.method.error_correction) if self.method.start == "gptq" else Rtn()
        return self.method

    @property
    def paired(self) -> bool:
        """Whether the original model runs beside the rounded one."""
        return self.tuned or (isinstance(self.method, Gptq) and self.method.error_correction > 0)

    @property
    def calibrated(self) -> bool:
        """Whether text has to run through the model before anything can be rounded."""
        searches = {self.weights.scale_search, *(o.scale_search for o in self.overrides)}
        return (
            not isinstance(self.method, Rtn)
            or any(not isinstance(transform, Hadamard) for transform in self.transforms)
            or "activation" in searches
            or (self.activations is not None and self.activations.calibrated)
            or self.kv_cache is not None
        )

    def schemes(self, linears: dict[str, int]) -> dict[str, Grid | None]:
        """The grid of each linear {name: in_features}; None for one that is ignored.

        Raises BadInput for a pattern without a match and a group size that does not divide.
        """
        for pattern in (*self.ignore, *(o.match for o in self.overrides)):
            if not any(matches(pattern, name) for name in linears):
                near = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.0)
                raise BadInput(f"pattern {pattern!r} matches no linear layer; the nearest names are {', '.join(near)}")
        out: dict[str, Grid | None] = {}
        for name, in_features in linears.items():
            if any(matches(pattern, name) for pattern in self.ignore):
                out[name] = None
                continue
            grid = self.weights
            for override in self.overrides:
                if matches(override.match, name):
                    grid = override.applied_to(grid)
            grid.check(name, in_features)
            out[name] = grid
        if all(grid is None for grid in out.values()):
            raise BadInput(f"`ignore` {list(self.ignore)} matches every linear layer: nothing is left to quantize")
        return out


def matches(pattern: str, name: str) -> bool:
    """Whether a glob, or `re:` and a regular expression that matches from the start, takes in `name`."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)
