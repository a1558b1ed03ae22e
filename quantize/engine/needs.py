"""What a run needs of a machine's memory, estimated from shapes."""

import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch

from ..calibrate.block_pass import BATCH_TOKENS, MOMENT_BYTES
from ..calibrate.moments import sums_by_rows
from ..formats import FORMATS
from ..methods import solves_batches
from ..methods.gptq import BATCH_ELEMENTS
from ..models.by_name import ByName
from ..models.placed_model import LinearLayer
from ..models.skeleton import Skeleton
from ..numbers.grid import scale_dtype
from ..numbers.types import BlockGrid, Grid
from ..recipe import Recipe, Tuned
from .guard import comparison_bytes
from .room import Needs
from .rounding import TOGETHER

_PROCESS_BYTES = 545_000_000  # Python, torch 2.13, transformers 5.24 and the run of a tiny model, measured on Linux
_SKLEARN_BYTES = 125_000_000  # with pandas and pyarrow, which it imports
_TOKENIZER_BYTES = 1000  # memory per vocabulary entry, measured with SmolLM2's byte-level BPE
# Of a weight that a thread rounds to nearest, measured with 1 to 8 threads; most of it lies between tensors in use.
_WORK_BYTES, _NVFP4_WORK_BYTES = 90, 240
_ROUNDED_AT_ONCE = 1 << 19  # weights, by each thread (`rtn_by_rows`)


def process_bytes() -> int:
    """Bytes of a process without a model's tensors, once the model is opened.

    transformers imports sklearn, where it is installed, with its models (5.17), or not before it is used (5.24).
    """
    return _PROCESS_BYTES + ("sklearn" in sys.modules) * _SKLEARN_BYTES


def find_needs(
    recipe: Recipe, skeleton: Skeleton, linears: list[LinearLayer], schemes: dict[str, Grid | None]
) -> Needs:
    """What a run of one process needs."""
    inside = skeleton.bytes_of_blocks
    calibrated, seq_len = recipe.calibrated, recipe.calibration.seq_len
    tokens = recipe.calibration.samples * seq_len if calibrated else 0
    item, width = torch.empty(0, dtype=skeleton.dtype).element_size(), int(skeleton.config.hidden_size)
    streams, hidden = 2 if recipe.paired else 1, tokens * width * item
    if calibrated and solves_batches(recipe.rounder, skeleton.device):
        solve, sums = _solved_in_batches(skeleton, linears, schemes, recipe.paired)
    elif calibrated and recipe.method.name == "rtn" and not recipe.transforms:
        # What is summed up has a lane beside it; where the original runs beside, there are three sums.
        solve, sums = _largest_rounding(_stacks(linears, schemes), 6 if recipe.paired else 2), 0
    else:
        solve, sums = _largest_solve(_stacks(linears, schemes), calibrated), 0
    return Needs(
        weights=max(inside),
        hidden=hidden,
        streams=streams,
        # What enters the block, both models', is copied.
        kept=streams * hidden if isinstance(recipe.method, Tuned) else 0,
        waiting=_waiting(skeleton, linears, tokens, item, width, beside=recipe.paired),
        token=_passing(skeleton, linears, item, recipe.activations is not None),
        solve=solve,
        sums=sums,
        shell=skeleton.nbytes - sum(inside),
        tokens=tokens,
        process=process_bytes() + _TOKENIZER_BYTES * int(skeleton.config.vocab_size),
        tuning=_tuning_bytes(recipe, skeleton, linears, max(inside) // item),
        open_shell=_open_shell(skeleton) if calibrated else 0,
        check=comparison_bytes(skeleton.nbytes, skeleton.parameters),
        carried=streams * tokens * _carried(skeleton.config, linears, seq_len, item),
        data_free=0 if calibrated or skeleton.device.type != "cpu" else _data_free(recipe, skeleton, linears, schemes),
    )


def _data_free(recipe: Recipe, skeleton: Skeleton, linears: list[LinearLayer], schemes: dict[str, Grid | None]) -> int:
    """Bytes of a block that is rounded on a CPU without calibration, while the one before it is being written.

    Codes lie in memory that later blocks use again. Weights are read a few rows at a time, unless a block has to show
    what its linears share.
    """
    format, blocks = FORMATS[recipe.formats[0]], range(skeleton.n_blocks)
    some = torch.empty(0, dtype=skeleton.dtype)
    nbytes: Any = skeleton.reader.nbytes

    @cache
    def packed(grid: Grid, n_out: int, n_in: int) -> int:
        """What is packed beside the codes."""
        size = format.packed_bytes(grid, n_out, n_in, scale_dtype(some, grid).itemsize, recipe.activations)
        return size - format.keeps_codes(grid, recipe.activations) * n_out * n_in

    quantized = [(x, grid) for x in linears if (grid := schemes[x.name]) is not None]
    codes: list[Counter[tuple[int, int]]] = [Counter() for _ in blocks]
    written: list[Counter[tuple[int, int]]] = [Counter() for _ in blocks]  # those that are packed as they are
    parts = list(skeleton.bytes_of_blocks)
    for x, grid in quantized:
        shape = x.out_features, x.in_features
        codes[x.block][shape] += 1
        written[x.block][shape] += format.keeps_codes(grid, recipe.activations)
        parts[x.block] += packed(grid, *shape) - nbytes(f"{x.name}.weight")
    most, before, there = Counter[tuple[int, int]](), 0, 0
    for k in blocks:
        most |= codes[k] + (written[k - 1] if k else Counter())
        before = max(before, parts[k - 1] if k else 0)
        there = max(there, parts[k] + (parts[k - 1] if k else 0))
    read, stack = _read_whole(recipe, skeleton, quantized)
    others = _stacks(linears, {x.name: grid for x, grid in quantized if not _by_rows(grid)})
    rounding = max(_largest_rounding(others, 0), _work(quantized))
    return sum(n * n_out * n_in for (n_out, n_in), n in most.items()) + read + max(there, before + stack + rounding)


def _read_whole(recipe: Recipe, skeleton: Skeleton, quantized: list[tuple[LinearLayer, Grid]]) -> tuple[int, int]:
    """Bytes of blocks whose weights are read as a whole, and of the largest stack of those that share a scale."""
    blocks, reader = 2 * max(skeleton.bytes_of_blocks), skeleton.reader  # the next one is read meanwhile
    shares = any(grid.shares_across_linears for _, grid in quantized)
    if not shares and not recipe.transforms:
        return blocks * (not all(reader.holds(f"{x.name}.weight") for x, _ in quantized)), 0
    stacks = _stacks([x for x, _ in quantized], {x.name: grid for x, grid in quantized})
    stack = skeleton.dtype.itemsize * max((n * rows for (_, n, _), rows in stacks.items()), default=0)
    return (0, 2 * stack) if isinstance(skeleton, ByName) else (blocks, stack)


def _work(quantized: Iterable[tuple[LinearLayer, Grid]]) -> int:
    """Bytes of what all threads take to round a few rows each."""
    at_once = _ROUNDED_AT_ONCE * torch.get_num_threads()
    return max(
        (
            (_NVFP4_WORK_BYTES if grid.type == "nvfp4" else _WORK_BYTES) * min(x.out_features * x.in_features, at_once)
            for x, grid in quantized
            if _by_rows(grid)
        ),
        default=0,
    )


def _by_rows(grid: Grid) -> bool:
    """Whether rows are rounded each by itself where nothing is known of their inputs."""
    return not isinstance(grid, BlockGrid) and not grid.shares_rows


def _stacks(linears: list[LinearLayer], schemes: dict[str, Grid | None]) -> Counter[tuple[int, int, str]]:
    """Rows of the quantized linears that may share an input, by (block, in, parent)."""
    stacks: Counter[tuple[int, int, str]] = Counter()
    for x in linears:
        if schemes.get(x.name) is not None:
            stacks[x.block, x.in_features, x.module.rpartition(".")[0]] += x.out_features
    return stacks


def _largest_rounding(stacks: Counter[tuple[int, int, str]], matrices: int) -> int:
    """Bytes of the float32 copies of a stack that is rounded to nearest, beside `matrices` of what enters it."""
    return max((20 * n * rows + 4 * matrices * n * n for (_, n, _), rows in stacks.items()), default=0)


def _largest_solve(stacks: Counter[tuple[int, int, str]], calibrated: bool) -> int:
    """Bytes of one block's Hessians and of the float32 copies of the largest stack of linears that may share one."""
    weights: Counter[int] = Counter()
    hessians: Counter[int] = Counter()
    widest: Counter[int] = Counter()
    for (block, n, _), rows in stacks.items():
        weights[block] = max(weights[block], n * rows)
        hessians[block] += 4 * n * n
        widest[block] = max(widest[block], n)
    # Solving takes five more of the largest; while summing up, three have a lane beside them.
    return max((20 * weights[k] + calibrated * (hessians[k] + 32 * widest[k] ** 2) for k in weights), default=0)


def _solved_in_batches(
    skeleton: Skeleton, linears: list[LinearLayer], schemes: dict[str, Grid | None], paired: bool
) -> tuple[int, int]:
    """Bytes that `gptq_batch` takes for the largest stacks of linears that share an input, and of the sums over it."""
    stacks: dict[tuple[int, int, str], list[LinearLayer]] = {}
    for x in linears:
        if schemes[x.name] is not None:
            stacks.setdefault((x.block, x.in_features, x.module.rpartition(".")[0]), []).append(x)
    solve = sums = 0
    for (_, n, _), stack in stacks.items():
        rows, experts = sum(x.out_features for x in stack), stack[0].experts
        at_once = 1 if experts is None else min(experts, max(1, MOMENT_BYTES // (12 * n * n)))
        together = min(at_once, max(1, TOGETHER // (n * max(n, rows))))
        by_rows = sums_by_rows(rows, n)
        drift = paired * (rows * n if by_rows else n * n)
        # Each sum has a lane beside it; without rows there is the drift's own square, too.
        sums = max(sums, 8 * at_once * (n * n + drift * (1 if by_rows else 2)))
        part = min(together * rows * n, max(BATCH_ELEMENTS // 2, BATCH_ELEMENTS - together * n * n))
        copies = n * n + drift if together > 1 else 0
        work = max(8 * part, 8 * min(2048, n) * n)  # rows, or panels of the factor
        solve = max(solve, 4 * (at_once * (n * n + drift) + together * (n * n + copies) + work))
    return solve, sums


def _open_shell(skeleton: Skeleton) -> int:
    """Bytes of the shell where it may have to stay open and run for each batch: in families of which no row tells what
    feeds what, since only running them shows it."""
    stored = set() if skeleton.family.feeds else {*skeleton.shell_names().values()}
    return sum(skeleton.reader.nbytes(name) for name in stored)


def _carried(config: Any, linears: list[LinearLayer], seq_len: int, item: int) -> int:
    """Bytes a token that blocks leave for later ones: keys and values of both kinds of attention, or chosen tokens."""
    total = 0
    if getattr(config, "num_kv_shared_layers", None):
        widest = max((x.out_features for x in linears if x.module.endswith("k_proj")), default=0)
        total += 2 * 2 * widest * item
    if chosen := getattr(config, "index_topk", None):
        total += min(int(chosen), seq_len) * torch.int64.itemsize
    return total


def _waiting(skeleton: Skeleton, linears: list[LinearLayer], tokens: int, item: int, hidden: int, beside: bool) -> int:
    """Bytes that all tokens hold while their batches wait before a linear.

    Before the widest linear: its input, the residual and the normalised residual; the original, where it runs `beside`,
    has finished by then. All of a token's experts wait before their last linears together. Before attention's output
    projection: queries, keys and values too, and two tensors of the original.
    """
    chosen = skeleton.experts_per_token or 1
    inside = {x.in_features: x for x in linears}.values()  # one of each width
    widest = max(x.in_features * (chosen if x.in_features != hidden and x.experts else 1) for x in inside)
    widest += 2 * hidden
    attention = (5 + 2 * beside) * hidden
    return tokens * max(widest, attention) * item


def _passing(skeleton: Skeleton, linears: list[LinearLayer], item: int, rounded: bool) -> int:
    """Bytes of the widest tensors of one token in a block; inputs to be `rounded` exist twice more, in float32.

    A GPU computes all experts of a token together: inputs and results of two linears of each.
    """
    widest = max(max(x.in_features, x.out_features) for x in linears)
    token = widest * (4 * item + 1 + 8 * rounded)
    inside = [x.in_features + x.out_features for x in linears if x.experts]
    if skeleton.device.type == "cuda" and inside:
        token = max(token, 2 * item * (skeleton.experts_per_token or 1) * max(inside))
    return token


def reaching(skeleton: Skeleton, linear: LinearLayer) -> float:
    """The share of all tokens that reach a linear."""
    experts = linear.experts
    chosen = skeleton.experts_per_token
    return 1.0 if experts is None or chosen is None else min(1.0, chosen / experts)


def _tuning_bytes(recipe: Recipe, skeleton: Skeleton, linears: list[LinearLayer], parameters: int) -> int:
    """Bytes of a block in float32 twice, its learned values, and a batch's activations kept for the gradient."""
    if not isinstance(recipe.method, Tuned):
        return 0
    batch_tokens = recipe.method.batch_size * recipe.calibration.seq_len
    widths: dict[int, float] = {}
    for x in linears:
        widths[x.block] = widths.get(x.block, 0.0) + (x.in_features + x.out_features) * reaching(skeleton, x)
    return 64 * parameters + int(3 * 4 * min(batch_tokens, BATCH_TOKENS) * max(widths.values()))
