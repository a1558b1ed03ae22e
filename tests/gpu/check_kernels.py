"""GPTQ's kernels on a real GPU: equal to the plain loop, and how long both take. `python tests/gpu/check_kernels.py`.

Prints a JSON line a check and a shape; exits with 1 where a check fails. Needs Triton; takes about two minutes.
`--rehearse` runs all of it on a CPU by Triton's interpreter, on small shapes, whose times mean nothing.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
REHEARSED = "--rehearse" in sys.argv
if REHEARSED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported and when a kernel is defined


def link_package() -> None:
    """Make quantpress importable where it is not installed, by links as its package-dir says."""
    try:
        import quantpress  # noqa: F401
    except ImportError:
        folder = Path(tempfile.mkdtemp()) / "quantpress"
        folder.mkdir()
        for part in (ROOT / "quantize").iterdir():
            os.symlink(part, folder / part.name)
        for name, source in (("eval", "eval"), ("exports", "export"), ("recipes", "recipes")):
            os.symlink(ROOT / source, folder / name)
        sys.path.insert(0, str(folder.parent))


link_package()

from transformers import LlamaConfig  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm  # noqa: E402

from quantpress.calibrate import moments  # noqa: E402
from quantpress.calibrate.moments import Moments, drift_powers, end_lanes  # noqa: E402
from quantpress.methods import column_kernels as kernels  # noqa: E402
from quantpress.methods import gptq_batch as batch  # noqa: E402
from quantpress.methods import kernel_check  # noqa: E402
from quantpress.methods.gptq import gptq  # noqa: E402
from quantpress.methods.upper_factors import factor_upper_  # noqa: E402
from quantpress.models.fused import fused  # noqa: E402
from quantpress.numbers.fitting import fit, global_scale  # noqa: E402
from quantpress.numbers.types import BlockGrid, Grid  # noqa: E402
from quantpress.recipe import Gptq  # noqa: E402
from quantpress.recipe.methods import LEAST_DAMP  # noqa: E402

DEVICE = torch.device("cpu" if REHEARSED else "cuda")
W4 = Grid(bits=4, group_size=128, symmetric=False)
failures: list[str] = []


def say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def expect(what: str, good: bool, **fields: Any) -> None:
    say(check=what, good=good, **fields)
    if not good:
        failures.append(what)


def problem(linears: int, out: int, n: int, *, tokens: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 weights [linears, out, n], moments and drifts [linears, n, n] of correlated inputs of unequal size."""
    g = torch.Generator(DEVICE).manual_seed(n + out)
    tokens = tokens or 2 * n
    weight = (torch.randn(linears, out, n, device=DEVICE, generator=g) * 0.02).bfloat16()
    moment, drift = torch.empty(2, linears, n, n, device=DEVICE).unbind(0)
    sizes = torch.rand(n, device=DEVICE, generator=g).add_(0.1)
    for i in range(linears):
        x = torch.randn(tokens, n, device=DEVICE, generator=g)
        x = (x + 0.5 * x.roll(1, 1)) * sizes
        torch.mm(x.T, x, out=moment[i])
        torch.mm(0.02 * torch.randn(tokens, n, device=DEVICE, generator=g).T, x, out=drift[i])
        drift[i] += 0.01 * moment[i]
    return weight, moment, drift


def off(q: Tensor, weight: Tensor, moment: Tensor) -> float:
    e = q.double() - weight.double()
    return float(((e @ moment.double()) * e).sum())


def synchronize() -> None:
    if not REHEARSED:
        torch.cuda.synchronize()


def memory() -> int:
    """Bytes in use; the peak is counted from here."""
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def seconds(call: Callable[[], Any], times: int = 3) -> float:
    took = []
    if not REHEARSED:
        call()
    for _ in range(1 if REHEARSED else times):
        synchronize()
        begun = time.perf_counter()
        call()
        synchronize()
        took.append(time.perf_counter() - begun)
    return sorted(took)[len(took) // 2]


def small(n: int) -> int:
    """A size as it is, or one for a rehearsal, which is whole groups still."""
    return max(128, n // 16 // 128 * 128) if REHEARSED else n


def check_scales() -> None:
    """The search in one launch against the search in torch."""
    rows = 40 if REHEARSED else 300
    for grid, dtype in (
        (W4, torch.bfloat16),
        (Grid(bits=4, group_size=128), torch.float16),
        (Grid(bits=2, group_size=64, symmetric=False), torch.bfloat16),
        (Grid(bits=3, group_size=128, symmetric=False), torch.float16),
        (Grid(bits=8, group_size=-1), torch.bfloat16),
        (Grid(type="fp8"), torch.bfloat16),
        (Grid(type="mxfp8"), torch.float8_e8m0fnu),
        (Grid(type="mxfp4"), torch.float8_e8m0fnu),
        (Grid(type="nvfp4"), torch.float8_e4m3fn),
    ):
        columns = grid.columns(512)
        w = torch.randn(2, columns, rows, device=DEVICE) * torch.rand(2, 1, rows, device=DEVICE)
        w[0, :, 3] = 0
        importance = torch.rand(2, columns, device=DEVICE) + 0.1
        overall = global_scale(w, grid)
        found = torch.full((3, 2, rows), torch.nan, device=DEVICE).unbind(0)
        kernels.fit_scales(w, grid, dtype, importance, overall, found)
        same = []
        for i in range(2):
            want = fit(w[i].T, grid, dtype, importance[i], None if overall is None else overall[i])
            same += [(ours[i] == theirs).float().mean().item() for ours, theirs in zip(found, want, strict=False)]
        expect(f"scales {grid}", min(same) > 0.99, same=min(same))


def check_solve() -> None:
    """Whole solves: the batch against each linear alone in the plain loop, here and on the CPU."""
    weight, moment, drift = problem(1, 16, 256) if REHEARSED else problem(3, 96, 512)
    grids = (
        W4, Grid(bits=3, group_size=64, symmetric=False), Grid(bits=8, group_size=-1), Grid(type="fp8"),
        Grid(type="fp8-block"), Grid(type="mxfp4"), Grid(type="mxfp8"), Grid(type="nvfp4"),
        BlockGrid(type="Q4_K"), BlockGrid(type="Q5_0"),
    )  # fmt: skip
    for grid in grids[::4] if REHEARSED else grids:
        for order, static in (("group_aware", True), ("activation", True), ("activation", False)):
            if not static and (grid.type != "int" or grid.group_size == -1):
                continue
            s = Gptq(order=order, static_groups=static)
            refused = kernel_check.kernels_refused(grid, s, weight.dtype, DEVICE)
            expect(f"trial {grid} {order}", refused is None, why=refused)
            got = batch.gptq_batch(weight, grid, s, moment, drift)
            same, ratio = 1.0, []
            for i, linear in enumerate(got.linears):
                want = gptq(weight[i], grid, s, moment[i], drift[i]).linear
                plain = gptq(weight[i].cpu(), grid, s, moment[i].cpu(), drift[i].cpu()).linear.dequantize().to(DEVICE)
                same = min(same, (linear.codes == want.codes).float().mean().item())
                ours = off(linear.dequantize(), weight[i], moment[i])
                ratio += [ours / off(q, weight[i], moment[i]) for q in (want.dequantize(), plain)]
            worst = max(abs(r - 1) for r in ratio)
            expect(f"solve {grid} {order} {'static' if static else 'shuffled'}", worst < 0.01, same=same, worst=worst)


def check_parts() -> None:
    """A norm, a gate and a rotation by one kernel each: trusted beside the model's own code, and how long both take."""
    config = LlamaConfig(hidden_size=small(4096), intermediate_size=small(14336))
    x = torch.randn(32768 if not REHEARSED else 64, config.hidden_size, device=DEVICE).bfloat16()
    with torch.device(DEVICE):
        modules = LlamaRMSNorm(config.hidden_size).bfloat16(), LlamaMLP(config).bfloat16()
    with torch.no_grad():
        for module in modules:
            own = seconds(lambda module=module: module(x), 2)
            with fused(module, torch.device("cuda")):
                took = seconds(lambda module=module: module(x), 2)
                name = type(module).__name__
                expect(f"{name} by a kernel", "forward" in vars(module), own_s=own, kernel_s=took)
        own_code, attention = modeling_llama.apply_rotary_pos_emb, LlamaAttention(config, 0)
        heads = x.view(-1, 64, config.hidden_size // 64, 64).transpose(1, 2)
        turn = torch.randn(1, heads.shape[2], 64, device=DEVICE).bfloat16()
        own = seconds(lambda: modeling_llama.apply_rotary_pos_emb(heads, heads, turn, turn), 2)
        with fused(attention, torch.device("cuda")):
            took = seconds(lambda: modeling_llama.apply_rotary_pos_emb(heads, heads, turn, turn), 2)
            used = modeling_llama.apply_rotary_pos_emb is not own_code
            expect("rotary embedding by a kernel", used, own_s=own, kernel_s=took)


def check_factor(n: int, linears: int) -> None:
    n, linears = small(n), min(linears, 2) if REHEARSED else linears
    g = torch.Generator(DEVICE).manual_seed(n)
    x = torch.randn(2 * n, n, device=DEVICE, generator=g)
    h = (x.T @ x).expand(linears, n, n).contiguous()
    found = factor_upper_(h.clone())
    t = found.above[0].triu(1)
    t.diagonal().fill_(1)
    back = t * found.variance[0]
    back = (torch.linalg.matrix_norm(back @ t.T - h[0]) / torch.linalg.matrix_norm(h[0])).item()
    rows = torch.randn(linears, n, min(n, 512), device=DEVICE, generator=g)
    solved = (torch.linalg.matrix_norm(t @ found.solve_(rows.clone())[0] - rows[0]) / rows[0].norm()).item()
    factoring = seconds(lambda: factor_upper_(h.clone()), 2)
    solving = seconds(lambda: found.solve_(rows.clone()), 2)
    library = seconds(lambda: torch.linalg.cholesky_ex(h), 1)
    expect(
        f"factor {linears} x {n}", back < 1e-5 and solved < 1e-3 and bool(found.sound.all()), back=back, solved=solved,
        factor_s=factoring, solve_512_s=solving, library_factor_s=library,
    )  # fmt: skip


def check_sums() -> None:
    """What a linear receives, summed up from X and X0 W^T; with a token of a hundred times the others' size in it."""
    if REHEARSED:
        sys.path.insert(0, str(ROOT / "tests" / "bench"))
        import sixteen_bits

        products: Any = torch
        products.mm, products.addmm = sixteen_bits.mm, sixteen_bits.addmm
        summing: Any = moments
        summing._sums_in_float32 = lambda device, dtype: dtype == torch.bfloat16
    tokens, out, n = (2048, 32, 64) if REHEARSED else (32768, 2048, 8192)
    g = torch.Generator(DEVICE).manual_seed(0)
    weight = (torch.randn(out, n, device=DEVICE, generator=g) * 0.02).bfloat16()
    sizes = torch.rand(n, device=DEVICE, generator=g).add_(0.1)
    batches = []
    for _ in range(2):
        x = torch.randn(tokens, n, device=DEVICE, generator=g).mul_(sizes)
        x += 0.5 * x.roll(1, 1)
        x[::1024, 7] *= 1000
        x0 = (x + 0.05 * x.roll(3, 1)).bfloat16()
        batches.append((x.bfloat16(), x0, x0 @ weight.T))

    def summed(batches_of_a_lane: int, outputs: bool) -> Moments:
        sums = Moments(weight, n, paired=True, weights=[weight], outputs=outputs)
        for x, x0, y0 in batches:
            sums.begin_lane(batches_of_a_lane)
            sums.add(x, y0 if outputs else x0)
            end_lanes([sums], 1)
        sums.finish(2 * tokens, unmatched=False)
        return sums

    def exact(outputs: bool) -> tuple[Tensor, float]:
        total, power = torch.zeros(out, n, device=DEVICE, dtype=torch.float64), 0.0
        for x, x0, y0 in batches:
            for rows in torch.arange(tokens, device=DEVICE).split(4096):
                wanted = y0[rows].double() if outputs else x0[rows].double() @ weight.double().T
                off = wanted - x[rows].double() @ weight.double().T
                total += off.T @ x[rows].double()
                power += float(off.square().sum())
        return total, power

    for outputs in (False, True):
        first, second = summed(1, outputs), summed(2, outputs)
        same = all(torch.equal(one, second._sums[name]) for name, one in first._sums.items())
        expect(f"a lane of one batch summed up at once, outputs {outputs}", same)
        (moved,), ((found,),) = first.moved, drift_powers([[weight]], [first], together=True)
        wanted, power = exact(outputs)
        lost, ratio = float((moved - wanted).norm() / wanted.norm()), float(found.sum()) / power
        time_s = None if REHEARSED else round(seconds(partial(summed, 1, outputs)), 4)
        expect(
            f"W D^T X, outputs {outputs}", lost < 0.02 and abs(ratio - 1) < 0.02, lost=lost, power=ratio, time_s=time_s
        )  # fmt: skip


def time_solve(name: str, linears: int, out: int, n: int, grid: Grid, *, plain: bool = True) -> None:
    linears, out, n = (min(linears, 2), 32, min(small(n), 256)) if REHEARSED else (linears, out, n)
    weight, moment, drift = problem(linears, out, n, tokens=n if linears > 1 else None)
    s = Gptq()
    order = batch.column_order(moment.diagonal(dim1=-2, dim2=-1), grid.columns(n), s.order)
    fields: dict[str, Any] = {}
    for width in (64, 128):
        kernels.COLUMNS = batch.COLUMNS = width
        before = 0 if REHEARSED else memory()
        fields[f"batch_{width}_s"] = seconds(lambda: batch.gptq_batch(weight, grid, s, moment, drift))
        fields["extra_gb"] = 0.0 if REHEARSED else (torch.cuda.max_memory_allocated() - before) / 1e9
    fields["without_drift_s"] = seconds(lambda: batch.gptq_batch(weight, grid, s, moment), 1)
    fields["factor_s"] = seconds(lambda: batch.factor(moment, order, [LEAST_DAMP] * len(moment)), 1)
    got = batch.gptq_batch(weight, grid, s, moment, drift)
    if plain:
        some = min(linears, 2)
        begun = time.perf_counter()
        done = [gptq(weight[i], grid, s, moment[i], drift[i]).linear for i in range(some)]
        synchronize()
        fields["plain_s"] = (time.perf_counter() - begun) * linears / some
        fields["same"] = min((q.codes == got.linears[i].codes).float().mean().item() for i, q in enumerate(done))
        pairs = [
            (off(got.linears[i].dequantize(), weight[i], moment[i]), off(q.dequantize(), weight[i], moment[i]))
            for i, q in enumerate(done)
        ]
        worst = max(abs(ours / theirs - 1) for ours, theirs in pairs)
        expect(f"{name} error", worst < 0.005, worst=worst)
    say(time=name, shape=[linears, out, n], grid=str(grid), **fields)


def time_kernels(linears: int, out: int) -> None:
    """Single launches, as often as needed to be seen."""
    linears, out, times = (min(linears, 2), 32, 1) if REHEARSED else (linears, out, 20)
    w = torch.randn(linears, 128, out, device=DEVICE)
    inside = torch.randn(linears, 128, 128, device=DEVICE).tril_(-1) * 0.05
    variance, squares = torch.ones(linears, 128, device=DEVICE), torch.zeros(linears, out, device=DEVICE)
    scale = (torch.rand(linears, 1, out, device=DEVICE) + 0.1).expand_as(w)
    zero = torch.full((linears, 1, out), 8.0, device=DEVICE).expand_as(w)
    error, numbers = w.clone(), torch.full_like(w, torch.nan)
    importance = torch.rand(linears, 128, device=DEVICE)
    found = torch.empty(3, linears, out, device=DEVICE).unbind(0)

    def solve(width: int) -> None:
        part = slice(0, width)
        columns = [x[:, part] for x in (scale, zero, error, numbers)]
        square = inside[:, part, part].contiguous()
        for _ in range(times):
            kernels.solve_columns(w[:, part], square, variance[:, part], *columns, squares, W4)

    took = {f"solve_{width}_us": 1e6 / times * seconds(lambda width=width: solve(width)) for width in (32, 64, 128)}
    took["fit_us"] = (
        1e6
        / times
        * seconds(lambda: [kernels.fit_scales(w, W4, torch.bfloat16, importance, None, found) for _ in range(times)])
    )
    good = error.isfinite().all().item() and numbers.isfinite().all().item()
    expect(f"kernels {linears} x {out}", good, **took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the checks")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, on small shapes")
    quick = parser.parse_args().quick
    if REHEARSED:
        kernel_check._ROWS, kernel_check._LINEARS = 16, 1
    torch.manual_seed(0)
    say(card="none: rehearsed" if REHEARSED else torch.cuda.get_device_name(), torch=torch.__version__)
    begun = time.perf_counter()
    parts: list[tuple[str, Callable[[], None]]] = [
        ("scales", check_scales),
        ("parts", check_parts),
        ("solve", check_solve),
        ("sums", check_sums),
    ]
    if not quick:
        parts += [
            *(("kernels", partial(time_kernels, *shape)) for shape in ((1, 4096), (1, 28672), (128, 1536))),
            *(("factor", partial(check_factor, *shape)) for shape in ((4096, 1), (14336, 1), (2048, 32))),
            ("time", partial(time_solve, "attention", 1, 4096, 4096, W4)),
            ("time", partial(time_solve, "down", 1, 4096, 14336, W4)),
            ("time", partial(time_solve, "gate and up", 1, 28672, 4096, W4, plain=False)),
            ("time", partial(time_solve, "experts", 128, 768, 2048, W4)),
            ("time", partial(time_solve, "experts' down", 128, 2048, 768, W4, plain=False)),
            ("time", partial(time_solve, "nvfp4", 1, 4096, 4096, Grid(type="nvfp4"))),
        ]
    for name, part in parts:
        try:
            part()
        except Exception as error:
            expect(name, False, error=f"{type(error).__name__}: {error}"[:500])
        if not REHEARSED:
            torch.cuda.empty_cache()
    say(seconds=round(time.perf_counter() - begun, 1), failures=failures)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
