"""How far the stored weight of a linear is from the original's, beside what rounding to its grid has to lose."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantpress.numbers.grid import BLOCK, QuantizedLinear, fit, scale_dtype, snap
from quantpress.numbers.types import BlockGrid, Grid

_PIECE = 1 << 22  # weights compared at a time
_SAMPLED = 64  # rows whose rounding to nearest is the measure of what is lost at least


@dataclass(frozen=True)
class Gap:
    """Squared errors over the squares of the original weight, of the whole, its worst row and its worst group.

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
        squared, off = wanted.square(), (found - wanted).square_()
        error, power = error + float(off.sum()), power + float(squared.sum())
        floor = 0.02 * mean  # a row or group of next to nothing is compared with the rest
        by_row = off.sum(1) / squared.sum(1).clamp_(min=floor * weight.shape[1])
        at = int(by_row.argmax())
        worst_row = max(worst_row, (float(by_row[at]), rows.start + at))
        if order is not None:
            off, squared = off[:, order], squared[:, order]
        if columns:
            off, squared = (sums.reshape(len(sums), -1, columns).sum(2) for sums in (off, squared))
            by_group = off / squared.clamp_(min=floor * columns)
            at = int(by_group.argmax())
            place = divmod(at, by_group.shape[1])
            worst_group = max(worst_group, (float(by_group.view(-1)[at]), rows.start + place[0], place[1]))
    seen = lengths > 0.02 * lengths.mean()
    stretched = (along[seen] / lengths[seen] - 1).square().mean().sqrt() if bool(seen.any()) else along.new_zeros(())
    return Gap(
        error / (power or 1.0), worst_row[0], worst_group[0], nearest(weight, q.grid, q.global_scale),
        worst_row[1], worst_group[2], float(stretched), overlap / (power or 1.0),
    )  # fmt: skip


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
