"""Compile all kernels for cards that are not here, GPTQ's for every kind of grid: `python compile_kernels.py 90 80`.

The arguments are those that the wrappers pass. Prints a JSON line a kernel: registers, bytes spilled to memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantpress.methods import column_kernels as kernels
from quantpress.methods import layout_kernels as layouts
from quantpress.models import fused_kernels as parts
from quantpress.numbers.types import Grid

_PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# From Triton 3.9 on, the PTX that it writes is too new for the assembler of cards before Blackwell.
PTXAS = next((p for p in (_PROGRAMS / "ptxas-blackwell", _PROGRAMS / "ptxas") if p.exists()), _PROGRAMS / "ptxas")
CASES = [  # a grid, and what its scales are stored in
    (Grid(bits=4, group_size=128, symmetric=False), torch.bfloat16),
    (Grid(bits=3, group_size=64, symmetric=False), torch.float16),
    (Grid(bits=8, group_size=-1, scale_search="minmax"), torch.bfloat16),
    (Grid(type="fp8"), torch.float32),
    (Grid(type="mxfp8"), torch.float8_e8m0fnu),
    (Grid(type="mxfp4"), torch.float8_e8m0fnu),
    (Grid(type="nvfp4"), torch.float8_e4m3fn),
]


class _Recorder:
    """In the place of a kernel: notes what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def sources() -> list[tuple[str, ASTSource, int]]:
    """Every variant, as it is launched, and its warps."""
    recorders = []
    for module, name in (
        (kernels, "_solve_columns"), (kernels, "_fit_scales"), (parts, "_rms_norm"), (parts, "_silu_times"),
        (parts, "_rotate"), (layouts, "_split_in_halves"),
        (layouts, "_columns_first"), (layouts, "_rows_first"),
    ):  # fmt: skip
        recorders.append(_Recorder(getattr(module, name)))
        setattr(module, name, recorders[-1])
    found = {}
    for width in (128, 4096, 5120, 16384):
        x = torch.ones(3, width, dtype=torch.bfloat16)
        parts.rms_norm(x, x[0], 1e-5)
        parts.silu_times(x, x)
    for heads, size in ((32, 128), (8, 64), (2, 96), (16, 256)):
        turn = torch.ones(1, 5, size, dtype=torch.bfloat16)
        parts.rotate(turn[:, None].expand(3, heads, 5, size), turn, turn)
    layouts.split_in_halves(torch.ones(2, 3, 1024))
    back = torch.arange(1024).expand(2, 1024).contiguous()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layouts.columns_first(torch.ones(2, 96, 1024, dtype=dtype), back, torch.float32)
    for grid, dtype in CASES:
        columns = min(grid.columns(512), kernels.COLUMNS)
        for importance in (torch.ones(2, columns), None) if grid.scale_search != "minmax" else (None,):
            w, out = torch.ones(2, columns, 96), torch.ones(3, 2, 96).unbind(0)
            kernels.fit_scales(w, grid, dtype, importance, torch.ones(2) if grid.type == "nvfp4" else None, out)
            squares = torch.ones(2, columns, columns)
            pair = torch.ones(2, 1, 2, 96).unbind(0)
            for kind in (torch.bfloat16, torch.float16):
                weight = w.mT.contiguous().to(kind)
                layouts.rows_first(
                    w, back[:, :columns].contiguous(), back[:, :columns] * 0, pair, weight, squares[0], grid
                )
            kernels.solve_columns(w, squares, squares[0], w, w, w, w, out[0], grid)
            kernels.solve_columns(w, squares, squares[0], w, w, w, w, out[0], grid, w, 0.5)
    for recorder in recorders:
        for args, kwargs in recorder.launches:
            warps = kwargs.pop("num_warps")
            signature = dict(zip(recorder.kernel.arg_names, map(_type, args), strict=False))
            source = ASTSource(recorder.kernel, signature | dict.fromkeys(kwargs, "constexpr"), kwargs)
            what = json.dumps([recorder.kernel.__name__, kwargs | {"of": sorted({*signature.values()})}])
            found[what] = what, source, warps
    return list(found.values())


_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip


def _type(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return _POINTERS[x.dtype]
    return "fp32" if isinstance(x, float) else "i32"


def main() -> None:
    variants = sources()
    for capability in map(int, sys.argv[1:]):
        for what, source, warps in variants:
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "k.ptx").write_text(compiled.asm["ptx"])
                arch = "sm_90a" if capability == 90 else f"sm_{capability}"
                command = [str(PTXAS), "-v", f"-arch={arch}", "k.ptx", "-o", "k.cubin"]
                told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
            registers, spilled = re.search(r"Used (\d+) registers", told), re.findall(r"(\d+) bytes spill", told)
            assert registers is not None
            line = {"card": arch, "registers": int(registers[1]), "spilled": sum(map(int, spilled)), "what": what}
            sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
