"""Rounding of the linears of a block that share an input; those with the same grid are solved together."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..artifact.manifest import LayerRecord
from ..calibrate.block_pass import SharedInput
from ..core.errors import BadInput
from ..core.ranks import ALONE, Ranks
from ..methods import ROUNDERS, Rounded, solves_batches
from ..methods.gptq import gptq, raised_note
from ..methods.group_scales import clipped_note
from ..methods.kernel_check import kernels_refused
from ..methods.layer_error import ErrorMeasure, error_fields, layer_error
from ..methods.rtn import column_power, rtn_by_rows
from ..models.placed_model import LinearLayer
from ..models.weight_rows import WeightRows
from ..numbers.grid import Grid, QuantizedLinear
from ..numbers.types import BlockGrid
from ..recipe import Gptq, MethodSettings
from .block_weights import put, weight_of
from .code_memory import CodeMemory
from .shared_rounding import Solved, exchanged, parts

if TYPE_CHECKING:
    from ..methods.gptq_batch import SolvedBatch

_LOST = "its weights are too small for the scales: all round to 0"
TOGETHER = 1 << 28  # elements of the matrices of linears that are solved together


@dataclass(frozen=True)
class _Stack:
    """Linears with one input and one grid, solved as one weight: their rows, one linear after the other."""

    grid: Grid
    linears: list[LinearLayer]
    shared: SharedInput

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        return sum(x.out_features for x in self.linears), self.linears[0].in_features

    @property
    def by_rows(self) -> bool:
        """Whether rows are rounded to nearest each by itself, from nothing but their weights."""
        return self.shared.moment is None and not self.grid.shares_rows and not isinstance(self.grid, BlockGrid)

    @property
    def alike(self) -> tuple[Any, ...]:
        """What stacks that are solved together have in common."""
        return self.grid, self.shape, len(self.linears), self.shared.drift is None, not self.shared.moved

    def of_rows(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Values [out, …] by linear, of all rows; None where there are none."""
        return torch.cat([values[x.name] for x in self.linears]) if values else None

    @property
    def dynamic(self) -> bool:
        """Whether its inputs have dynamic scales because no static range fits them."""
        return bool(self.shared.lost and self.shared.inputs and self.shared.inputs.scale is None)

    def damped(self, method: MethodSettings) -> MethodSettings:
        """The method with the damping that its tokens call for."""
        if not isinstance(method, Gptq):
            return method
        return method.model_copy(update={"damp": self.damping(method)})

    def damping(self, method: Gptq) -> float:
        return method.damping(self.shape[1], self.shared.tokens)

    def clipped_token(self) -> str | None:
        """A note where no static range fits all tokens."""
        if not self.shared.lost:
            return None
        no_range = f"no static int8 range fits its inputs: one token loses {self.shared.lost:.0%} of its norm"
        if self.dynamic:
            return f"{no_range}; they have dynamic scales"
        return f"{no_range}; leave it out (ignore: ['{self.linears[0].name}']) or set activations.dynamic: true"

    def notes(self, method: MethodSettings) -> list[str]:
        """What was not done as asked, for the manifest, of a solve by the Hessian."""
        notes = [] if (clipped := self.clipped_token()) is None else [clipped]
        if self.shared.tokens < self.shape[1]:
            notes.append(f"saw {self.shared.tokens} tokens, fewer than its {self.shape[1]} inputs")
        if self.shared.unmatched and method.paired:
            notes.append("no error correction: its inputs cannot be matched with the original model's token by token")
        return notes


@dataclass(frozen=True)
class _Rounded:
    """A rounded linear whose figures have not been read yet: entries of BlockRounding's `_figures`, by their places.

    It refers to no sums, which are the largest tensors. dynamic: as in _Stack. error, power: sums over its rows.
    clipped: groups that outgrew nvfp4's global scale, of `groups`; None: not counted.
    """

    linear: LinearLayer
    grid: Grid
    tokens: int
    dynamic: bool
    measure: ErrorMeasure
    damp: float | None
    raised: str | None
    notes: list[str]
    error: int
    power: int
    clipped: int | None = None
    groups: int = 0


class BlockRounding:
    """Rounds the linears of a block, puts the new weights into it, and keeps a record of each.

    runs_on: whether the block is run with the new weights; otherwise it keeps the old ones. stored: gives the weight of
    a linear where the block has none. codes: memory for them. dtype: of the weights, if not the block's; scales are in
    one that goes with it. On a GPU the figures of the records stay there until
    `finish`: reading one waits for all the work before it.
    """

    def __init__(
        self,
        method: MethodSettings,
        schemes: Mapping[str, Grid | None],
        block: nn.Module,
        ranks: Ranks = ALONE,
        *,
        runs_on: bool = True,
        stored: Callable[[LinearLayer], WeightRows] | None = None,
        codes: CodeMemory | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._method, self._schemes, self._block, self._ranks = method, schemes, block, ranks
        self._dtype = dtype
        self._runs_on, self._stored, self._codes = runs_on, stored, codes
        self.rounded: dict[str, QuantizedLinear] = {}
        self._records: dict[str, LayerRecord] = {}
        self._unread: list[_Rounded] = []
        self._figures: list[Tensor] = []  # 1-dimensional, float64
        self._count = 0  # of figures

    def round(self, inputs: Sequence[SharedInput], linears: Mapping[str, LinearLayer]) -> None:
        """Round the linears of `inputs`, by name; where several are given, those of one shape together."""
        stacks = [
            stack for shared in inputs for stack in self._stacks([linears[name] for name in shared.names], shared)
        ]
        if self._ranks.size > 1:
            self._round_shared(stacks)
            return
        together: dict[Any, list[_Stack]] = {}
        for stack in stacks:
            refused = self._refused(stack)
            if refused is None:
                together.setdefault(stack.alike, []).append(stack)
            else:
                self._round_alone(stack, refused)
        for alike in together.values():
            for some in _pieces(alike):
                self._round_together(some)

    def _refused(self, stack: _Stack) -> str | None:
        """None where a stack may be solved in a batch; "" where it may not, or why the kernels are not used."""
        moment = stack.shared.moment
        if moment is None or moment.dim() == 1 or not stack.shared.tokens:
            return ""
        if not isinstance(self._method, Gptq) or not solves_batches(self._method, moment.device):
            return ""
        dtype = weight_of(self._block, stack.linears[0]).dtype
        return kernels_refused(stack.grid, self._method, dtype, moment.device)

    def finish(self) -> dict[str, LayerRecord]:
        """The records of all linears. Raises BadInput for one that could not be rounded."""
        self._read()
        return self._records

    def _stacks(self, linears: Iterable[LinearLayer], shared: SharedInput) -> Iterable[_Stack]:
        stacks: dict[tuple[Grid, str], _Stack] = {}
        for linear in linears:
            grid = self._schemes[linear.name]
            assert grid is not None
            apart = linear.name if grid.type == "fp8-block" else ""  # its blocks of rows must not span two linears
            stacks.setdefault((grid, apart), _Stack(grid, [], shared)).linears.append(linear)
        return stacks.values()

    def _round_alone(self, stack: _Stack, refused: str = "") -> None:
        """Solve one stack. refused: a note on why no kernels are used."""
        if not self._runs_on and self._method.name == "rtn" and stack.by_rows:
            alone = stack.linears[0] if len(stack.linears) == 1 else None
            rows = self._stored(alone) if self._stored is not None and alone is not None else self._weight(stack)
            memory = None if self._codes is None else self._codes.take(stack.shape)
            linear, error, power = rtn_by_rows(rows, stack.grid, memory)
            self._keep_solved(stack, Solved(linear, error, power, "weight", None, []), None)
            return
        try:
            solved, new = self._solved(stack, refused, slice(0, stack.shape[0]))
        except BadInput:
            self._read()  # an earlier linear may be the cause
            raise
        self._keep_solved(stack, solved, new)

    def _weight(self, stack: _Stack) -> Tensor:
        """[out, in], contiguous; that of a single linear is not copied where it lies so."""
        weights = [
            weight_of(self._block, linear) if self._stored is None else self._stored(linear)[:]
            for linear in stack.linears
        ]
        return self._in_dtype(weights[0].contiguous() if len(weights) == 1 else torch.cat(weights))

    def _in_dtype(self, weight: Tensor) -> Tensor:
        return weight if self._dtype is None else weight.to(self._dtype)

    def _solved(self, stack: _Stack, refused: str, rows: slice) -> tuple[Solved, Tensor]:
        """Rows of a stack, solved by themselves, and their weight [rows, in] float32. refused: for the notes."""
        shared, weight, moved = stack.shared, self._weight(stack)[rows], stack.of_rows(stack.shared.moved)
        moved = None if moved is None else moved[rows]
        if moved is None and shared.drift is not None and isinstance(self._method, Gptq):
            moved = weight.to(torch.float32) @ shared.drift  # once for the rounder and for the error
        result, notes = _round(self._method, weight, stack, moved)
        notes += [refused] if refused else []
        new = result.linear.dequantize() if result.weight is None else result.weight
        power = stack.of_rows(shared.drift_power)
        power = None if power is None else power[rows]
        told = shared.moment, shared.drift, power, moved, result.off_power
        error = layer_error(weight.to(torch.float32), new, *told)
        return Solved(result.linear, error.error, error.power, error.measure, result.damp, notes), new

    def _keep_solved(self, stack: _Stack, solved: Solved, new: Tensor | None) -> None:
        """new: the weight [out, in] that the block gets; None where it keeps the old one."""
        start = 0
        for linear in stack.linears:
            rows = slice(start, start + linear.out_features)
            weight = None if new is None else new[rows]
            self._keep(linear, solved.linear.rows(rows.start, rows.stop), weight, stack.shared)
            sums = self._figure(solved.error[rows].sum()), self._figure(solved.power[rows].sum())
            about = linear, stack.grid, stack.shared.tokens, stack.dynamic, solved.measure
            self._unread.append(_Rounded(*about, solved.damp, None, solved.notes, *sums))
            start = rows.stop
        if solved.error.device.type == "cpu":
            self._read()

    def _round_shared(self, stacks: list[_Stack]) -> None:
        """Solve this process's share of stacks and have the others' from them."""
        solved: list[tuple[int, Solved]] = []
        together: dict[Any, list[tuple[int, slice]]] = {}
        problem = None
        try:
            for i, rows in parts([(stack.grid, stack.shape[0]) for stack in stacks], self._ranks):
                refused = self._refused(stacks[i])
                if refused is None:
                    together.setdefault((*stacks[i].alike, rows.start, rows.stop), []).append((i, rows))
                else:
                    solved.append((i, self._solved(stacks[i], refused, rows)[0]))
            for alike in together.values():
                solved += self._solved_together(stacks, alike)
        except BadInput as error:
            problem = str(error)
        self._ranks.agree(problem)
        to = weight_of(self._block, stacks[0].linears[0])
        for stack, whole in zip(stacks, exchanged(solved, len(stacks), self._ranks, to), strict=True):
            self._keep_solved(stack, whole, whole.linear.dequantize())

    def _solved_together(self, stacks: list[_Stack], alike: list[tuple[int, slice]]) -> list[tuple[int, Solved]]:
        """The same rows of stacks of one shape and grid, given as (index, rows)."""
        from ..methods.gptq_batch import UnsolvableError

        found: list[tuple[int, Solved]] = []
        assert isinstance(self._method, Gptq)
        rows, chosen = alike[0][1], [stacks[i] for i, _ in alike]
        for some in _pieces(chosen):
            mine, alike = alike[: len(some)], alike[len(some) :]
            try:
                batch, measure = self._batch(some, rows)
            except UnsolvableError:
                found += [(i, self._solved(stacks[i], "", rows)[0]) for i, _ in mine]
                continue
            for at, (i, _) in enumerate(mine):
                clipped = None if batch.clipped is None else clipped_note(int(batch.clipped[at]), batch.groups)
                stack = stacks[i]
                raised = raised_note(stack.damping(self._method), batch.damp[at])
                notes = [*filter(None, (raised, clipped)), *stack.notes(self._method)]
                one = Solved(batch.linears[at], batch.error[at], batch.power[at], measure, batch.damp[at], notes)
                found.append((i, one))
        return found

    def _batch(self, stacks: list[_Stack], rows: slice) -> "tuple[SolvedBatch, ErrorMeasure]":
        """Rows of stacks of one shape and grid, solved in one go. Raises UnsolvableError."""
        from ..methods.gptq_batch import gptq_batch  # needs Triton

        shape, shared = stacks[0].shape, [stack.shared for stack in stacks]
        assert isinstance(self._method, Gptq)
        weights = [weight_of(self._block, linear) for stack in stacks for linear in stack.linears]
        moment, drift = _together([x.moment for x in shared]), _together([x.drift for x in shared])
        moved = _together([stack.of_rows(stack.shared.moved) for stack in stacks])
        power = _together([stack.of_rows(stack.shared.drift_power) for stack in stacks])
        moved, power = (None if x is None else x[:, rows] for x in (moved, power))
        assert moment is not None
        weight = self._in_dtype(torch.cat(weights)).view(len(stacks), *shape)[:, rows]
        measure: ErrorMeasure = "output_local" if power is None else "output_accumulated"
        damps = [stack.damping(self._method) for stack in stacks]
        return gptq_batch(weight, stacks[0].grid, self._method, moment, drift, power, moved, damps), measure

    def _round_together(self, stacks: list[_Stack]) -> None:
        """Solve stacks of one shape and grid in one go."""
        from ..methods.gptq_batch import UnsolvableError

        assert isinstance(self._method, Gptq)
        failed = None
        try:
            solved, measure = self._batch(stacks, slice(0, stacks[0].shape[0]))
        except UnsolvableError as error:
            failed = error.index
        if failed is not None:  # only here, where nothing refers to the failed attempt any more
            self._round_alone(stacks[failed])
            if others := [stack for i, stack in enumerate(stacks) if i != failed]:
                self._round_together(others)
            return
        clipped = None if solved.clipped is None else self._figure(solved.clipped)
        new, start = solved.weight.to(weight_of(self._block, stacks[0].linears[0]).dtype), 0
        for j, member in enumerate(stacks[0].linears):
            rows = slice(start, start + member.out_features)
            error_sum, power_sum = (self._figure(x[:, rows].sum(1)) for x in (solved.error, solved.power))
            for i, stack in enumerate(stacks):
                linear, damp = stack.linears[j], solved.damp[i]
                self._keep(linear, solved.linears[i].rows(rows.start, rows.stop), new[i, rows], stack.shared)
                raised, notes = raised_note(stack.damping(self._method), damp), stack.notes(self._method)
                figures = error_sum + i, power_sum + i, None if clipped is None else clipped + i, solved.groups
                about = linear, stack.grid, stack.shared.tokens, stack.dynamic, measure
                self._unread.append(_Rounded(*about, damp, raised, notes, *figures))
            start = rows.stop

    def _keep(self, linear: LinearLayer, rounded: QuantizedLinear, weight: Tensor | None, shared: SharedInput) -> None:
        self.rounded[linear.name] = replace(rounded, inputs=shared.inputs)
        if weight is not None and self._runs_on:
            put(self._block, linear, weight)

    def _figure(self, values: Tensor) -> int:
        """Note figures that are to be read later; returns the place of the first."""
        self._figures.append(values.detach().reshape(-1).to(torch.float64))
        self._count += values.numel()
        return self._count - values.numel()

    def _read(self) -> None:
        """Make the records of what was rounded since the last time."""
        if not self._unread:
            return
        figures: list[float] = torch.cat(self._figures).tolist()
        unread, self._unread, self._figures, self._count = self._unread, [], [], 0
        for one in unread:
            error, power = figures[one.error], figures[one.power]
            if not math.isfinite(error + power):
                raise BadInput(f"{one.linear.name}: its weights or inputs are too large to be rounded in float32")
            clipped = None if one.clipped is None else clipped_note(int(figures[one.clipped]), one.groups)
            all_lost = power > 0 and math.isclose(error, power, rel_tol=1e-3)  # as GPTQ knows it, to a few digits
            lost = _LOST if all_lost and not self.rounded[one.linear.name].dequantize().any() else None
            notes, tokens = "; ".join(filter(None, (one.raised, clipped, lost, *one.notes))), one.tokens
            made = record(one.linear, one.grid).changed(
                **error_fields(error, power, one.measure, tokens), damp=one.damp, tokens=tokens, note=notes or None
            )
            self._records[one.linear.name] = made.changed(dynamic=True) if one.dynamic else made


def _pieces(stacks: list[_Stack]) -> Iterable[list[_Stack]]:
    """Stacks of one shape, so many at a time that their matrices stay within 1 GB each."""
    out_features, in_features = stacks[0].shape
    step = max(1, TOGETHER // (in_features * max(in_features, out_features)))
    return (stacks[start : start + step] for start in range(0, len(stacks), step))


def _together(matrices: Sequence[Tensor | None]) -> Tensor | None:
    """Matrices [in, in] as one tensor [matrices, in, in]; a single one is not copied."""
    there = [matrix for matrix in matrices if matrix is not None]
    return (there[0][None] if len(there) == 1 else torch.stack(there)) if there else None


def _round(method: MethodSettings, weight: Tensor, stack: _Stack, moved: Tensor | None) -> tuple[Rounded, list[str]]:
    """Round stacked weights [out, in]; the notes say what was not done as asked. moved: as SharedInput has it."""
    shared, grid, method = stack.shared, stack.grid, stack.damped(method)
    moment = shared.moment
    if moment is not None and not bool(column_power(moment).isfinite().all()):
        raise BadInput(f"{shared.names[0]}: its inputs hold NaN or inf; try bfloat16 or another calibration text")
    if not method.calibrated:
        result = ROUNDERS[method.name](weight, grid, method, moment, None)
        return result, [note for note in (result.note, stack.clipped_token()) if note is not None]
    if moment is None or not bool(column_power(moment).any()):
        nearest = ROUNDERS["rtn"](weight, grid, method, None, None)
        return nearest, ["no calibration token reached it: rounded to nearest"]
    try:
        if moved is None:
            result = ROUNDERS[method.name](weight, grid, method, moment, shared.drift)
        else:  # only where the method is GPTQ
            result = gptq(weight, grid, method, moment, moved=moved)
    except ValueError as error:
        raise BadInput(
            f"{shared.names[0]}: {error}; try another calibration text, or leave the layer to `ignore`"
        ) from None
    return result, ([] if result.note is None else [result.note]) + stack.notes(method)


def record(linear: LinearLayer, grid: Grid | None) -> LayerRecord:
    """The manifest's record of a linear that is not rounded (yet)."""
    nothing_yet = dict.fromkeys(("loss", "relative_error", "error_measure", "damp", "tokens", "note"))
    return LayerRecord(
        name=linear.name,
        block=linear.block,
        shape=(linear.out_features, linear.in_features),
        bits=16 if grid is None else grid.bits,
        group_size=None if grid is None else grid.group_size,
        symmetric=None if grid is None else grid.symmetric,
        scheme="16 bit" if grid is None else str(grid),
        **nothing_yet,
    )
