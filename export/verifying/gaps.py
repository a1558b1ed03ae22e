"""How far the stored weight of a linear is from the original's, beside what rounding to its grid has to lose."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantpress.numbers.fitting import fit
from quantpress.numbers.grid import BLOCK, QuantizedLinear, scale_dtype, snap
from quantpress.numbers.types import BlockGrid, Grid

_PIECE = 1 << 22  # weights compared at a time
_MOVED = 0.15  # how far half of a row's groups are where a method has moved all of the row
_SAMPLED = 64  # rows whose rounding to nearest is the measure of what is lost at least


@dataclass(frozen=True)
class Gap:
    """Squared errors over the squares of the original weight, of the whole, its worst row and its worst group.

    worst_row, worst_group: of one that is the original's plus an error at a right angle to it no more than the share of
    its power that the error makes: GPTQ with error correction adds much to the rows that make a few huge channels.
    nearest: of the whole when it is rounded to nearest. row, group: where the worst are. columns: by how much columns
    are longer or shorter, root mean square, where they were scaled. length: of the whole along the original, in it.
    """

    whole: float
    worst_row: float
    worst_group: float
    nearest: float
    row: int = 0
    group: int = 0
    columns: float = 0.0
    length: float = 1.0


def gap(q: QuantizedLinear, weight: Tensor, by_columns: Tensor | None = None, by_rows: Tensor | None = None) -> Gap:
    """Of linear `q` against `weight` [out, in].

    by_columns [in], by_rows [out]: what a transform has multiplied the weight with before it was rounded.
    """
    error, power, overlap, worst_row, worst_group = 0.0, 0.0, 0.0, (0.0, 0), (0.0, 0, 0)
    mean = float(weight.to(torch.float32).square().mean()) or 1.0
    order, columns = _order(q)
    least = nearest(weight, q.grid, q.global_scale)
    along, lengths = torch.zeros(q.in_features), torch.zeros(q.in_features)
    for rows, part in _pieces(q):
        wanted = weight[rows].to(torch.float32)
        found = part.dequantize()
        if by_rows is not None:
            found /= by_rows[rows, None]
        if by_columns is not None:
            found /= by_columns
            along, lengths = along + (found * wanted).sum(0), lengths + wanted.square().sum(0)
        overlap += float(torch.dot(found.reshape(-1), wanted.reshape(-1)))
        error, power = error + float((found - wanted).square_().sum()), power + float(wanted.square().sum())
        floor = 0.02 * mean  # a row or group of next to nothing is compared with the rest
        by_row = _apart(found, wanted, floor)
        at = int(by_row.argmax())
        worst_row = max(worst_row, (float(by_row[at]), rows.start + at))
        if order is not None:
            found, wanted = found[:, order], wanted[:, order]
        if columns:
            by_group = _apart(found.reshape(-1, columns), wanted.reshape(-1, columns), floor).view(len(found), -1)
            by_group[by_group.median(1).values > _MOVED + 3 * least] = 0  # such a row is judged as a whole
            at = int(by_group.argmax())
            place = divmod(at, by_group.shape[1])
            worst_group = max(worst_group, (float(by_group.view(-1)[at]), rows.start + place[0], place[1]))
    seen = lengths > 0.02 * lengths.mean()
    stretched = (along[seen] / lengths[seen] - 1).square().mean().sqrt() if bool(seen.any()) else along.new_zeros(())
    return Gap(
        error / (power or 1.0), worst_row[0], worst_group[0], least,
        worst_row[1], worst_group[2], float(stretched), overlap / (power or 1.0),
    )  # fmt: skip


def _apart(found: Tensor, wanted: Tensor, floor: float) -> Tensor:
    """How far each row of `found` [rows, n] is from `wanted`: the squared error over the square, or, where that is
    less, the larger of how much longer or shorter it is along `wanted` and of 1 - cos^2 of the angle between them.

    floor: the mean square that a row of `wanted` is taken to have at least.
    """
    power = wanted.square().sum(1).clamp_(min=floor * wanted.shape[1])
    off, along = (found - wanted).square().sum(1) / power, (found * wanted).sum(1) / power
    turned = 1 - along.square() * power / found.square().sum(1).clamp_(min=1e-30)
    return torch.minimum(off, torch.maximum(turned, (along - 1).abs()))


def nearest(weight: Tensor, grid: Grid, overall: Tensor | None = None) -> float:
    """The squared error of rounding to nearest over the squares, on rows spread evenly; scales are a row's own."""
    if isinstance(grid, BlockGrid):
        raise ValueError("of Hugging Face folders only")
    rows = weight[:: max(1, weight.shape[0] // _SAMPLED)][:_SAMPLED].to(torch.float32)
    columns = grid.columns(weight.shape[1])
    columns = columns if weight.shape[1] % columns == 0 else weight.shape[1]
    plain = grid.model_copy(
        update={"scale_search": "minmax", "group_size": -1 if grid.shares_rows else grid.group_size}
    )
    plain = Grid(type="fp8") if grid.type == "fp8-block" else plain
    groups = rows.reshape(-1, columns)
    scales, zeros = fit(groups, plain, scale_dtype(weight, plain), overall=overall)
    off = (snap(groups, scales[:, None], zeros[:, None], plain) - zeros[:, None]) * scales[:, None] - groups
    return float(off.square().sum() / groups.square().sum().clamp(min=1e-30))


def _order(q: QuantizedLinear) -> tuple[Tensor | None, int]:
    """The columns by their groups, None where they lie so; and columns a group, 0 where groups are not compared."""
    columns = q.grid.columns(q.in_features)
    if q.grid.shares_rows or columns >= q.in_features or q.in_features % columns:
        return None, 0
    return (None if q.g_idx is None else q.g_idx.argsort(stable=True)), columns


def _pieces(q: QuantizedLinear) -> Iterator[tuple[slice, QuantizedLinear]]:
    """The record by rows, a piece at a time."""
    step = max(1, _PIECE // q.in_features // BLOCK) * BLOCK
    for start in range(0, q.out_features, step):
        rows = slice(start, min(start + step, q.out_features))
        if q.grid.type == "fp8-block":
            blocks = slice(start // BLOCK, -(-rows.stop // BLOCK))
            yield rows, replace(q, codes=q.codes[rows], scales=q.scales[blocks], zeros=q.zeros[blocks])
        else:
            yield rows, q.rows(rows.start, rows.stop)
