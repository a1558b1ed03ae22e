"""What GPTQ loses by the products of a GPU, found on the CPU: the GPU's way of solving, exactly and with TF32.

    python tests/bench/gpu_products.py --calibration FILE.txt --evaluation FILE.txt [FILE.txt …] [--model M]
        [--bits N …] [--group-size N] [--way WAY …]

cpu: GPTQ as a CPU does it. solved as on a GPU: in batches, with a factor instead of an inverse and the drift by rows,
all products in float32. with TF32: those products that a GPU makes in TF32 have their factors rounded to its 10 bits.
and its sums: what linears receive is summed up as on a GPU, too, from 16 bits and the original's outputs.
The columns are rounded by loops in torch in the place of the kernels. A row: KL divergence on each text, CPU seconds.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from runs import Runs, options, say
from sixteen_bits import addmm, mm
from torch import Tensor

from quantpress.calibrate import moments
from quantpress.engine import blocks, needs, rounding
from quantpress.methods import gptq_batch, upper_factors
from quantpress.numbers.grid import round_numbers_

WAYS = ("cpu", "solved as on a GPU", "with TF32", "and its sums")


def solve_columns(
    fed: Tensor,
    inside: Tensor,
    variance: Tensor,
    scales: Tensor,
    zeros: Tensor,
    error: Tensor,
    numbers: Tensor,
    squares: Tensor,
    grid: Any,
    lead: Tensor | None,
    strength: float,
) -> None:
    """The kernel's work, column by column."""
    scales, zeros = scales.expand_as(error), zeros.expand_as(error)
    for j in range(error.shape[1]):
        received = fed[:, j] + torch.einsum("li,lir->lr", inside[:, j, :j], error[:, :j])
        shifted = error[:, j] + received + zeros[:, j] * scales[:, j]
        numbers[:, j] = round_numbers_(shifted / scales[:, j], grid)
        off = shifted - numbers[:, j] * scales[:, j]
        own = off if lead is None else off - lead[:, j]
        square = off.square() if lead is None else own * (own + 2 / strength * lead[:, j])
        squares += square * variance[:, j, None]
        error[:, j] = off - received


def columns_first(x: Tensor, back: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernel's work."""
    return gptq_batch.in_order(x.to(dtype).mT, back.argsort(-1))


def rounded(x: Tensor) -> Tensor:
    """To the 10 bits of the fraction that TF32 has, the nearest."""
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & (-1 << 13)).view(torch.float32)


def in_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `_factors` gives on a GPU."""
    high = (x.contiguous().view(torch.int32) & (-1 << 13)).view(torch.float32)
    return torch.cat([high, high, x - high], -1), torch.cat([high, x - high, high], -1)


def shortened(product: Callable[..., Tensor], first: int) -> Callable[..., Tensor]:
    """A product of its arguments `first` and the next, as a GPU would make it where TF32 is allowed."""

    @wraps(product)
    def multiply(*given: Any, **options: Any) -> Tensor:
        gpu: Any = torch.backends.cuda.matmul
        if gpu.fp32_precision == "tf32" and given[first].dtype == torch.float32:
            given = (*given[:first], *(rounded(x) for x in given[first : first + 2]), *given[first + 2 :])
        return product(*given, **options)

    return multiply


def as_on_a_gpu(*, tf32: bool, sums: bool) -> None:
    """From now on, runs of this process solve so."""
    changed: Any = rounding, needs, gptq_batch, upper_factors, blocks
    engine, planned, batch, factors, run = changed
    engine.solves_batches = planned.solves_batches = lambda method, device: method.name == "gptq"
    engine.kernels_refused = lambda *what: None
    batch.solve_columns, batch.columns_first, batch.can_fit = solve_columns, columns_first, lambda grid: False
    whole = run.BlockPass
    run.BlockPass = lambda *given, **options: whole(*given, **options | {"moved": True})
    if tf32:
        everywhere: Any = torch
        everywhere.bmm, everywhere.baddbmm = shortened(torch.bmm, 0), shortened(torch.baddbmm, 1)
        everywhere.Tensor.baddbmm_ = shortened(torch.Tensor.baddbmm_, 1)
        everywhere.Tensor.__matmul__ = shortened(torch.Tensor.__matmul__, 0)
        factors._factors = in_halves
    if sums:
        products: Any = torch
        products.mm, products.addmm = mm, addmm
        summing: Any = moments
        summing._sums_in_float32 = lambda device, dtype: dtype == torch.bfloat16


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--way", choices=WAYS, nargs="+", default=WAYS)
    args = parser.parse_args()
    runs = Runs(args)
    for way in args.way:
        if way != "cpu":
            as_on_a_gpu(tf32=way in WAYS[2:], sums=way == WAYS[3])
        for bits in args.bits:
            weights = {"bits": bits, "group_size": args.group_size, "symmetric": False}
            found = runs.figures({"weights": weights, "description": way})
            say(f"int{bits} {way:20} {'  '.join(f'{kl:.5f}' for kl in found.kl)}  {found.cpu_s:.0f}")


if __name__ == "__main__":
    main()
