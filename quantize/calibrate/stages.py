"""One pass of a decoder block over the calibration set, halted before each linear that is still to be rounded.

Every batch is a coroutine. All of them run up to the first linear and wait; its inputs' second moment is then complete,
the caller rounds it, and they go on with the rounded weight. So a block is run once, not once to look and once to
propagate, and each linear is rounded for the inputs it will really get, the errors of the linears before it included.
"""

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..methods.panels import panels
from ..models.arguments import Arguments
from ..models.skeleton import Experts
from ..numbers.activations import measured, round_inputs
from ..numbers.grid import Inputs
from ..numbers.types import Activations

Group = tuple[str, ...]  # names of linears that receive one tensor
_ROWS = 1024  # tokens in one product of a moment: their float32 copies are the largest tensors beside what waits

BATCH_TOKENS = 4096  # tokens in one forward pass of a block


@dataclass(frozen=True)
class Stage:
    """Linears that receive the same tensor X [tokens, in], about to be applied.

    moment: X^T X [in, in] float32, or a multiple of its diagonal [in] where an importance matrix is all there is; None
    when nothing is known of X; tokens: rows of X. drift: (X0 - X)^T X [in, in], X0 what
    the original model would send instead; None where that was not asked for or tokens do not correspond. inputs: how X
    is rounded as the artifact runs, None where it is not; X in the moments is what that makes of it.
    """

    names: tuple[str, ...]
    moment: Tensor | None = None
    tokens: int = 0
    drift: Tensor | None = None
    inputs: Inputs | None = None


class Stages:
    """Iterate over the stages of `block`; the weights of a stage's linears are to be replaced before the next one.

    hidden [samples, seq_len, hidden] is replaced by what the block makes of it, `batch` samples at a time, unless
    `keep` is false: then the rest of the block after the last linear is not run. linears {name: module} are the ones
    to halt at. reference: the original model's hidden states, which the block's original weights are applied to beside.
    activations: how the inputs of the linears are rounded, and how many columns share a dynamic scale.
    watch: called with the first name of a stage and some rows of X [tokens, in] float32, until all of X has passed.
    diagonal: of the moments only the diagonal [in] is wanted.
    begin: called when the pass begins; the block has run before that on one sample, to see the order of its linears.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden: Tensor,
        arguments: Arguments,
        linears: Mapping[str, nn.Module],
        *,
        device: torch.device,
        batch: int,
        keep: bool = True,
        reference: Tensor | None = None,
        activations: tuple[Activations, int] | None = None,
        diagonal: bool = False,
        watch: Callable[[str, Tensor], None] = lambda name, rows: None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._activations, self._begin, self._diagonal = activations, begin, diagonal
        self._inputs: dict[str, Inputs] = {}
        self._block, self._hidden, self._arguments, self._device = block, hidden, arguments, device
        self._linears, self._batch, self._keep, self._reference = dict(linears), batch, keep, reference
        self._routed, self._watch = _inside_experts(block), watch

    def __iter__(self) -> Generator[Stage, None, None]:
        shared = shared_inputs(self._block, self._hidden[:1].to(self._device), self._arguments, self._linears)
        compared: list[Group] = []
        originals: list[_Run] = []
        if self._reference is not None:
            compared, originals = [x for x in shared if self._is_aligned(x)], self._original_runs()
        beside = _Originals(originals, [names[0] for names in compared], self._keep)
        runs = self._runs(self._block, self._linears, self._hidden, self._inputs)
        self._begin()
        try:
            for names in shared:
                yield self._stage(names, runs, beside if names in compared else None)
            unreached = [name for name in self._linears if not any(name in names for names in shared)]
            yield from (self._stage((name,), (), None) for name in unreached)
            if self._keep:
                for run in runs:
                    run.finish()
                beside.finish()
        finally:
            for run in (*runs, *originals):
                run.drop()

    def _original_runs(self) -> list["_Run"]:
        assert self._reference is not None
        # Shares the parameters, which the caller replaces in the block and never writes to.
        original = copy.deepcopy(self._block, {id(p): p for p in self._block.parameters()})
        twins = {name: original.get_submodule(_path(self._block, m)) for name, m in self._linears.items()}
        return self._runs(original, twins, self._reference, {})

    def _is_aligned(self, names: Group) -> bool:
        """Whether the original sends the same tokens in the same order: a router may send others to an expert."""
        return not any(self._linears[name] in self._routed for name in names)

    def _runs(
        self, block: nn.Module, linears: Mapping[str, nn.Module], hidden: Tensor, inputs: Mapping[str, Inputs]
    ) -> list["_Run"]:
        parts = torch.split(hidden, self._batch)
        return [_Run(block, linears, part, self._arguments, self._device, inputs) for part in parts]

    def _stage(self, names: Group, runs: Sequence["_Run"], beside: "_Originals | None") -> Stage:
        """Take every batch to the linear `names[0]` and sum up what it is about to receive."""
        moment = drift = None
        tokens = 0
        waiting: Iterable[Tensor] = (run.advance(names[0]) for run in runs)
        if self._activations is not None and self._activations[0].calibrated:
            waiting = list(waiting)
        inputs = self._measured(waiting)
        if inputs is not None:
            self._inputs |= dict.fromkeys(names, inputs)
        for i, x in enumerate(waiting):
            original = None if beside is None else beside.take(i, names[0])
            for start in range(0, x.shape[0], _ROWS):
                part = x[start : start + _ROWS]
                seen = part if inputs is None else round_inputs(part, inputs)
                rows = seen.to(torch.float32)
                self._watch(names[0], rows)
                if self._diagonal:
                    squares = rows.square().sum(0)
                    moment = squares if moment is None else moment.add_(squares)
                    continue
                if moment is None:
                    moment = rows.new_zeros(rows.shape[1], rows.shape[1])
                    drift = None if original is None else torch.zeros_like(moment)
                with exact_products(x.dtype):
                    add_second_moment(moment, rows)
                if drift is not None and original is not None:
                    # Small as the difference is, the 8 bits that bfloat16 has of it are plenty, at twice the speed.
                    factor = seen if x.dtype == torch.bfloat16 else rows
                    drift += (original[start : start + _ROWS] - factor).T @ factor
            tokens += x.shape[0]
            if beside is not None:
                del original
                beside.let_go(i, names[0])
        if moment is not None and not self._diagonal:
            moment = moment.triu_().add_(moment.triu(1).T)
        return Stage(names, moment, tokens, drift, inputs)

    def _measured(self, waiting: Iterable[Tensor]) -> Inputs | None:
        """How what is `waiting` before a linear, [tokens, in] a batch, will be rounded; taken only if calibrated."""
        if self._activations is None:
            return None
        spec, columns = self._activations
        ranges = [x.aminmax() for x in waiting if x.numel()] if spec.calibrated else []
        low = min((float(r.min) for r in ranges), default=0.0)
        return measured(spec, columns, low, max((float(r.max) for r in ranges), default=0.0))


def shared_inputs(
    block: nn.Module, hidden: Tensor, arguments: Arguments, linears: Mapping[str, nn.Module]
) -> list[tuple[str, ...]]:
    """The linears in the order `block` reaches them, those that receive one tensor together: observed on `hidden`."""
    seen: list[tuple[Tensor, list[str]]] = []  # holds the tensors, so that none is freed and its memory reused

    def note(name: str, x: Tensor) -> None:
        for other, names in seen:
            if x is other or (x.numel() and x.data_ptr() == other.data_ptr() and x.shape == other.shape):
                names.append(name)
                return
        seen.append((x, [name]))

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in linears.items()
    ]
    args, kwargs = arguments
    try:
        with torch.no_grad():
            block(hidden, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(names) for _, names in seen]


class _Originals:
    """The original's batches, each halted where it holds the least until it is asked for.

    Before the output projection of attention a batch holds its queries, keys and values too, and before the last linear
    of the MLP the widest input of all. The original has no rounding to wait for: it leaves the one at once for the next
    stage, and the other for the end of the block.
    """

    def __init__(self, runs: Sequence["_Run"], names: Sequence[str], keep: bool) -> None:
        self._runs, self._names, self._keep = runs, names, keep
        self._ahead: dict[int, Tensor] = {}

    def take(self, i: int, name: str) -> Tensor:
        """What batch `i` sends to linear `name` [tokens, in]."""
        ahead = self._ahead.pop(i, None)
        return self._runs[i].advance(name) if ahead is None else ahead

    def let_go(self, i: int, name: str) -> None:
        """What batch `i` sent to `name` is no longer needed."""
        to_come = self._names[self._names.index(name) + 1 :]
        if len(to_come) > 1:
            self._ahead[i] = self._runs[i].advance(to_come[0])
        elif not to_come:
            self._runs[i].finish() if self._keep else self._runs[i].drop()

    def finish(self) -> None:
        """Run the batches to the end that are not there yet: those that were compared at no linear."""
        for run in () if self._names else self._runs:
            run.finish()


class _Run:
    """One batch on its way through the block; it waits before each of `linears` until told to go on."""

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        hidden: Tensor,
        arguments: Arguments,
        device: torch.device,
        inputs: Mapping[str, Inputs],
    ) -> None:
        def whole_pass() -> None:
            args, kwargs = arguments
            result = block(hidden.to(device), *args, **kwargs)
            hidden.copy_(result[0] if isinstance(result, tuple) else result)

        def halt(name: str, x: Tensor) -> Tensor:
            if getcurrent() is not self._thread:
                return x
            if last and last[0] is not x:
                last.clear()  # nothing is kept of it while this batch waits
            main.switch((name, x))
            if name not in inputs:
                return x
            if not last:
                last.extend((x, round_inputs(x, inputs[name])))
            return last[1]

        last: list[Tensor] = []  # an input and what it is rounded to, for the linears that share it

        main, self._thread = getcurrent(), greenlet(whole_pass)
        self._handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: halt(name, args[0]))
            for name, module in linears.items()
        ]

    def advance(self, name: str) -> Tensor:
        """Go on until linear `name` is about to be applied; returns its input [tokens, in]."""
        while True:
            with torch.no_grad():
                reached = self._thread.switch()
            if reached is None:
                raise RuntimeError(f"a batch has run through the block without reaching {name}")
            at, x = reached
            if at == name:
                return x.reshape(-1, x.shape[-1])  # type: ignore[no-any-return]

    def finish(self) -> None:
        """Run to the end of the block."""
        while not self._thread.dead:
            with torch.no_grad():
                self._thread.switch()

    def drop(self) -> None:
        """Give up where it stands."""
        if not self._thread.dead:
            self._thread.throw(GreenletExit)
        for handle in self._handles:
            handle.remove()


def add_second_moment(total: Tensor, rows: Tensor) -> None:
    """Add X^T X to the upper triangle of `total` [in, in] for X = rows [tokens, in]; what is below it is undefined."""
    if rows.device.type != "cpu":
        total.addmm_(rows.T, rows)
        return
    for part in panels(rows.shape[1]):
        total[part, part.start :].addmm_(rows[:, part].T, rows[:, part.start :])


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of values that came in `dtype` use the faster units that multiply those exactly.

    bfloat16 values are whole in AMX's bfloat16 and in TF32, float16 ones in TF32; sums stay float32.
    """
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    gpu: Any = torch.backends.cuda.matmul
    before = cpu.fp32_precision, gpu.fp32_precision
    if dtype == torch.bfloat16:
        cpu.fp32_precision = "bf16"
    if dtype in (torch.bfloat16, torch.float16):
        gpu.fp32_precision = "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before


def _inside_experts(block: nn.Module) -> set[nn.Module]:
    """Modules that see only the tokens a router sends them."""
    return {part for module in block.modules() if isinstance(module, Experts) for part in module.modules()}


def _path(block: nn.Module, wanted: nn.Module) -> str:
    names: Iterator[str] = (name for name, module in block.named_modules() if module is wanted)
    return next(names)
