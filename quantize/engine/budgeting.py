"""A recipe's `budget`: the number format of each group of linears, chosen within a number of bytes."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibrate import budget, kv_cache
from ..calibrate.sensitivity import Sensitivity
from ..core.errors import BadInput
from ..core.schema import matches
from ..formats import FORMATS
from ..formats.gptq import FUSED
from ..methods import ROUNDERS
from ..models.placed_model import LinearLayer
from ..models.skeleton import Skeleton
from ..numbers.grid import Grid, scale_dtype
from ..recipe import Recipe, Rtn
from .needs import process_bytes
from .outer import NOTHING, Outer
from .plan import Plan

SAMPLES = 32  # of the calibration text that sensitivities are measured on
_ROWS = 64  # sampled from a weight to estimate its error
_FEWEST_ROWS = 8  # sampled from each expert
_CLEARLY = 0.8  # of a plain choice's foretold cost: what a free one has to come to (docs/measured.md, A budget)

Schemes = dict[str, Grid | None]


@dataclass(frozen=True)
class Menu:
    """What the budget may choose: bytes of each option of each group, {group: {grid, None for 16 bit: bytes}}.

    members: the linears of each group; the head, where it is on the menu, is one of its own. room: the most bytes that
    all groups may take together. head: the name of its group.
    """

    sizes: Mapping[str, Mapping[Grid | None, int]]
    members: Mapping[str, Sequence[LinearLayer]]
    room: int
    head: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, skeleton: Skeleton, linears: Sequence[LinearLayer], outer: Outer = NOTHING) -> "Menu":
        """outer: head and embeddings. Linears in `ignore` are none of the menu.

        Raises BadInput for a budget that even the smallest options exceed.
        """
        wanted = recipe.budget
        assert wanted is not None
        members = _groups([x for x in linears if not any(matches(pattern, x.name) for pattern in recipe.ignore)])
        if not members:
            raise BadInput(f"`ignore` {list(recipe.ignore)} matches every linear layer: nothing is left to quantize")
        sizes = {name: _options(wanted.menu, group, recipe, skeleton) for name, group in members.items()}
        saved, head = outer.saved_bytes(skeleton), None
        if options := outer.head_options(recipe, skeleton):
            head = outer.names["head"]
            members[head], sizes[head] = [_head(head, skeleton)], options
            saved = outer.with_head(None, skeleton).saved_bytes(skeleton)
        weights = sum(x.out_features * x.in_features for group in members.values() for x in group)
        nbytes = skeleton.reader.nbytes
        if wanted.bytes is None:
            assert wanted.bits is not None
            room, asked = int(wanted.bits * weights / 8), f"{wanted.bits:g} bits"
        else:
            inside = sum(nbytes(f"{x.name}.weight") for group in members.values() for x in group)
            fixed = sum(nbytes(name) for name in skeleton.reader.names()) - inside - saved
            fixed += kv_cache.scale_bytes(recipe.kv_cache, skeleton)
            room, asked = wanted.bytes - fixed, f"{wanted.bytes} bytes"
        least = sum(min(options.values()) for options in sizes.values())
        if least > room:
            raise BadInput(
                f"budget: {asked} leave {max(room, 0)} bytes for the linears, and the smallest number formats of the "
                f"menu take {least} ({8 * least / weights:.2f} bits a weight): raise it, or add smaller ones"
            )
        sixteen = [options.get(None, room + 1) for options in sizes.values()]
        if sum(sixteen) <= room:
            raise BadInput(f"budget: {asked} hold all linears in 16 bit, and nothing would be quantized: lower it")
        return cls(sizes, members, room, head)

    def schemes(self, chosen: Mapping[str, Grid | None], linears: Sequence[LinearLayer]) -> Schemes:
        """The grid of each linear, by the options chosen for the groups."""
        groups = {x.name: name for name, group in self.members.items() for x in group}
        return {x.name: chosen[groups[x.name]] if x.name in groups else None for x in linears}

    def smallest(self) -> dict[str, Grid | None]:
        """The smallest option of each group."""
        return {name: min(options, key=options.__getitem__) for name, options in self.sizes.items()}

    @property
    def spare_bytes(self) -> int:
        """What a choice may take at most beyond the smallest options."""
        sizes = [options.values() for options in self.sizes.values()]
        return min(self.room, sum(map(max, sizes))) - sum(map(min, sizes))

    def with_(self, grid: Grid) -> dict[str, Grid | None]:
        """`grid` wherever it is an option, else the smallest."""
        return {name: grid if grid in self.sizes[name] else small for name, small in self.smallest().items()}

    def mixed(self) -> dict[str, Grid | None]:
        """Every option somewhere, as a choice may come to."""
        return {name: list(options)[k % len(options)] for k, (name, options) in enumerate(self.sizes.items())}

    def choose(
        self, uses: Mapping[str, Sequence[Sensitivity]], read: Callable[[str], Tensor]
    ) -> dict[str, Grid | None]:
        """The options that change the predictions least. uses: by linear, from `sensitivity.measure`; read: tensors of
        the original.

        Costs are right to a factor of 3 only. So the best plain choice stays, with what it leaves spent on more bytes
        for some groups, unless less for others is foretold to be clearly better.
        """
        costs = {name: _costs(group, list(self.sizes[name]), uses, read) for name, group in self.members.items()}

        def total(chosen: Mapping[str, Grid | None]) -> float:
            return sum(costs[name][option] for name, option in chosen.items())

        plain = min(self._plain(), key=total, default=self.smallest())
        least = {name: self.sizes[name][option] for name, option in plain.items()}
        no_smaller = {
            name: {option: cost for option, cost in each.items() if self.sizes[name][option] >= least[name]}
            for name, each in costs.items()
        }
        near, free = (budget.assign(some, self.sizes, self.room) for some in (no_smaller, costs))
        return free if total(free) < _CLEARLY * total(near) else near

    def _plain(self) -> Iterator[dict[str, Grid | None]]:
        """One option for all groups, or another for those of the first and last block, where they fit.

        A group that lacks the option has its smallest, and so has the head.
        """
        smallest, of_blocks = self.smallest(), {name: group[0].block for name, group in self.members.items()}
        blocks = [k for name, k in of_blocks.items() if name != self.head]
        ends = min(blocks), max(blocks)
        options = dict.fromkeys(option for several in self.sizes.values() for option in several)
        for most, rest in itertools.product(options, repeat=2):
            wanted = {name: rest if k in ends else most for name, k in of_blocks.items() if name != self.head}
            chosen = smallest | {name: option for name, option in wanted.items() if option in self.sizes[name]}
            if sum(self.sizes[name][option] for name, option in chosen.items()) <= self.room:
                yield chosen


def _head(name: str, skeleton: Skeleton) -> LinearLayer:
    """The head as a linear that belongs to no block."""
    rows, columns = skeleton.reader.shape(f"{name}.weight")
    return LinearLayer(name, name, skeleton.n_blocks, rows, columns, transposed=False)


def _groups(linears: Sequence[LinearLayer]) -> dict[str, list[LinearLayer]]:
    """Linears that servers hold as one and that have one scheme: fused ones, and all experts of a block."""
    parts = {part: fused for fused, several in FUSED.items() for part in several}
    found: dict[str, list[LinearLayer]] = {}
    for x in linears:
        parent, _, last = x.name.rpartition(".")
        name = f"{parent}.{parts.get(last, last)}"
        if ".experts." in x.name:
            name = f"{x.name.partition('.experts.')[0]}.experts"
        found.setdefault(name, []).append(x)
    return found


def _options(
    menu: Sequence[Grid | None], group: Sequence[LinearLayer], recipe: Recipe, skeleton: Skeleton
) -> dict[Grid | None, int]:
    """The bytes of each format of the menu that every linear of the group can have; 16 bit where there is none."""
    format, some, spec = FORMATS[recipe.formats[0]], torch.empty(0, dtype=skeleton.dtype), recipe.activations
    sixteen = sum(skeleton.reader.nbytes(f"{x.name}.weight") for x in group)
    found: dict[Grid | None, int] = {None: sixteen} if None in menu else {}
    for grid in menu:
        if grid is None:
            continue
        try:
            for x in group:
                grid.check(x.name, x.in_features)
                format.check(grid, x.out_features, x.in_features, recipe.shuffled)
        except BadInput:
            continue
        scale_bytes = scale_dtype(some, grid).itemsize
        inputs = None if spec is None else spec.beside(grid)
        found[grid] = sum(format.packed_bytes(grid, x.out_features, x.in_features, scale_bytes, inputs) for x in group)
    return found or {None: sixteen}


def _costs(
    group: Sequence[LinearLayer],
    options: Sequence[Grid | None],
    uses: Mapping[str, Sequence[Sensitivity]],
    read: Callable[[str], Tensor],
) -> dict[Grid | None, float]:
    """The KL divergence, in nats per token, that each option would cause, from a sample of rows rounded to nearest.

    The method's own errors are smaller, by about the same factor for all options.
    """
    found = dict.fromkeys(options, 0.0)
    few = max(_FEWEST_ROWS, _ROWS // len(group))
    for x in group:
        weight = read(f"{x.name}.weight")
        weight = weight.T if x.transposed else weight
        rows = torch.arange(0, len(weight), max(1, len(weight) // few))
        w = weight[rows].float()
        for grid in options:
            if grid is not None:
                error = ROUNDERS["rtn"](w, grid, Rtn(), None, None).linear.dequantize() - w
                # An expert that no token reached has no sensitivity.
                found[grid] += sum(use.cost(error, rows) for use in uses[x.name] if use.rows.dim())
    return found


def with_sensitivity(plan: Plan, recipe: Recipe, skeleton: Skeleton, linears: Sequence[LinearLayer]) -> Plan:
    """The plan with the pass that measures what errors cost: in float32, forwards, then backwards block by block.

    On disk are the states that enter each block. In memory is a block and the next one, or embedding and head with the
    logits of one sequence; what one sequence keeps for the gradient; states and gradients of all tokens.
    """
    hidden, seq_len = int(skeleton.config.hidden_size), recipe.calibration.seq_len
    samples = recipe.calibration.samples if recipe.is_gguf else min(SAMPLES, recipe.calibration.samples)
    tokens, outside = samples * seq_len, int(skeleton.config.vocab_size) * hidden
    blocks, widths = [0] * skeleton.n_blocks, [0] * skeleton.n_blocks
    for x in linears:
        blocks[x.block] += x.in_features * x.out_features
        widths[x.block] += x.in_features + x.out_features
    shell = 2 * outside + 4 * seq_len * int(skeleton.config.vocab_size)
    work = 4 * (max(shell, 2 * max(blocks) + 3 * seq_len * max(widths)) + 3 * tokens * hidden)
    operations = 2.0 * tokens * (4 * sum(blocks) + 3 * outside)  # each block runs forwards twice, and backwards
    return replace(
        plan,
        memory_bytes=max(plan.memory_bytes, process_bytes() + work),
        disk_bytes=max(plan.disk_bytes, 4 * tokens * hidden * skeleton.n_blocks),  # gone before the blocks are rounded
        operations=plan.operations + operations,
        seconds=plan.seconds * (1 + operations / plan.operations),
        passes=plan.passes + 1,
    )
