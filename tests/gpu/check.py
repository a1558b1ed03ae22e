"""What a GPU makes of every method and format, beside what the CPU makes of it; then time and memory of real blocks.

    make gpu-check ARGS='[--out FILE] [--parts correctness,blocks] [--only NAME] [--device cuda]'

One process, a few minutes, nothing downloaded: models are random, the text is made here. The last lines are a table;
FILE gets a JSON line for each row. Exit code 1 when a GPU's artifact is not as good as the CPU's, or a run fails.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from quantpress.artifact.artifact import open_artifact
from quantpress.artifact.original import OriginalCheckpoint
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.engine.job import Job
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import Source
from quantpress.recipe.loading import parse

from .checkpoints import write

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

# Data-free rounding has one answer: only ties may fall otherwise. Calibrated rounding sums in another order, after
# which codes differ without being worse, so there the output error of the layers is compared.
SAME_CODES = 1e-3  # share of weights that may differ
SAME_ERROR = 0.05  # relative difference of the mean error of the layers

MIXTURE = ("w4a16-gptq", "w4a16-awq", "fp8-dynamic", "nvfp4", "w8a8-smoothquant-gptq", "gguf-gptq-q4_k_m")

BLOCKS = {  # model shape -> recipe name and what is changed in it, samples x tokens
    "llama8b": [
        ("w4a16-gptq-g128", {}, 128),
        ("fp8-dynamic", {}, 0),
        ("nvfp4", {}, 0),
        ("nvfp4a16-gptq", {}, 128),
        ("w4a16-awq", {}, 16),
    ],
    "qwen3moe": [("w4a16-gptq-g128", {}, 128)],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="correctness,blocks")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide the sizes of the blocks, to rehearse on a CPU")
    parser.add_argument("--seq-len", type=int, default=2048)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        _say("no CUDA device here; --device cpu rehearses the script")
        return 2
    _say(json.dumps(machine.describe(device) | machine.numerics(device), default=str))
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as scratch:
        parts = {
            "correctness": correctness(Path(scratch), device, args.only),
            "blocks": blocks(Path(scratch), device, args),
        }
        for part in args.parts.split(","):
            for row in parts[part]:
                rows.append(row)
                failed |= not row["ok"]
                _say(_line(row))
                if args.out:
                    with open(args.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    bad = [row for row in rows if not row["ok"]]
    _say(f"\n{len(rows) - len(bad)} of {len(rows)} as they should be")
    for row in bad:
        _say(_line(row))
    return int(failed)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _line(row: dict[str, Any]) -> str:
    values = " ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k not in ("ok", "row")
    )
    return f"{'ok  ' if row['ok'] else 'FAIL'} {row['row']:44} {values}"


# ---- every method and format ------------------------------------------------------------------------------------


def correctness(scratch: Path, device: torch.device, only: str) -> Iterator[dict[str, Any]]:
    """Each recipe on a small dense model and on a small mixture of experts, on the CPU and on `device`."""
    (scratch / "text.txt").write_text(_text(8_000))
    paths = sorted([*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "tests/recipes").glob("*.yaml")])
    for shape in ("dense", "mixture"):
        write(scratch / shape, shape)
        for path in paths:
            row = f"{path.stem} {shape}"
            if only not in row or "-as-" in row or (shape == "mixture" and path.stem not in MIXTURE):
                continue
            recipe = _recipe(path, scratch, samples=8, seq_len=64)
            if recipe["method"].get("name") == "llama.cpp":
                continue  # another program's kernels
            yield _guarded(row, partial(_both, recipe, scratch, shape, device))


def _both(recipe: dict[str, Any], scratch: Path, shape: str, device: torch.device) -> dict[str, Any]:
    folders, errors, seconds = {}, {}, {}
    for where in (CPU, device):
        out = scratch / "run" / where.type / str(len(errors))
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        manifest = _run(recipe, scratch / shape, out, where)
        seconds[len(errors)] = time.perf_counter() - started
        of = [x.relative_error for x in manifest.layers if x.relative_error is not None]
        folders[len(errors)], errors[len(errors)] = out / "quantized", sum(of) / len(of)
    differ, of_error = _compared(folders[0], folders[1], scratch / shape)
    calibrated = parse(recipe).calibrated
    ok = errors[1] <= errors[0] * (1 + SAME_ERROR) if calibrated else differ <= SAME_CODES
    return {"ok": ok, "differ": differ, "apart": of_error, "cpu": errors[0], "gpu": errors[1], "s": seconds[1]}


def _compared(ours: Path, theirs: Path, original: Path) -> tuple[float, float]:
    """Share of the weights that differ, and the distance of the two in units of the rounding error."""
    one, skeleton = open_artifact(ours, CPU)
    other, _ = open_artifact(theirs, CPU)
    source = OriginalCheckpoint(original)
    differ = count = 0
    apart = error = 0.0
    for linear in skeleton.linears():
        name = f"{linear.name}.weight"
        a, b, w = (x.read(name).float() for x in (one, other, source))
        differ, count = differ + int((a != b).sum()), count + a.numel()
        apart, error = apart + float((a - b).square().sum()), error + float((a - w).square().sum())
    return differ / count, (apart / error) ** 0.5 if error else 0.0


# ---- blocks of real shape ---------------------------------------------------------------------------------------


def blocks(scratch: Path, device: torch.device, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of one block of real models, the second of two, and peak memory beside what the plan says."""
    (scratch / "long.txt").write_text(_text(300_000))
    for shape, runs in BLOCKS.items():
        made = False
        for name, changes, samples in runs:
            row = f"{name} {shape}"
            if args.only not in row:
                continue
            if not made:
                write(scratch / shape, shape, shrink=args.shrink, device=device)
                made = True
            path = next((ROOT / "recipes").rglob(f"{name}.yaml"))
            recipe = _recipe(path, scratch, samples=samples or 1, seq_len=args.seq_len, source="long.txt") | changes
            yield _guarded(row, partial(_timed, recipe, scratch / shape, scratch / "timed", device))


def _timed(recipe: dict[str, Any], model: Path, out: Path, device: torch.device) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    job = _job(recipe, model, device)
    manifest = quantize(job, _settings(out))
    total = time.perf_counter() - started
    of = [x.relative_error for x in manifest.layers if x.relative_error is not None]
    peak, planned = torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0, job.plan.device_bytes / 1e9
    return {
        "ok": peak <= planned,
        "block_s": [round(s, 3) for s in manifest.timing.per_block_seconds],
        "total_s": total,
        "peak_gb": peak,
        "planned_gb": planned,
        "error": sum(of) / len(of),
    }


# ---- both -------------------------------------------------------------------------------------------------------


def _text(characters: int) -> str:
    """Random letters: every token is another, so that the inputs of a layer span its columns."""
    generator = torch.Generator().manual_seed(1)
    return "".join(chr(33 + i) for i in torch.randint(90, (characters,), generator=generator).tolist())


def _recipe(path: Path, scratch: Path, *, samples: int, seq_len: int, source: str = "text.txt") -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    document = {k: v for k, v in document.items() if k not in ("model", "targets", "evaluation", "gates", "smoke")}
    calibration = {"samples": samples, "seq_len": seq_len, "source": str(scratch / source)}
    return document | {"name": path.stem, "calibration": calibration, "method": document.get("method", {})}


def _run(recipe: dict[str, Any], model: Path, out: Path, device: torch.device) -> Any:
    return quantize(_job(recipe, model, device), _settings(out))


def _job(recipe: dict[str, Any], model: Path, device: torch.device) -> Job:
    return prepare(parse(recipe), Source(model, "folder", model.name), device)


def _settings(out: Path) -> Settings:
    return Settings(out=out, cache=out.parent / "cache", ignore_limits=True)


def _guarded(row: str, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"row": row, **check()}
    except BadInput as error:
        return {"row": row, "ok": "mixture" in row and "2 formats" in str(error), "refused": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"row": row, "ok": False, "raised": f"{type(error).__name__}: {str(error)[:300]}"}


if __name__ == "__main__":
    sys.exit(main())
