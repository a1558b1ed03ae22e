"""The recipe as one document, with the checks across its sections."""

import difflib
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from quantpress.exports.servers.loader import refusal

from ..core.errors import BadInput
from ..core.schema import Pattern, Strict, matches, named
from ..numbers.types import Activations, Bits, Grid, GroupSize, NumberType, ScaleSearch
from ..plugin import MethodSettings
from .budget import Budget
from .evaluation import Evaluation
from .file_formats import FILE_FORMATS, FormatName
from .gate_limits import Gates
from .gguf_file import Gguf
from .methods import METHODS, Gptq, Hadamard, LlamaCppQuantizer, Method, Qat, Transform, Tuned
from .smoke import Smoke
from .targets import Target
from .text import Calibration

# The types of inputs that servers compute with, by type and bits of the weights.
_INPUTS: dict[tuple[str, int], tuple[str, ...]] = {
    ("int", 8): ("int8",), ("int", 4): ("int8", "fp8"), ("fp8", 8): ("fp8",), ("fp8-block", 8): ("fp8",),
    ("mxfp8", 8): ("mxfp8",), ("mxfp4", 4): ("mxfp4",), ("nvfp4", 4): ("nvfp4",),
}  # fmt: skip


Outside = Grid | Literal["auto"] | None  # what lies outside the blocks


class Override(Strict):
    """Other settings for the layers that match; of several matching overrides the last one decides each key."""

    match: Pattern = Field(description="a glob such as *.down_proj, or re: and a regular expression")
    type: NumberType | None = Field(None, description="as weights.type; another type brings its own layout")
    bits: Bits | None = Field(None, description="as weights.bits")
    group_size: GroupSize | None = Field(None, description="as weights.group_size")
    symmetric: bool | None = Field(None, description="as weights.symmetric")
    scale_search: ScaleSearch | None = Field(None, description="as weights.scale_search")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.settings():
            raise ValueError(f"override for {self.match!r} changes nothing; to leave layers alone use `ignore`")
        return self

    def settings(self) -> dict[str, Any]:
        return self.model_dump(exclude={"match"}, exclude_none=True)

    def applied_to(self, grid: Grid) -> Grid:
        """`grid` with these settings; another type brings its own layout. Raises ValueError for an impossible grid."""
        settings = self.settings()
        kept = {"scale_search"} if settings.get("type", grid.type) != grid.type else set(Grid.model_fields)
        try:
            return Grid.model_validate(grid.model_dump(include=kept) | settings)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"override for {self.match!r} of {grid} weights: {said}") from None


class Recipe(Strict):
    """Everything a run does, in one validated document."""

    name: str = Field(
        "recipe",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="names the run folder and the report; default: the file's name",
    )
    description: str = Field("", description="one line, shown in lists and in the report")
    model: str = Field(
        "smollm2-135m", min_length=1, description="a folder, a hub id org/name[@revision], a .gguf file or smollm2-135m"
    )
    calibration: Calibration = Field(Calibration(), description="the text that methods and transforms calibrate on")
    transforms: tuple[Annotated[Transform, BeforeValidator(named, json_schema_input_type=Transform | str)], ...] = (
        Field((), strict=False, description="transforms of the weights, in this order, before they are rounded")
    )
    method: Method = Field(Gptq(), description="how weights are rounded")
    weights: Grid = Field(Grid(), description="the number format of quantized weights")
    activations: Activations | None = Field(
        None, description="what the inputs of quantized linears are rounded to at run time; null: 16 bit"
    )
    kv_cache: Literal["fp8"] | None = Field(
        None, description="scales for a quantized key-value cache, one a layer, from calibration; null: none"
    )
    ignore: tuple[Pattern, ...] = Field(
        (), strict=False, description="patterns of linears left in 16 bit, beside embeddings and head"
    )
    budget: Budget | None = Field(
        None, description="a size for the artifact, in the place of `weights` and `overrides`: see its keys"
    )
    head: Outside = Field(
        "auto",
        description="number format of the output head; null: 16 bit; auto: 8 bits, one scale a row, where the weights "
        "are symmetric integers with 16-bit inputs and every named target and transformers load it so",
    )
    embeddings: Outside = Field("auto", description="the same for the embeddings, where the head does not share them")
    towers: bool = Field(
        False,
        description="also quantize, without calibration, the linears in the blocks of a multimodal model's towers, to "
        "8-bit `weights` with dynamic `activations`; for families whose towers vLLM is known to load so",
    )
    overrides: tuple[Override, ...] = Field(
        (), strict=False, description="another number format for some layers; of several that match, the last decides"
    )
    formats: tuple[FormatName, ...] = Field(
        ("compressed-tensors",),
        min_length=1,
        strict=False,
        description="the first is the artifact, the others are converted from it; gguf cannot be combined",
    )
    targets: tuple[Target, ...] = Field(
        (), strict=False, description="servers the artifact is for; what one of them cannot load is refused"
    )
    gguf: Gguf | None = Field(None, description="settings of format gguf; default: a Q4_K_M file")
    evaluation: Evaluation | None = Field(Evaluation(), description="what is measured; null: nothing, and no report")
    gates: Gates = Field(
        Gates(),
        description="limits on what was measured; exit code 3 where one is missed, 4 where it is too close to call",
    )
    smoke: Smoke | None = Field(None, description="smoke test of the artifact on a real server, at the end; null: none")

    @field_validator("method", mode="before", json_schema_input_type=Method | str)
    @classmethod
    def _method_has_a_name(cls, value: Any) -> Any:
        """`method: {damp: 0.02}` and `--set method.damp=0.02` mean the default method."""
        return {"name": "gptq"} | value if isinstance(value, dict) else named(value)

    @model_validator(mode="after")
    def _pairs_are_possible(self) -> Self:
        if len(set(self.formats)) != len(self.formats):
            raise ValueError(f"formats {list(self.formats)} names one twice")
        self._check_gguf()
        gates = self.gates
        measured = set(gates.limits()) - {"max_bytes"}
        if self.evaluation is None and measured:
            raise ValueError("gates on quality need an evaluation; `evaluation: null` switches it off")
        if self.evaluation is not None:
            gates.check(self.evaluation)
        if any(isinstance(transform, Hadamard) for transform in self.transforms[1:]):
            raise ValueError(
                "transform hadamard comes first, and once: what follows it has to work on the rotated model"
            )
        if self.budget is not None:
            self._check_budget()
        if self.towers:
            self._check_towers()
        self._check_grids([grid for _, grid in self._stated_grids()])
        if self.tuned and (self.activations is not None or self.kv_cache is not None):
            raise ValueError(
                f"method {self.method.name} tunes weights for 16-bit inputs: leave activations and kv_cache out"
            )
        if isinstance(self.method, Qat) and self.method.end_to_end is not None and self.calibration.samples < 2:
            raise ValueError("method.end_to_end holds out a sequence: calibration.samples has to be 2 or more")
        for key in ("activations", "kv_cache"):
            without = [name for name in self.formats if not FILE_FORMATS[name].input_scales]
            if getattr(self, key) is not None and without:
                able = [name for name, it in FILE_FORMATS.items() if it.input_scales]
                raise ValueError(f"format {without[0]} holds weights only, no {key}; use {' or '.join(able)}")
        return self

    @model_validator(mode="after")
    def _targets_can_load_it(self) -> Self:
        names = [target.name for target in self.targets]
        if len(set(names)) != len(names):
            raise ValueError(f"targets {names} names one twice")
        self._check_targets(self._stated_grids())
        return self

    def _stated_grids(self) -> list[tuple[str, Grid]]:
        """`weights`, and what each override alone makes of it, or the menu of the budget; each with its recipe key."""
        if self.budget is not None:
            return [(f"budget.menu.{k}", grid) for k, grid in enumerate(self.budget.menu) if grid is not None]
        return [
            ("weights", self.weights),
            *((f"overrides.{k}", o.applied_to(self.weights)) for k, o in enumerate(self.overrides)),
        ]

    def _check_grids(self, grids: Sequence[Grid]) -> None:
        """Raise ValueError for weights that cannot be combined, with each other or with the rest of the recipe."""
        for grid in grids if not self.is_gguf else ():
            self.method.check(grid)
            for format in self.formats:
                held = FILE_FORMATS[format].types
                if grid.type not in held:
                    raise ValueError(f"format {format} cannot hold {grid} weights; it takes type {', '.join(held)}")
        if self.activations is not None:
            for grid in grids:
                kind = self.activations.beside(grid).type
                if kind not in _INPUTS.get((grid.type, grid.bits), ()):
                    can = _INPUTS.get((grid.type, grid.bits), ())
                    raise ValueError(
                        f"{grid} weights with {kind} activations: no server computes that pair; "
                        + (f"activations of type {' or '.join(can)} go with them" if can else "leave activations out")
                    )
            blocks = {grid.type == "fp8-block" for grid in grids}
            if True in blocks and not self.activations.dynamic:
                raise ValueError("fp8-block weights take dynamic activations: leave `dynamic` out")
            if len(blocks) > 1:  # a run rounds the inputs of all layers in one way
                raise ValueError(
                    "fp8-block weights have activations with a scale for every 128 columns, the other layers with one "
                    "for all: give every layer type fp8-block or none, or leave activations out"
                )

    def _check_targets(self, grids: Sequence[tuple[str, Grid]]) -> None:
        """Raise ValueError for weights, each with its recipe key, that a target cannot load."""
        for target in self.targets:
            refused = [
                refusal(target.loader, format, grids, self.activations, scattered=self.shuffled)
                for format in self.formats
            ]
            if all(refused):
                raise ValueError(f"targets: {refused[0]}")

    def _check_budget(self) -> None:
        """Raise ValueError for what a budget decides itself, or cannot be combined with."""
        if self.is_gguf:
            raise ValueError("budget is for safetensors; a GGUF file has gguf.budget")
        for key in ("weights", "overrides"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} beside budget: its menu names the number formats")
        if self.activations is not None and self.activations.type != "as-weights":
            raise ValueError(
                f"activations of type {self.activations.type} beside budget: leave them out, or set type: as-weights"
            )
        if self.formats not in (("compressed-tensors",), ("modelopt",)):
            raise ValueError(
                "a budget mixes number formats, which compressed-tensors and modelopt hold: set formats: "
                "[compressed-tensors]"
            )

    def _check_towers(self) -> None:
        """Raise ValueError for number formats in which no server is known to load towers."""
        eight, inputs = self.weights.type in ("int", "fp8") and self.weights.bits == 8, self.activations
        if not eight or inputs is None or inputs.type == "as-weights" or not inputs.dynamic:
            raise ValueError(
                "towers: servers take those in 8 bits with dynamic activations, as in the recipes fp8-dynamic and "
                "w8a8-rtn; leave towers out to keep them in 16 bit"
            )
        if not self.targets:
            raise ValueError("towers: few servers load them quantized; name yours: targets: [vllm]")
        if self.overrides or self.formats != ("compressed-tensors",):
            raise ValueError(
                "towers: one number format for all layers, in compressed-tensors files alone: leave overrides and "
                "formats out"
            )

    def _check_gguf(self) -> None:
        """Raise ValueError for what a GGUF file excludes, or what only it can have."""
        if "gguf" not in self.formats:
            if not self.method.types or self.gguf is not None:
                what = "the section gguf" if self.method.types else f"method {self.method.name}"
                raise ValueError(f"{what} is for GGUF files: set formats: [gguf]")
            return
        if len(self.formats) > 1:
            raise ValueError("format gguf stands alone: give the others a recipe of their own")
        if not self.method.block_types:
            able = [name for name, settings in METHODS.items() if settings.block_types]
            raise ValueError(f"format gguf with method {self.method.name}: it takes {', '.join(able)}")
        if (
            isinstance(self.method, LlamaCppQuantizer)
            and self.calibration.all_experts
            and self.gguf_file.imatrix is True
        ):
            raise ValueError(
                "calibration.all_experts: an importance matrix is, as llama.cpp's own, of the tokens routed to each "
                "expert: leave it out"
            )
        if isinstance(self.method, LlamaCppQuantizer) and self.gguf is not None and self.gguf.budget is not None:
            raise ValueError(
                "gguf.budget chooses a type for each tensor; method llama.cpp chooses by gguf.type: drop one"
            )
        for key in (
            "weights",
            "head",
            "embeddings",
            "towers",
            "overrides",
            "ignore",
            "activations",
            "kv_cache",
            "transforms",
        ):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} has no effect on a GGUF file: gguf.type and gguf.tensor_types choose its number types"
                )

    @property
    def is_gguf(self) -> bool:
        """Whether the artifact is a GGUF file."""
        return "gguf" in self.formats

    @property
    def gguf_file(self) -> Gguf:
        """The file of format gguf, with defaults filled in."""
        return self.gguf or Gguf()

    @property
    def shuffled(self) -> bool:
        """Whether groups become scattered columns (desc_act files)."""
        return self.method.shuffled

    @property
    def tuned(self) -> bool:
        """Whether each block is tuned after it is rounded."""
        return isinstance(self.method, Tuned)

    @property
    def rounder(self) -> MethodSettings:
        """What rounds a linear: the method itself, or the one that a tuned block starts from."""
        return self.method.rounder

    @property
    def paired(self) -> bool:
        """Whether the original model runs beside the rounded one."""
        return self.method.paired

    @property
    def calibrated(self) -> bool:
        """Whether text has to run through the model before anything can be rounded."""
        if self.method.calibrated:
            return True
        if self.is_gguf:
            return self.gguf_file.calibrated or self.gguf_file.budget is not None
        if self.budget is not None:
            return True
        searches = {self.weights.scale_search, *(o.scale_search for o in self.overrides)}
        return (
            any(transform.calibrated for transform in self.transforms)
            or "activation" in searches
            or (self.activations is not None and self.activations.calibrated)
            or self.kv_cache is not None
        )

    def undivided(self, linears: dict[str, int]) -> list[str]:
        """The linears {name: in_features} that `group_size` of `weights` does not divide, and no pattern names."""
        named = (*self.ignore, *(override.match for override in self.overrides))
        return [
            name
            for name, in_features in linears.items()
            if not self.weights.divides(in_features) and not any(matches(pattern, name) for pattern in named)
        ]

    def schemes(self, linears: dict[str, int], left: Collection[str] = ()) -> dict[str, Grid | None]:
        """The grid of each linear {name: in_features}; None for one that is ignored, and for those in `left`.

        Raises BadInput for a pattern without a match, a group size that does not divide, and overrides that one layer
        cannot have together.
        """
        for pattern in (*self.ignore, *(o.match for o in self.overrides)):
            if not any(matches(pattern, name) for name in linears):
                near = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.0)
                raise BadInput(f"pattern {pattern!r} matches no linear layer; the nearest names are {', '.join(near)}")
        out: dict[str, Grid | None] = {}
        first: dict[Grid, tuple[str, str]] = {}  # the layer that has it, and the recipe key it comes from
        for name, in_features in linears.items():
            if name in left or any(matches(pattern, name) for pattern in self.ignore):
                out[name] = None
                continue
            key, grid = self._grid_of(name)
            grid.check(name, in_features)
            out[name] = grid
            first.setdefault(grid, (name, key))
        if all(grid is None for grid in out.values()):
            raise BadInput(f"`ignore` {list(self.ignore)} matches every linear layer: nothing is left to quantize")
        self._check_together(first)
        return out

    def _grid_of(self, name: str) -> tuple[str, Grid]:
        """The grid of a layer after all matching overrides, with the recipe key of the last one."""
        key, grid = "weights", self.weights
        for k, override in enumerate(self.overrides):
            if matches(override.match, name):
                try:
                    key, grid = f"overrides.{k}", override.applied_to(grid)
                except ValueError as error:
                    raise BadInput(f"{name}, by all overrides that match it: {error}") from None
        return key, grid

    def _check_together(self, first: dict[Grid, tuple[str, str]]) -> None:
        """Repeat the checks across sections for what several overrides together make of a layer.

        Before the model is known, each override can only be checked alone.
        """
        seen: list[tuple[str, Grid]] = []
        for grid, (name, key) in first.items():
            seen.append((key, grid))
            try:
                self._check_grids([grid for _, grid in seen])
                self._check_targets(seen)
            except ValueError as error:
                raise BadInput(f"{name}, by all overrides that match it: {error}") from None
