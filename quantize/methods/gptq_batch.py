"""GPTQ of many linears of one shape at once, on a GPU with Triton; `gptq` is the definition, which this equals.

Weights are laid out [linears, in, out], columns in solving order: a column to round is one run of memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.products import tf32_products
from ..numbers.fitting import global_scale
from ..numbers.grid import QuantizedLinear, scale_dtype, stacked_rows
from ..numbers.types import Grid
from ..recipe.methods import LEAST_DAMP, Gptq
from .column_kernels import COLUMNS, can_fit, fit_scales, solve_columns
from .gptq import BATCH_ELEMENTS, MAX_DAMP, column_order
from .group_scales import GroupScales, outgrown
from .layer_error import output_powers
from .layout_kernels import columns_first, rows_first
from .upper_factors import UpperFactor, factor_upper_

_PANEL = 1024  # columns whose errors are added to all later ones in one product
_LEAST_STRENGTH = 2.0**-64  # of a correction that moves no weight: the error with the drift is found by it


@dataclass(frozen=True)
class SolvedBatch:
    """Linears of one shape, rounded. weight [linears, out, in]: dequantized, in the given weight's dtype.

    damp: what each solve ended with. error, power [linears, out]: as `layer_error` has them. clipped int64 [linears]:
    nvfp4's groups, of `groups` in each, that outgrew the global scale; None for other grids.
    """

    linears: list[QuantizedLinear]
    weight: Tensor
    error: Tensor
    power: Tensor
    damp: list[float]
    clipped: Tensor | None
    groups: int


class UnsolvableError(ValueError):
    """No damping makes the Hessian of linear `index` of a batch positive definite."""

    def __init__(self, index: int, why: str) -> None:
        super().__init__(why)
        self.index = index


@dataclass(frozen=True)
class Factor:
    """H of each linear with its damping, its columns in solving order.

    added [linears, in]: what the damping added to H's diagonal. damp: by linear.

    With H^-1 = U^T U, `gptq` rounds column k from w_k - sum_{i<k} e_i U_ik / U_ii, e_i the error of the updated column
    i. As U = (T diag(variance)^1/2)^-1 with T of the factor, that is w_k + sum_{i<k} (w_i - q_i) T_ik, w_i as it was
    before any update: Babai's nearest plane (arXiv:2507.18553). So no matrix is inverted.
    """

    upper: UpperFactor
    added: Tensor
    damp: list[float]


def gptq_batch(
    weight: Tensor,
    grid: Grid,
    settings: Gptq,
    moment: Tensor,
    drift: Tensor | None = None,
    drift_power: Tensor | None = None,
    moved: Tensor | None = None,
    damps: Sequence[float] | None = None,
) -> SolvedBatch:
    """Round `weight` [linears, out, in] as `gptq` does each, with their moments and drifts [linears, in, in].

    drift_power [linears, out]: as in `layer_error`, given with a drift. moved [linears, out, in]: each weight times its
    drift, in its place. damps: of each linear, in place of the settings'. The host waits for the device once, to see
    whether the Hessians are positive definite. Raises UnsolvableError.
    """
    _, out_features, in_features = weight.shape
    columns, span = grid.columns(in_features), grid.span(in_features)
    order = column_order(moment.diagonal(dim1=-2, dim2=-1), columns, settings.order, span)
    solving = factor(moment, order, damps or [settings.damp or LEAST_DAMP] * len(moment))
    by_row = not grid.shares_rows and not grid.shares_across_linears
    elements = max(BATCH_ELEMENTS // 2, BATCH_ELEMENTS - moment.numel())
    step = max(1, elements // (len(weight) * in_features)) if by_row else out_features
    parts = [slice(start, start + step) for start in range(0, out_features, step)]
    power = _powers(weight, moment, drift, drift_power, moved, parts)
    strength = max(settings.error_correction, _LEAST_STRENGTH)
    pull = None if drift is None else pull_of(drift, order, solving.upper, strength)
    shared = _Shared(grid, settings, strength, order, solving, pull)
    solved = []
    for rows in parts:
        here, drifted = (None if x is None else x[:, rows] for x in (moved, drift_power))
        solved.append(_solved(shared, weight[:, rows], here, drifted, power[:, rows]))
    return solved[0] if len(solved) == 1 else _joined(solved)


@dataclass(frozen=True)
class _Shared:
    """What all rows of the weights are solved with. order [linears, in]; pull: as `pull_of` has it."""

    grid: Grid
    settings: Gptq
    strength: float
    order: Tensor
    solving: "Factor"
    pull: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """What is solved in."""
        return self.solving.added.dtype


def _powers(
    weight: Tensor,
    moment: Tensor,
    drift: Tensor | None,
    drift_power: Tensor | None,
    moved: Tensor | None,
    parts: Sequence[slice],
) -> Tensor:
    """SolvedBatch's `power`, found by parts of the rows: w H w^T + 2 w M w^T + ||D w||^2 as in `layer_error`."""
    compared = drift_power is not None
    if compared and drift is not None:  # of w M w^T only the symmetric part of M matters
        moment = (drift + drift.mT).add_(moment)
    power = torch.cat([output_powers(weight[:, rows], moment) for rows in parts], 1)
    if drift_power is not None:
        power += drift_power
        if drift is None and moved is not None:
            power += 2 * torch.cat([(moved[:, rows] * weight[:, rows]).sum(-1) for rows in parts], 1)
    return power


def _solved(
    shared: _Shared, weight: Tensor, moved: Tensor | None, drift_power: Tensor | None, power: Tensor
) -> SolvedBatch:
    """`gptq_batch` of some rows, once H is factored."""
    grid, settings, order, solving = shared.grid, shared.settings, shared.order, shared.solving
    in_features, back = weight.shape[2], order.argsort(dim=-1)
    columns = grid.columns(in_features)
    w = columns_first(weight, back, shared.dtype)
    lead = None
    if shared.pull is not None:
        with tf32_products():  # weights of 16 bits are exact in TF32
            lead = torch.bmm(shared.pull, w)
    elif moved is not None:
        lead = lead_of(columns_first(moved, back, shared.dtype), solving.upper, shared.strength)
    spread = settings.order == "activation" and settings.static_groups  # a group's columns are not solved together
    whole = w
    if lead is not None and (spread or grid.type == "nvfp4"):  # scales look at columns before their turn
        whole = solving.upper.add_ahead(0, w, lead)
    scales = _Scales(whole, grid, scale_dtype(weight, grid))
    importance = solving.upper.variance if settings.weighted_scales else None
    state = _State(w, lead, shared.strength, solving.upper, in_features if spread else columns)
    del w, lead
    if spread:
        scales.fit_all(whole, back, importance)
        del whole
        scale, zero = scales.of_columns(order // columns)
        state.solve(0, scale, zero, grid)
        del scale, zero
    else:
        del whole
        for start in range(0, in_features, columns):
            scales.fit(start, state.updated, importance)
            state.solve(start, *scales.of_group(start // columns), grid)
    error, numbers = state.squares, state.numbers
    del state
    added = solving.added.gather(-1, back).to(torch.float32)
    linears, rounded, damped = scales.finish(numbers, back, settings, weight, added)
    if drift_power is not None:
        error += drift_power
    error = (error - damped).clamp_(min=0)
    return SolvedBatch(linears, rounded, error, power, solving.damp, scales.clipped(), scales.groups)


def _joined(parts: list[SolvedBatch]) -> SolvedBatch:
    """One batch out of the parts of its rows."""
    linears = [stacked_rows(list(rows)) for rows in zip(*(part.linears for part in parts), strict=True)]
    weight, error, power = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("weight", "error", "power")
    )
    return SolvedBatch(linears, weight, error, power, parts[0].damp, None, sum(part.groups for part in parts))


def factor(moment: Tensor, order: Tensor, damps: Sequence[float]) -> Factor:
    """Factor H + damp * mean(diag H) * I of each linear, rows and columns in `order` [linears, in]; see `gptq.factor`.

    The damping is tripled for the linears where that fails.
    """
    damps = list(damps)
    upper, added, sound = _attempt(moment, order, damps)
    ended = sound.tolist()
    while failed := [i for i, (_, positive) in enumerate(ended) if not positive]:
        at = torch.tensor(failed, device=moment.device)
        for index in failed:
            if not ended[index][0]:
                raise UnsolvableError(index, "the second moment of the inputs is zero or not finite")
            damps[index] *= 3
            if damps[index] > MAX_DAMP:
                raise UnsolvableError(index, f"the Hessian stays singular with damping {MAX_DAMP}")
        again, added[at], sound = _attempt(moment[at], order[at], [damps[index] for index in failed])
        upper.replace(at, again)
        for index, ends in zip(failed, sound.tolist(), strict=True):
            ended[index] = ends
    return Factor(upper, added, damps)


def _attempt(moment: Tensor, order: Tensor, damps: list[float]) -> tuple[UpperFactor, Tensor, Tensor]:
    """upper and added as in Factor; and, bool [linears, 2], whether H's diagonal and whether its factor is sound."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1).gather(-1, order)
    mean = diagonal.mean(-1, keepdim=True)
    a = moment[torch.arange(len(moment), device=moment.device)[:, None, None], order[:, :, None], order[:, None, :]]
    if len(set(damps)) == 1:  # no copy to the device
        damp: float | Tensor = damps[0]
    else:
        damp = torch.tensor(damps, dtype=mean.dtype, device=mean.device)[:, None]
    added = torch.where(diagonal == 0, mean, 0) + damp * mean
    a.diagonal(dim1=-2, dim2=-1).add_(added)
    upper = factor_upper_(a)
    usable = (mean[:, 0] > 0) & mean[:, 0].isfinite()
    return upper, added, torch.stack([usable, upper.sound & usable], 1)


def pull_of(drift: Tensor, order: Tensor, upper: UpperFactor, strength: float) -> Tensor:
    """What times w, columns in solving order, is the `lead_of` W M: [linears, in, in] of the drifts M."""
    rows = torch.arange(len(drift), device=drift.device)[:, None, None]
    return lead_of(drift[rows, order[:, None, :], order[:, :, None]], upper, strength)


def lead_of(lacking: Tensor, upper: UpperFactor, strength: float) -> Tensor:
    """The feedback that QEP's correction (`gptq.correct_`) is to columns: strength * diag(variance)^-1 T^-1 lacking.

    lacking: (W M)^T [linears, in, out], columns in solving order; it is overwritten. With l of it and H as in Factor,
    the weight is to become w + strength * H^-1 l, the feedback of which on column k is
    sum_{i<=k} (H^-1 l)_i T_ik = (T^T H^-1 l)_k. So w is left as it is, and T^-T is not needed.
    """
    with tf32_products():
        return upper.solve_(lacking).mul_((strength / upper.variance)[:, :, None])


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """The rows `order` [linears, some] of x [linears, rows, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], order].contiguous()


@dataclass(frozen=True)
class _Launch:
    """Columns [begin, end) that one launch solves: views of what `_State` holds of all, and their variance.

    Made for all launches at once: a view costs the host nearly as much time as a launch.
    """

    begin: int
    end: int
    error: Tensor
    numbers: Tensor
    variance: Tensor
    lead: Tensor | None


@dataclass
class _State:
    """Columns of the weight in solving order, [linears, in, out].

    error: the columns as they begin, and of those that are solved what they lost. lead: what they receive from the
    first, as `lead_of` has it for `strength`. numbers: of the grid. squares [linears, out]: of each row's error, with
    and without its drift: see `solve_columns`. columns: those solved together; step: those of one launch, the last ones
    perhaps fewer.
    """

    error: Tensor
    lead: Tensor | None
    strength: float
    upper: UpperFactor
    columns: int
    step: int = field(init=False)
    numbers: Tensor = field(init=False)
    squares: Tensor = field(init=False)
    _fed: Tensor | None = None  # lead and feedback of the first _given columns, from column _first on
    _first: int = 0
    _given: int = 0
    _launches: dict[int, list[_Launch]] = field(init=False)  # by the first of the columns solved together
    _inside: Sequence[Tensor] = ()  # [linears, step, step] of each whole launch
    _latest: tuple[int, int, Tensor] | None = None  # columns and their feedback

    def __post_init__(self) -> None:
        linears, _, out = self.error.shape
        self.numbers, self._fed = torch.empty_like(self.error), self.lead
        self.squares = torch.zeros(linears, out, dtype=self.error.dtype, device=self.error.device)
        self.step = min(COLUMNS, self.columns)
        self._launches = self._divided()

    def _divided(self) -> dict[int, list[_Launch]]:
        n, columns = self.error.shape[1], self.columns
        starts = [begin for start in range(0, n, columns) for begin in range(start, min(start + columns, n), self.step)]
        ends = [*starts[1:], n]
        sizes = [end - begin for begin, end in zip(starts, ends, strict=True)]
        whole = self.error, self.numbers, self.upper.variance
        leads: Sequence[Tensor | None] = [None] * len(sizes) if self.lead is None else torch.split(self.lead, sizes, 1)
        launches: dict[int, list[_Launch]] = {}
        for launch in map(_Launch, starts, ends, *(torch.split(x, sizes, 1) for x in whole), leads):
            launches.setdefault(launch.begin // columns * columns, []).append(launch)
        return launches

    def feedback(self, start: int, stop: int) -> Tensor:
        """What columns [start, stop) receive of all columns before `start`, and their lead."""
        if start - self._given >= _PANEL:
            whole = self._added(self._fed, start, self.error.shape[1], into=self._given > 0)
            self._fed, self._first, self._given = whole, start, start
        if self._fed is None:
            if start:
                return self._added(None, start, stop)
            linears, _, out = self.error.shape
            return torch.zeros(linears, stop, out, dtype=self.error.dtype, device=self.error.device)
        if start == self._given:
            return self._fed[:, start - self._first : stop - self._first]
        return self._added(self._fed, start, stop)

    def _added(self, fed: Tensor | None, start: int, stop: int, *, into: bool = False) -> Tensor:
        """`fed` of columns [start, stop), if any, and the feedback of those between the given ones and `start`.

        into: may overwrite it.
        """
        done = slice(self._given, start)
        above, error = self.upper.above[:, done, start:stop].mT, self.error[:, done]
        with tf32_products():
            if fed is None:
                return torch.bmm(above, error)
            here = fed[:, start - self._first : stop - self._first]
            return here.baddbmm_(above, error) if into else torch.baddbmm(here, above, error)

    def updated(self, start: int, stop: int) -> Tensor:
        """Columns [start, stop) as they best make up for the errors of those before `start`."""
        if not start and self.lead is None:
            return self.error[:, :stop]
        self._latest = start, stop, self.feedback(start, stop)
        return self.upper.add_ahead(start, self.error[:, start:stop], self._latest[2])

    def solve(self, start: int, scales: Tensor, zeros: Tensor, grid: Grid) -> None:
        """Round the columns from `start` on that are solved together; scales and zeros [linears, those, out], or one
        for all of them.
        """
        for x in self._launches[start]:
            known = self._latest is not None and self._latest[:2] == (x.begin, x.end)
            fed = self._latest[2] if self._latest and known else self.feedback(x.begin, x.end)
            mine = scales, zeros
            if scales.shape[1] > 1:
                mine = scales[:, x.begin - start : x.end - start], zeros[:, x.begin - start : x.end - start]
            solve_columns(
                fed, self._among(x.begin, x.end), x.variance, *mine, x.error, x.numbers, self.squares, grid,
                x.lead, self.strength,
            )  # fmt: skip

    def _among(self, begin: int, end: int) -> Tensor:
        """The feedback of columns [begin, end) on each other, of column i on column k at [linear, k, i]."""
        above, step = self.upper.above, self.step
        if begin % step or end - begin != step:
            return above[:, begin:end, begin:end].mT.contiguous()
        if not self._inside:
            linears, n, _ = above.shape
            whole, (matrix, row, column) = n // step, above.stride()
            squares = above.as_strided((linears, whole, step, step), (matrix, step * (row + column), column, row))
            self._inside = squares.contiguous().unbind(1)
        return self._inside[begin // step]


class _Scales:
    """The scales of a batch, fitted group by group, groups in solving order; `w` [linears, in, out] as it begins."""

    def __init__(self, w: Tensor, grid: Grid, stored: torch.dtype) -> None:
        linears, in_features, out_features = w.shape
        self._grid, self._stored, self._in_features = grid, stored, in_features
        self._columns, self._span = grid.columns(in_features), grid.span(in_features)
        self._overall = global_scale(w, grid)
        groups = -(-in_features // self._columns)
        found = w.new_empty(3, groups, linears, out_features, dtype=torch.float32)
        self._scales, self._zeros, self._largest = found.unbind(0)
        each = (x[:, :, None].unbind(0) for x in (self._scales, self._zeros, self._largest))
        self._groups = list(zip(*each, strict=True))
        self._each = None if can_fit(grid) else [GroupScales(one.mT, grid, stored) for one in w]

    def fit(self, start: int, columns: Callable[[int, int], Tensor], importance: Tensor | None) -> None:
        """Fit the group that begins at column `start`.

        columns: gives columns [start, stop) as they are by then. importance [linears, in].
        """
        group, stop = start // self._columns, min(start + self._columns, self._in_features)
        if self._each is not None and self._grid.nested and start % self._span == 0:
            ahead, weigh = columns(start, start + self._span), _part(importance, start, start + self._span)
            for i, one in enumerate(self._each):
                one.reach(group, ahead[i].mT, None if weigh is None else weigh[i])
        here, weigh = columns(start, stop), _part(importance, start, stop)
        if self._each is None:
            fit_scales(here, self._grid, self._stored, weigh, self._overall, self._groups[group])
        else:
            for i, one in enumerate(self._each):
                found = one.fit(group, here[i].mT, None if weigh is None else weigh[i])
                self._scales[group, i], self._zeros[group, i] = found

    def fit_all(self, w: Tensor, back: Tensor, importance: Tensor | None) -> None:
        """Fit all groups as they stand on disk; back [linears, in]: a column's place in `w` and in `importance`."""
        natural = None if importance is None else importance.gather(-1, back)
        for start in range(0, self._in_features, self._columns):
            self.fit(start, lambda start, stop: in_order(w, back[:, start:stop]), natural)

    def of_group(self, group: int) -> tuple[Tensor, Tensor]:
        """Scale and zero [linears, 1, out] of a group."""
        return self._groups[group][:2]

    def of_columns(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [linears, columns, out] of the columns' groups, `group` [linears, columns]."""
        return in_order(self._scales.transpose(0, 1), group), in_order(self._zeros.transpose(0, 1), group)

    def finish(
        self, numbers: Tensor, back: Tensor, settings: Gptq, weight: Tensor, added: Tensor
    ) -> tuple[list[QuantizedLinear], Tensor, Tensor]:
        """The linears, their weights [linears, out, in] dequantized, in the dtype of `weight`; and, [linears, out], the
        squares of what `weight` is changed by, each column's times `added` [linears, in].

        numbers of the grid [linears, in, out] in solving order; back [linears, in]: a column's place in it.
        """
        if settings.order != "activation":
            placed = back[:, :: self._columns] // self._columns  # where each group stands in solving order
        else:
            placed = torch.arange(len(self._scales), device=back.device).expand(len(back), -1)
        shuffled = settings.order == "activation" and not settings.static_groups
        if self._each is None:
            spread = settings.order == "activation" and settings.static_groups
            group = torch.arange(self._in_features, device=back.device).expand_as(back) if spread else back
            group = (group // self._columns).contiguous()
            found = self._scales, self._zeros
            codes, rounded, lost = rows_first(numbers, back, group, found, weight, added, self._grid)
            linears = self._records(codes, placed)
        else:
            natural = in_order(numbers, back).mT
            for one, order in zip(self._each, placed, strict=True):
                one.reorder(order)
            linears = [one.linear(mine) for one, mine in zip(self._each, natural, strict=True)]
        if shuffled:
            linears = [replace(q, g_idx=(mine // self._columns).int()) for q, mine in zip(linears, back, strict=True)]
        if self._each is not None:
            rounded = torch.stack([q.dequantize() for q in linears])
            lost = torch.bmm((rounded - weight).square_(), added[:, :, None])[:, :, 0]
        return linears, rounded.to(weight.dtype), lost

    def clipped(self) -> Tensor | None:
        """As in SolvedBatch."""
        return None if self._overall is None else outgrown(self._largest, self._overall[:, None]).sum((0, 2))

    @property
    def groups(self) -> int:
        return self._scales.shape[0] * self._scales.shape[2]

    def _records(self, codes: Tensor, placed: Tensor) -> list[QuantizedLinear]:
        """The linears of codes [linears, out, in]; placed [linears, groups]: where each group stands in the scales."""
        count, out_features, _ = codes.shape
        scales, zeros = (in_order(x.transpose(0, 1), placed).mT for x in (self._scales, self._zeros))
        overall = self._overall
        if overall is not None:
            scales = scales * overall[:, None, None]
        stack = QuantizedLinear(
            codes.flatten(0, 1),
            scales.to(self._stored).flatten(0, 1).contiguous(),
            zeros.to(torch.uint8).flatten(0, 1).contiguous(),
            self._grid,
            global_scale=None if overall is None else overall.repeat_interleave(out_features)[:, None],
        )
        linears = [stack.rows(i * out_features, (i + 1) * out_features) for i in range(count)]
        if overall is not None:
            linears = [replace(q, global_scale=one) for q, one in zip(linears, overall, strict=True)]
        return linears


def _part(importance: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if importance is None else importance[:, start:stop]
