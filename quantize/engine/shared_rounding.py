"""Linears of a block that several processes round: experts whole, each by one of them, the rows of others in parts.

Rows of a weight are rounded independently of each other, so parts of them give the same codes as all at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..core.ranks import Ranks
from ..methods.layer_error import ErrorMeasure
from ..numbers.grid import QuantizedLinear, stacked_rows
from ..numbers.types import Grid


@dataclass(frozen=True)
class Solved:
    """Rounded rows. error, power [rows]: as in `layer_error`. notes: what was not done as asked."""

    linear: QuantizedLinear
    error: Tensor
    power: Tensor
    measure: ErrorMeasure
    damp: float | None
    notes: list[str]


def parts(grids: Sequence[tuple[Grid, int]], ranks: Ranks) -> list[tuple[int, slice]]:
    """What this process rounds of weights, given by their grid and number of rows: (index, rows)."""
    mine = []
    for i, (grid, n) in enumerate(grids):
        whole = len(grids) >= ranks.size or grid.shares_rows or grid.shares_across_linears
        rows = (slice(0, n) if i % ranks.size == ranks.rank else slice(0, 0)) if whole else ranks.rows(n)
        mine += [(i, rows)] if rows.start < rows.stop else []
    return mine


def exchanged(solved: Sequence[tuple[int, Solved]], count: int, ranks: Ranks, to: Tensor) -> list[Solved]:
    """`count` weights, each out of the parts of all processes; solved: those of this one. to: as for Ranks.exchange."""
    tensors: list[Tensor] = []
    heads: list[tuple[int, dict[str, Any], list[str]]] = []
    for i, one in solved:
        found: dict[str, Any] = {f.name: getattr(one.linear, f.name) for f in fields(one.linear)}
        found = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        bare: dict[str, Any] = dict.fromkeys(found)
        tensors += [*found.values(), one.error, one.power]
        about = {"measure": one.measure, "damp": one.damp, "notes": one.notes}
        heads.append((i, about | {"linear": replace(one.linear, **bare)}, list(found)))
    whole: list[list[Solved]] = [[] for _ in range(count)]
    for arrived, others in ranks.exchange(tensors, heads, to):
        coming = iter(arrived)
        for i, about, names in others:
            linear = replace(about.pop("linear"), **{name: next(coming) for name in names})
            whole[i].append(Solved(linear, next(coming), next(coming), **about))
    return [_joined(of_one) for of_one in whole]


def _joined(solved: list[Solved]) -> Solved:
    """The parts of one weight, in the order of its rows."""
    if len(solved) == 1:
        return solved[0]
    error, power = torch.cat([one.error for one in solved]), torch.cat([one.power for one in solved])
    return replace(solved[0], linear=stacked_rows([one.linear for one in solved]), error=error, power=power)
