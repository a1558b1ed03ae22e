"""GPTQ with group-aware column order, scales fitted to the updated columns, and QEP."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.machine import one_thread
from ..core.products import no_16_bit_products
from ..numbers.grid import round_numbers_, scale_dtype
from ..numbers.types import Grid
from ..plugin import MethodSettings
from ..recipe.methods import LEAST_DAMP, Gptq
from .group_scales import GroupScales
from .rounded import Rounded
from .symmetric_products import panels

_BLOCK = 32  # columns solved one by one before all later ones are updated in one product
MAX_DAMP = 10.0
# Of weights whose rows `gptq_batch` solves at a time, H among them: 2 GB in float32, of which there are eight copies.
BATCH_ELEMENTS = 1 << 29


@no_16_bit_products()
def gptq(
    weight: Tensor,
    grid: Grid,
    settings: MethodSettings,
    moment: Tensor | None = None,
    drift: Tensor | None = None,
    moved: Tensor | None = None,
) -> Rounded:
    """Round `weight` [out, in] to `grid`; later columns compensate the rounding error of earlier ones.

    GPTQ, arXiv:2210.17323, Algorithm 1: with H^-1 = U^T U, column k is rounded from W_k - sum_{i<k} e_i U_ik / U_ii,
    e_i = w_i - q_i the error of the updated column i. U is the inverse of one triangular factor of H; H itself is
    never inverted. `moment` [in, in] = X^T X (H without its factor 2, which cancels); the solve runs in its dtype,
    float32 in a run. `drift` [in, in] = (X0 - X)^T X with X0 the same inputs in the original model; where it is given,
    QEP corrects the weight first (`correct_`). moved [out, in] = W drift, given in its place. Without `settings.damp`
    it is 0.01, since how many tokens the moment is of is not known here.

    Raises ValueError without a moment, or when no damping up to 10 makes it positive definite.
    """
    if moment is None or not isinstance(settings, Gptq):
        raise ValueError("gptq needs the second moment of the inputs and its own settings")
    out_features, in_features = weight.shape
    columns, stored = grid.columns(in_features), scale_dtype(weight, grid)
    order = column_order(moment.diagonal(), columns, settings.order, grid.span(in_features))
    asked = settings.damp or LEAST_DAMP
    feedback, variance, damp = factor(moment.index_select(0, order).index_select(1, order), asked)
    if drift is not None:
        moved = weight.to(moment.dtype) @ drift
    w = _in_order(weight.to(moment.dtype), order)  # a column to round is one run of memory
    gain = None
    if moved is not None:
        gain = correct_(w, _in_order(moved, order), feedback, variance, settings.error_correction)
    fitting = GroupScales(w.T, grid, stored)

    state = _Solve(w, feedback, torch.empty_like(w), torch.empty_like(w))
    importance = variance if settings.weighted_scales else None

    with one_thread():
        if settings.order == "activation" and settings.static_groups:
            back = order.argsort()
            natural, whole = importance[back] if importance is not None else None, w[back].T.contiguous()
            for start in range(0, in_features, columns):
                part, wide = slice(start, start + columns), slice(start, start + fitting.span)
                if start % fitting.span == 0:
                    fitting.reach(start // columns, whole[:, wide], None if natural is None else natural[wide])
                fitting.fit(start // columns, whole[:, part], None if natural is None else natural[part])
            group_of = order // columns
            scales, zeros = fitting.scales[group_of], fitting.zeros[group_of]
            state.solve(0, in_features, w, scales, zeros, grid)
        else:
            shuffled = settings.order == "activation"
            for start in range(0, in_features, columns):
                stop = min(start + columns, in_features)
                g = start // columns if shuffled else int(order[start]) // columns
                if grid.nested and start % fitting.span == 0:
                    end = start + fitting.span
                    ahead = None if importance is None else importance[start:end]
                    fitting.reach(g, state.updated(start, end).T, ahead)
                updated = state.updated(start, stop)
                picked = None if importance is None else importance[start:stop]
                scale, zero = fitting.fit(g, updated.T, picked)
                rows = (stop - start, out_features)
                state.solve(start, stop, updated, scale.expand(rows), zero.expand(rows), grid)

    g_idx = None
    if settings.order == "activation" and not settings.static_groups:
        g_idx = torch.empty(in_features, dtype=torch.int32, device=order.device)
        g_idx[order] = (torch.arange(in_features, device=order.device) // columns).to(torch.int32)
    numbers = torch.empty_like(state.numbers)
    numbers[order] = state.numbers
    linear = replace(fitting.linear(numbers.T), g_idx=g_idx)
    notes = filter(None, (raised_note(asked, damp), fitting.clipped))
    # Of Q less the weight that the solve began with, by H with its damping.
    power = _total_(state.error.square_().mul_(variance[:, None]))
    del state, numbers, w
    rounded = linear.dequantize()
    off = rounded.to(moment.dtype) - weight
    if moved is not None and gain is not None:
        strength = settings.error_correction
        power += 2 * strength * (off * moved).sum(1) - strength**2 * gain
    power -= off.square_().mul_(added(moment.diagonal(), damp)).sum(1)
    return Rounded(linear, damp, "; ".join(notes) or None, rounded, power.clamp_(min=0))


def raised_note(asked: float, damp: float) -> str | None:
    return f"singular Hessian: damping raised from {asked:g} to {damp:g}" if damp > asked else None


@dataclass
class _Solve:
    """Columns in solving order: weight, error (updated minus rounded column) and numbers of the grid, all [in, out]."""

    weight: Tensor
    feedback: Tensor  # -U_ik / U_ii at [k, i], strictly lower triangular [in, in]
    error: Tensor
    numbers: Tensor

    def updated(self, start: int, stop: int) -> Tensor:
        """Columns [start, stop) with the feedback of all columns before `start`."""
        return torch.addmm(self.weight[start:stop], self.feedback[start:stop, :start], self.error[:start])

    def solve(self, start: int, stop: int, updated: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> None:
        """Round columns [start, stop); `updated` holds them with the feedback of all columns before `start`.

        scales, zeros [stop - start, out].
        """
        for begin in range(start, stop, _BLOCK):
            end = min(begin + _BLOCK, stop)
            here, count = slice(begin - start, end - start), end - begin
            block = torch.addmm(updated[here], self.feedback[begin:end, start:begin], self.error[start:begin])
            # With zero * scale added, a weight is number * scale: two operations fewer for each of many columns.
            scale = scales[here]
            block.addcmul_(zeros[here], scale)
            numbers = self.numbers[begin:end]
            inside = self.feedback[begin:end, begin:end].T.contiguous()
            rows = zip(block.unbind(), numbers.unbind(), scale.unbind(), self.error[begin:end].unbind(), strict=True)
            for j, (row, number, step, error) in enumerate(rows):
                round_numbers_(torch.div(row, step, out=number), grid)
                torch.addcmul(row, number, step, value=-1, out=error)
                if j + 1 < count:
                    block[j + 1 :].addr_(inside[j, j + 1 :], error)


def column_order(diagonal: Tensor, columns: int, order: str, span: int = 0) -> Tensor:
    """The order columns are solved in, int64 [..., in], from the Hessian's diagonal [..., in].

    `group_aware` (GAR, arXiv:2505.14638) sorts inside each group and then the groups by their largest entry, so that
    groups stay contiguous on disk; with a `span` of several groups, the groups inside each span and then the spans.
    A shorter last group (blocks of 128 need not divide) is sorted inside and stays last. `activation` is act-order.
    Sorting is stable, so that equal inputs give equal orders.
    """
    n = diagonal.shape[-1]
    if order == "natural":
        return torch.arange(n, device=diagonal.device).expand(diagonal.shape)
    if order == "activation":
        return diagonal.argsort(dim=-1, descending=True, stable=True)
    whole = n // columns * columns
    last = diagonal[..., whole:].argsort(dim=-1, descending=True, stable=True) + whole
    grouped = diagonal[..., :whole].reshape(*diagonal.shape[:-1], whole // columns, columns)
    groups = max(1, span // columns)
    starts = torch.arange(whole // columns, device=diagonal.device) * columns
    inside = grouped.argsort(dim=-1, descending=True, stable=True) + starts[:, None]
    largest = grouped.amax(-1).reshape(*diagonal.shape[:-1], whole // columns // groups, groups)
    among = largest.argsort(dim=-1, descending=True, stable=True)
    among += torch.arange(largest.shape[-2], device=diagonal.device)[:, None] * groups
    outside = largest.amax(-1).argsort(dim=-1, descending=True, stable=True)
    among = among.gather(-2, outside[..., None].expand_as(among)).flatten(-2)
    return torch.cat([inside.gather(-2, among[..., None].expand_as(inside)).flatten(-2), last], -1)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """The columns of x [out, in] in `order`, each one run of memory: [in, out]."""
    return x.T.contiguous().index_select(0, order)


def _total_(x: Tensor) -> Tensor:
    """The sum [out] of x [in, out], which is overwritten; with the same bits whatever the number of rows of the weight,
    of which processes round parts.
    """
    while len(x) > 1:
        half = len(x) // 2
        x[:half].add_(x[-half:])
        x = x[: len(x) - half]
    return x[0].clone()


def correct_(w: Tensor, lacking: Tensor, feedback: Tensor, variance: Tensor, strength: float) -> Tensor:
    """Correct w [in, out], the weight's columns in solving order, for the error that its inputs already carry.

    QEP (arXiv:2504.09629, 4.2): at strength 1, W + strength * W (X0 - X)^T X H^-1 is the least-squares weight that maps
    the actual inputs X to what W makes of the original ones, X0. lacking [in, out] = (W (X0 - X)^T X)^T, which is
    overwritten. H is given as `factor` returns it: H^-1 = V^T diag(variance)^-1 V with V = I - feedback^T. Returns
    lacking^T H^-1 lacking for each row of the weight, [out].
    """
    parts, made = panels(len(w)), torch.empty_like(w)
    for part in parts:
        torch.addmm(lacking[part], feedback[part.start :, part].T, lacking[part.start :], alpha=-1, out=made[part])
    scaled = made / variance[:, None]
    gain = _total_(made.mul_(scaled))
    for part in parts:
        torch.addmm(scaled[part], feedback[part, : part.stop], scaled[: part.stop], alpha=-1, out=lacking[part])
    w.add_(lacking, alpha=strength)
    return gain


def added(diagonal: Tensor, damp: float) -> Tensor:
    """What `factor` adds to H's diagonal [in]."""
    mean = diagonal.mean()
    return torch.where(diagonal == 0, mean, 0) + damp * mean


def factor(moment: Tensor, damp: float) -> tuple[Tensor, Tensor, float]:
    """Feedback [in, in], conditional variance [in] and the damping used, from H + damp * mean(diag H) * I.

    With H^-1 = U^T U, feedback[k, i] = -U_ik / U_ii for k > i, else 0; variance_i = U_ii^-2, the variance of
    column i's input that later columns cannot compensate. A dead column, which is 0 for every token, gets the mean on
    its diagonal and takes part in no feedback. Damping is tripled until the factorisation succeeds.
    """
    # For a large model these matrices are the memory peak: few of them at a time, and the solve in place.
    h = moment.flip(0, 1)
    del moment
    diagonal = h.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise ValueError("the second moment of the inputs is zero or not finite")
    diagonal[diagonal == 0] = mean
    base = diagonal.clone()
    while damp <= MAX_DAMP:
        diagonal.copy_(base + damp * mean)
        # H = A A^T with A upper triangular is the Cholesky factorisation of H with rows and columns reversed.
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0 and bool(lower.diagonal().isfinite().all()):  # any NaN or inf reaches the diagonal
            del h, diagonal
            upper = lower.flip(0, 1)
            del lower
            root = upper.diagonal().clone()
            u = torch.diag(-root)
            for part in panels(len(u)):  # to the left of its diagonal a row of the inverse is zero
                rest = slice(part.start, None)
                solved = torch.linalg.solve_triangular(upper[rest, rest], u[part, rest], upper=True, left=False)
                u[part, rest] = solved
                del solved
            return u.T.tril_(-1), root.square(), damp
        damp *= 3
    raise ValueError(f"the Hessian stays singular with damping {MAX_DAMP}")
