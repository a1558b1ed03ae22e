"""Peak memory of quantizing does not grow with depth: checkpoints of 8, 16 and 32 equal blocks, made here.

    python tests/bench/memory.py [--out REPORT.md] [--hidden 1024 --intermediate 4096] [--samples 8 --seq-len 128]

Each run is a process of its own whose peak the kernel counted. Exit code 1 when the peak above that of Python with
torch and transformers grows by 5% or more from the first depth to the last.
"""

import argparse
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import common

ALLOWED_GROWTH = 0.05


def text(path: Path, characters: int) -> None:
    """Words drawn at random: the model is random too."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(500)]
    path.write_text(" ".join(rng.choices(words, k=characters // 3))[:characters], encoding="utf-8")


def quantize(model: Path, out: Path, method: str, work: Path, args: argparse.Namespace) -> common.Usage:
    """What quantizing `model` by the command line costs."""
    source = work / "text.txt"
    text(source, args.samples * args.seq_len * 2)
    settings = {
        "calibration.source": source,
        "calibration.samples": args.samples,
        "calibration.seq_len": args.seq_len,
        "calibration.bos": "never",
        "weights.group_size": 64,
        "weights.symmetric": "false",
        "method": f"{{name: {method}}}",
    }
    command = common.quantpress(str(model), out, settings)
    return common.measured(command, args.threads, work / f"{out.name}.log")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"], choices=["rtn", "gptq"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the report to this file as well")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (2 GB) and logs; default a temporary one")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.work) as temporary:
        return depths(args, Path(temporary))


def depths(args: argparse.Namespace, work: Path) -> int:
    """Measure every depth, print the table and the growth, and say by the status whether it stayed flat."""
    base = common.interpreter(sys.executable, args.threads)
    lines, above = [], {}
    for blocks in args.blocks:
        model = work / f"{blocks}-blocks"
        make = [sys.executable, str(common.HERE / "checkpoints.py"), str(model), "--blocks", str(blocks)]
        make += ["--hidden", str(args.hidden), "--intermediate", str(args.intermediate)]
        subprocess.run(make, check=True)
        weights = common.weight_bytes(model) / 1e6
        for method in args.methods:
            out = work / f"{blocks}-{method}"
            used = quantize(model, out, method, work, args)
            above[method, blocks] = used.peak_mb - base.peak_mb
            figures = [weights, used.peak_mb, above[method, blocks]]
            lines.append(
                [method, str(blocks), *(f"{f:.0f}" for f in figures), f"{used.cpu_s:.1f}", f"{used.wall_s:.1f}"]
            )
            common.say(" ".join(lines[-1]))
            shutil.rmtree(out)
        shutil.rmtree(model)
    header = ["method", "blocks", "weights MB", "peak MB", "above Python MB", "CPU s", "wall s"]
    common.say(f"\n## Peak memory and depth\n\n{common.table(header, sorted(lines, key=lambda r: r[0]))}\n", args.out)
    worst = 0.0
    first, last = args.blocks[0], args.blocks[-1]
    for method in args.methods:
        growth = above[method, last] / above[method, first] - 1
        worst = max(worst, growth)
        common.say(f"- {method}: {growth:+.1%} above Python's own from {first} to {last} blocks", args.out)
    common.say(f"- Python with torch and transformers alone: {base.peak_mb:.0f} MB", args.out)
    common.say(f"- {common.versions(sys.executable, ['torch', 'transformers', 'safetensors', 'quantpress'])}", args.out)
    common.say(f"- machine: {common.machine(args.threads)}", args.out)
    common.say(f"- command: `{shlex.join(['python', 'tests/bench/memory.py', *sys.argv[1:]])}`", args.out)
    return int(worst >= ALLOWED_GROWTH)


if __name__ == "__main__":
    raise SystemExit(main())
