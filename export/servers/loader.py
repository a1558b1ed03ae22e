"""What a server's loader takes, as rows of a table, and why it refuses the rest.

A row allows. Files that no row of a loader allows are refused, with the settings of the nearest row. Limits that need a
model's shapes are functions of their own: `Loader.limits`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantpress.numbers.types import Activations, Grid

from .served_model import ServedModel

_FORMATS = ("compressed-tensors", "gptq", "awq", "modelopt", "gguf")  # in the order they are proposed, before others

# Values that many servers' rows share.
MARLIN_GROUPS = (-1, 32, 64, 128)
SIXTEEN_BIT = "16 bit"
INT8_INPUTS, FP8_INPUTS = ("int8 dynamic", "int8 static"), ("fp8 dynamic", "fp8 static")
ANY_SYMMETRY = (True, False)


@dataclass(frozen=True)
class Loadable:
    """Files that a loader takes. bits and groups: empty for any; inputs: as `inputs_of` names them; scattered: also
    with groups of scattered columns (desc_act); note: what an operator has to know about such files; cuda: only on
    NVIDIA's GPUs; since: the server's first release that takes them, "" where older ones than those pinned here do."""

    format: str
    types: tuple[str, ...] = ("int",)
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    symmetric: tuple[bool, ...] = (True,)
    inputs: tuple[str, ...] = (SIXTEEN_BIT,)
    scattered: bool = False
    note: str = ""
    cuda: bool = False
    since: str = ""


class CannotAsk(Exception):
    """A server or a parser cannot be asked here; the message says why."""


@dataclass(frozen=True)
class ParserQuestion:
    """What a loader's own parser is asked about.

    run(server, script, *arguments): runs a script in the Python that has `server` and returns the JSON object it
    prints; raises CannotAsk when that is impossible.
    """

    folder: Path
    model: ServedModel
    gpus: int
    max_model_len: int | None
    run: Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class Loader:
    """A server's loader, one for each device that takes other files.

    label: its name in messages. limits(model, gpus): one line for each thing it refuses because of the model's shapes.
    parse: asks the server's own classes or library; returns what was asked, and why it refuses ("" when it does not).
    outer: the model types whose head, embeddings and towers it loads quantized in compressed-tensors files, by recipe
    key.
    version: the server's release that it was read from and that exports pin. inside: the versions of transformers and
    compressed-tensors that its container holds, by import name.
    """

    name: str
    label: str
    rows: tuple[Loadable, ...]
    limits: Callable[[ServedModel, int], Iterable[str]] = lambda model, gpus: ()
    parse: Callable[[ParserQuestion], tuple[str, str]] | None = None
    outer: Mapping[str, frozenset[str]] = field(default_factory=dict)
    version: str = ""
    inside: Mapping[str, str] = field(default_factory=dict)

    @property
    def formats(self) -> list[str]:
        """The formats it loads, in the order they are proposed."""
        taken = {row.format for row in self.rows}
        return [*(format for format in _FORMATS if format in taken), *sorted(taken.difference(_FORMATS))]


def inputs_of(activations: Activations | None, weights: Grid) -> str:
    """The name that rows have for inputs beside such weights; a loader that takes a type takes it asymmetric too."""
    if activations is None:
        return SIXTEEN_BIT
    if activations.type == "as-weights" and weights.type not in ("fp8", "nvfp4"):
        return activations.type  # which no row has
    return str(activations.beside(weights)).removesuffix(" asym")


def refusal(
    loader: Loader,
    format: str,
    grids: Sequence[tuple[str, Grid]],
    activations: Activations | None = None,
    *,
    scattered: bool = False,
) -> str | None:
    """Why `loader` cannot load files of `format`, and what to set instead; None when it can.

    grids: each grid with the recipe key it comes from (`weights`, `overrides.0`); scattered: groups are scattered
    columns, named by g_idx.
    """
    label, taken = loader.label, loader.formats
    rows = sorted(loader.rows, key=lambda row: taken.index(row.format))
    for place, grid in grids or [("weights", Grid())]:
        needed = [_changes(row, place, format, grid, activations, scattered) for row in rows]
        changes = min(needed, key=_distance)
        if not changes:
            continue
        set_ = f"set {', '.join(changes.values())}"
        if format not in taken:
            return f"{label} reads {', '.join(taken)} files, not {format}: {set_}"
        moved = [c["format"] for c in needed if list(c) == ["format"] and "format" not in changes]
        kind = f"{grid} weights" + ("" if activations is None else f" with {activations} activations")
        kind += " and desc_act" if scattered else ""
        return f"{label} does not take {format} files of {kind}: {set_}" + (f", or {moved[0]}" if moved else "")
    return None


def notes(loader: Loader, format: str, grids: Sequence[Grid], activations: Activations | None = None) -> list[str]:
    """What an operator has to know about such files, which `loader` takes."""
    found = [
        f"{loader.label} takes {grid} weights with {inputs_of(activations, grid)} inputs {row.note}"
        for grid in grids
        for row in loader.rows
        if row.note and not _changes(row, "", format, grid, activations, False)
    ]
    return list(dict.fromkeys(found))


def _changes(
    row: Loadable, place: str, format: str, grid: Grid, activations: Activations | None, scattered: bool
) -> dict[str, str]:
    """The settings that would make `row` allow such files: {what: `key: value`}; empty when it does."""
    changes: dict[str, str] = {}
    if row.format != format:
        changes["format"] = f"formats: [{row.format}]"
    if row.types and grid.type not in row.types:
        changes["type"] = f"{place}.type: {row.types[0]}"
        grid = Grid.model_validate({"type": row.types[0]})  # another type brings its own layout
    if row.bits and grid.bits not in row.bits:
        bits = grid.bits
        changes["bits"] = f"{place}.bits: {min(row.bits, key=lambda b: (abs(b - bits), -b))}"
    if row.groups and grid.group_size not in row.groups:
        changes["group_size"] = f"{place}.group_size: {_nearest_group(grid.group_size, row.groups)}"
    if grid.symmetric not in row.symmetric:
        changes["symmetric"] = f"{place}.symmetric: {str(row.symmetric[0]).lower()}"
    if inputs_of(activations, grid) not in row.inputs:
        kind, _, how = row.inputs[0].partition(" ")
        static = ", dynamic: false" if how == "static" else ""
        changes["inputs"] = "activations: " + ("null" if row.inputs[0] == SIXTEEN_BIT else f"{{type: {kind}{static}}}")
    if scattered and not row.scattered:
        changes["scattered"] = "method.static_groups: true"
    return changes


def _distance(changes: dict[str, str]) -> int:
    """How far away a row is. Another number type weighs most: it makes another recipe; other inputs nearly so."""
    weight = {"type": 8, "inputs": 3, "format": 3, "bits": 2}
    return sum(weight.get(what, 1) for what in changes)


def _nearest_group(size: int, allowed: tuple[int, ...]) -> int:
    """The allowed size nearest in ratio; per channel counts as very large groups."""
    width = {group: {-1: 1 << 12, 0: 1 << 24}.get(group, group) for group in (size, *allowed)}
    return min(allowed, key=lambda group: max(width[group] / width[size], width[size] / width[group]))
