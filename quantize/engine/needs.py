"""What a run needs of a machine's memory, estimated from shapes."""

import sys
from typing import Any

import torch

from ..calibrate.block_pass import BATCH_TOKENS, MOMENT_BYTES
from ..calibrate.moments import sums_by_rows
from ..methods import solves_batches
from ..methods.gptq import BATCH_ELEMENTS
from ..models.placed_model import LinearLayer
from ..models.skeleton import Skeleton
from ..numbers.types import BlockGrid, Grid
from ..recipe import Recipe, Tuned
from .guard import comparison_bytes
from .room import Needs
from .rounding import TOGETHER

_PROCESS_BYTES = 545_000_000  # Python, torch 2.13, transformers 5.24 and the run of a tiny model, measured on Linux
_SKLEARN_BYTES = 125_000_000  # with pandas and pyarrow, which it imports
_TOKENIZER_BYTES = 1000  # memory per vocabulary entry, measured with SmolLM2's byte-level BPE


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
    elif not calibrated and skeleton.device.type == "cpu" and all(map(_by_rows, schemes.values())):
        solve, sums = 0, 0  # what a few rows take is small beside the codes of two blocks
    else:
        solve, sums = _largest_solve(linears, schemes, calibrated), 0
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
        check=comparison_bytes(skeleton.nbytes, item),
        carried=streams * tokens * _carried(skeleton.config, linears, seq_len, item),
    )


def _by_rows(grid: Grid | None) -> bool:
    """Whether rows are rounded each by itself where nothing is known of their inputs."""
    return grid is None or not (isinstance(grid, BlockGrid) or grid.shares_rows or grid.shares_across_linears)


def _largest_solve(linears: list[LinearLayer], schemes: dict[str, Grid | None], calibrated: bool) -> int:
    """Bytes of one block's Hessians and of the float32 copies of the largest stack of linears that may share one."""
    by_block: dict[int, list[LinearLayer]] = {}
    for linear in linears:
        if schemes[linear.name] is not None:
            by_block.setdefault(linear.block, []).append(linear)
    most = 0
    for block in by_block.values():
        stacks: dict[tuple[int, str], int] = {}
        for x in block:
            parent = (x.in_features, x.module.rpartition(".")[0])
            stacks[parent] = stacks.get(parent, 0) + x.out_features
        weights = max(n_in * out for (n_in, _), out in stacks.items())
        # Solving takes five more of the largest; while summing up, three have a lane beside them.
        hessians = sum(4 * n_in * n_in for n_in, _ in stacks) + 32 * max(n_in for n_in, _ in stacks) ** 2
        most = max(most, 20 * weights + (hessians if calibrated else 0))
    return most


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
