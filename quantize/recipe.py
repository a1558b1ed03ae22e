"""The recipe: one YAML file, checked as a whole before anything is read. No torch here.

`load` reads a file (or the name of a shipped recipe), applies `--set key.path=value` overrides and validates the
result; every mistake comes back as one BadInput line that names the place.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import BadInput

FormatName = Literal["compressed-tensors", "gptq"]
Bos = Literal["auto", "always", "never"]


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
    if value != -1 and (value < 8 or value % 8):
        raise ValueError("a multiple of 8, or -1 for per channel")
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
    """The number grid of a linear's weight: 2^bits codes, `group_size` columns of a row sharing one scale."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: GroupSize = Field(128, description="columns sharing one scale; -1: per channel")
    symmetric: bool = True
    scale_search: Literal["minmax", "mse"] = "mse"

    @property
    def levels(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    def columns(self, in_features: int) -> int:
        """Columns that share one scale in a row of `in_features`."""
        return in_features if self.group_size == -1 else self.group_size

    def check(self, name: str, in_features: int) -> None:
        """Raise BadInput when `group_size` does not divide `in_features`."""
        if in_features % self.columns(in_features):
            divisors = [str(d) for d in range(8, 257, 8) if in_features % d == 0]
            raise BadInput(
                f"{name}: in_features {in_features} is not a multiple of group_size {self.group_size}; "
                f"choose {', '.join([*divisors, '-1 (per channel)'])}, or add the layer to `ignore`"
            )

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}"


class Rtn(Strict):
    """Round to nearest: no calibration, seconds."""

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
        description="QEP, arXiv:2504.09629: share of the error already in a linear's inputs that its weight makes up "
        "for; above 0 the original model runs beside, twice the work",
    )

    @model_validator(mode="after")
    def _groups_need_activation_order(self) -> Self:
        if not self.static_groups and self.order != "activation":
            raise ValueError(f"static_groups: false needs order: activation, not {self.order}")
        return self


Method = Annotated[Rtn | Gptq, Field(discriminator="name")]


class Override(Strict):
    """Layers that match get other settings; the last override that matches a layer decides each key."""

    match: Pattern = Field(description="a glob such as *.down_proj, or re: and a regular expression")
    bits: Literal[2, 3, 4, 8] | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    scale_search: Literal["minmax", "mse"] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.settings():
            raise ValueError(f"override for {self.match!r} changes nothing; to leave layers alone use `ignore`")
        return self

    def settings(self) -> dict[str, Any]:
        return self.model_dump(exclude={"match"}, exclude_none=True)


class Recipe(Strict):
    """Everything a run does, in one validated document."""

    name: str = Field("recipe", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: str = Field(
        "smollm2-135m", min_length=1, description="a folder, a hub id org/name[@revision], a .gguf file or smollm2-135m"
    )
    calibration: Calibration = Calibration()
    transforms: tuple[()] = Field((), strict=False, description="none exist yet")
    method: Method = Gptq()
    weights: Grid = Grid()
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
        shuffled = isinstance(self.method, Gptq) and not self.method.static_groups
        grids = [self.weights, *(self._overridden(o) for o in self.overrides)]
        if shuffled and any(grid.group_size == -1 for grid in grids):
            raise ValueError("static_groups: false means nothing per channel (group_size -1); drop it")
        return self

    def _overridden(self, override: Override) -> Grid:
        return Grid.model_validate(self.weights.model_dump() | override.settings())

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
            settings = self.weights.model_dump()
            for override in self.overrides:
                if matches(override.match, name):
                    settings |= override.settings()
            grid = Grid.model_validate(settings)
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


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key written twice is an error, not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def shipped() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("quantpress.recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load(where: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in file `where`, or the shipped one of that name, with `key.path=value` overrides applied."""
    path = Path(where)
    try:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
        elif where in shipped():
            text = (resources.files("quantpress.recipes") / f"{where}.yaml").read_text(encoding="utf-8")
        else:
            near = difflib.get_close_matches(where, shipped(), n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(near)}?" if near else "`quantpress recipes` lists them"
            raise BadInput(f"recipe {where!r}: no such file and no shipped recipe; {hint}")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {where}: cannot be read: {error}") from error
    try:
        document = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise BadInput(f"recipe {where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        found = "an empty file" if document is None else type(document).__name__
        raise BadInput(f"recipe {where}: expected a mapping of keys, found {found}")
    document.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "recipe")
    for override in overrides:
        apply_override(document, override)
    return parse(document, where)


def parse(document: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe document; every problem on one line, each with its place."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        inner = [e["loc"] for e in errors]
        # A list whose items are wrong also counts as too short: say only what is wrong with them.
        errors = [e for e in errors if e["type"] != "too_short" or not any(_inside(place, e["loc"]) for place in inner)]
        problems = "; ".join(_problem(e) for e in errors)
        raise BadInput(f"recipe {where}: {problems}") from None


_PLAIN = {
    "model_type": "a mapping of keys is needed",
    "model_attributes_type": "a mapping of keys is needed",
    "tuple_type": "a list is needed",
}


def _inside(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def _problem(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    message = _PLAIN.get(error["type"], error["msg"].removeprefix("Value error, "))
    if error["type"] == "extra_forbidden":
        known = _keys_at(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.6)
        message = f"unknown key{f', did you mean {near[0]!r}?' if near else ''} (known: {', '.join(known)})"
    elif not isinstance(error["input"], dict | Recipe):
        message += f", not {error['input']!r}"
    return f"{place}: {message}" if place else message


def _keys_at(place: Iterable[int | str]) -> list[str]:
    """The keys a mapping at `place` may have."""
    models: dict[str, type[BaseModel]] = {
        "calibration": Calibration, "evaluation": Evaluation, "weights": Grid, "gates": Gates,
        "overrides": Override, "rtn": Rtn, "gptq": Gptq,
    }  # fmt: skip
    model: type[BaseModel] = Recipe
    for part in place:
        model = models.get(str(part), model)
    return list(model.model_fields)


def apply_override(document: dict[str, Any], override: str) -> None:
    """Apply one `key.path=value` to the document; the value is read as YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise BadInput(f"--set {override!r}: write key.path=value, such as method.damp=0.02")
    *parents, last = key.split(".")
    node = document
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise BadInput(f"--set {override!r}: {parent!r} is not a mapping in this recipe")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise BadInput(f"--set {override!r}: the value is not YAML") from error
