"""quantpress against llm-compressor: one model, one text, one machine, one run.

    make bench-setup                                   # llm-compressor in an environment of its own, .venv-bench
    .venv/bin/python tests/bench/peers.py --model FOLDER --peer-python .venv-bench/bin/python
        [--calibration FILE.txt] [--evaluation FILE.txt] [--out REPORT.md] [--threads 2]

Every row is a process of its own whose CPU-seconds (user + system, all threads) and peak memory the kernel counted,
from starting Python to the finished folder. Both sides calibrate on the same token ids (the first 32 x 512 of the
text) and are scored by perplexity.py, which is neither's own code. llm-compressor pins another compressed-tensors than
quantpress uses, hence the second Python. `--side peer` measures it alone; `--results FILE` keeps every row as JSON.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import common

HERE = Path(__file__).resolve().parent
SAMPLES, SEQ_LEN = 32, 512
WINDOWS, WINDOW = 8, 2048
RECIPE = "name: bench\nmethod: {name: rtn}\nevaluation: null\n"


@dataclass(frozen=True)
class Case:
    """One method on one grid, asked of both."""

    method: str
    bits: int
    symmetric: bool
    group_size: int = 64

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        return f"{self.method}-{self.bits}bit-g{self.group_size}-{kind}"


CASES = [
    Case("rtn", 4, False),
    Case("rtn", 4, True),
    Case("gptq", 4, False),
    Case("gptq", 4, True),
    Case("gptq", 3, False),
]


@dataclass(frozen=True)
class Row:
    """One side's answer to one case."""

    case: str
    side: str
    perplexity: float
    file_mb: float
    usage: common.Usage


def peer_command(case: Case, args: argparse.Namespace, out: Path) -> tuple[list[str], Path]:
    """llm-compressor's command, and the folder its artifact is in."""
    command = [args.peer_python, str(HERE / "llmcompressor_run.py"), args.model, str(out)]
    command += ["--text", args.calibration, "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
    command += ["--method", case.method, "--bits", str(case.bits), "--group-size", str(case.group_size)]
    return command + ["--symmetric"] * case.symmetric + ["--bos"] * args.bos, out


def our_command(case: Case, args: argparse.Namespace, out: Path) -> tuple[list[str], Path]:
    """quantpress's command, and the folder its artifact is in."""
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = out.parent / "bench.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    settings = {
        "calibration.source": args.calibration,
        "calibration.samples": SAMPLES,
        "calibration.seq_len": SEQ_LEN,
        "calibration.bos": "always" if args.bos else "never",
        "weights.bits": case.bits,
        "weights.group_size": case.group_size,
        "weights.symmetric": str(case.symmetric).lower(),
        # rounding to nearest is compared for being the same grid, so both take the range; gptq brings its own search
        "weights.scale_search": "minmax" if case.method == "rtn" else "mse",
        "method": f"{{name: {case.method}}}",
    }
    command = [sys.executable, "-m", "quantpress.quantize.cli", "quantize", str(recipe)]
    command += ["--model", args.model, "--out", str(out)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return command, out / "quantized"


SIDES: dict[str, Callable[[Case, argparse.Namespace, Path], tuple[list[str], Path]]] = {
    "llm-compressor": peer_command,
    "quantpress": our_command,
}


def score(folder: str | Path, args: argparse.Namespace) -> float:
    """Perplexity of a folder on the first windows of the evaluation text."""
    command = [sys.executable, str(HERE / "perplexity.py"), str(folder), "--text", args.evaluation]
    command += ["--windows", str(WINDOWS), "--window", str(WINDOW)] + ["--bos"] * args.bos
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise common.ChildFailed(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["perplexity"])


def run(case: Case, side: str, args: argparse.Namespace, work: Path) -> Row:
    """Quantize, score, and remove the artifact unless `--keep`."""
    out = work / side / str(case)
    shutil.rmtree(out, ignore_errors=True)
    command, artifact = SIDES[side](case, args, out)
    used = common.measured(command, args.threads, work / side / f"{case}.log")
    row = Row(str(case), side, score(artifact, args), common.weight_bytes(artifact) / 1e6, used)
    if not args.keep:
        shutil.rmtree(out)
    return row


def report(rows: list[Row], original: tuple[float, float], baselines: dict[str, common.Usage]) -> str:
    """The table, and under it how quantpress stands to the peer in each case."""
    header = ["case", "side", "perplexity", "file MB", "CPU s", "peak MB", "above Python MB", "wall s"]
    lines = [["original", "", f"{original[0]:.3f}", f"{original[1]:.1f}", "", "", "", ""]]
    for case in dict.fromkeys(r.case for r in rows):
        for r in (r for r in rows if r.case == case):
            u, base = r.usage, baselines[r.side]
            figures = [u.cpu_s, u.peak_mb, u.peak_mb - base.peak_mb, u.wall_s]
            shown = [f"{f:.1f}" if i in (0, 3) else f"{f:.0f}" for i, f in enumerate(figures)]
            lines.append([case, r.side, f"{r.perplexity:.3f}", f"{r.file_mb:.1f}", *shown])
    for side, base in baselines.items():
        lines.append(["(Python alone)", side, "", "", f"{base.cpu_s:.1f}", f"{base.peak_mb:.0f}", "0", f"{base.wall_s:.1f}"])
    return common.table(header, lines) + "\n\n" + "\n".join(verdicts(rows, baselines))


def verdicts(rows: list[Row], baselines: dict[str, common.Usage]) -> list[str]:
    """One line a case that both sides ran."""
    found = {(r.case, r.side): r for r in rows}
    out = []
    for case in dict.fromkeys(r.case for r in rows):
        ours, theirs = found.get((case, "quantpress")), found.get((case, "llm-compressor"))
        if ours and theirs:
            above = [r.usage.peak_mb - baselines[r.side].peak_mb for r in (ours, theirs)]
            out.append(
                f"- {case}: perplexity {ours.perplexity - theirs.perplexity:+.3f}, "
                f"CPU {ours.usage.cpu_s / theirs.usage.cpu_s:.2f} x, memory above Python {above[0] / above[1]:.2f} x"
            )
    return out


def texts(args: argparse.Namespace, work: Path) -> None:
    """Where the embedded default text goes when no file is named."""
    if args.calibration and args.evaluation:
        return
    # in a child: this process must stay small, see common.py
    code = "import sys\nfrom quantpress.quantize import texts\nsys.stdout.write(getattr(texts, sys.argv[1])())"
    for role in ("calibration", "evaluation"):
        if getattr(args, role) is None:
            raise SystemExit(f"--{role} FILE is needed: {code[:0]}no embedded text yet")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an unquantized Hugging Face folder")
    parser.add_argument("--calibration", help="a .txt file; without it the embedded calibration text")
    parser.add_argument("--evaluation", help="a .txt file; without it the embedded evaluation text")
    parser.add_argument("--peer-python", default=sys.executable, help="the python that has llm-compressor")
    parser.add_argument("--bos", action="store_true", help="BOS before every sequence; some models are lost without")
    parser.add_argument("--side", choices=["both", "peer", "quantpress"], default="both")
    parser.add_argument("--only", action="append", choices=[str(c) for c in CASES], help="this case; may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the report to this file as well")
    parser.add_argument("--results", type=Path, help="keep the rows in this JSON file")
    parser.add_argument("--work", type=Path, help="folder for artifacts and logs; default a temporary one")
    parser.add_argument("--keep", action="store_true", help="keep the artifacts in --work")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        work = args.work or Path(temporary)
        texts(args, work)
        compare(args, work)


def compare(args: argparse.Namespace, work: Path) -> None:
    """Run what was asked for, printing as it goes, then the table."""
    pythons = {"llm-compressor": args.peer_python, "quantpress": sys.executable}
    sides = [s for s in SIDES if args.side == "both" or (args.side == "peer") == (s == "llm-compressor")]
    cases = [c for c in CASES if not args.only or str(c) in args.only]
    baselines = {side: common.interpreter(pythons[side], args.threads) for side in sides}
    original = (score(args.model, args), common.weight_bytes(Path(args.model)) / 1e6)
    rows: list[Row] = []
    for case in cases:
        for side in sides:
            row = run(case, side, args, work)
            rows.append(row)
            common.say(json.dumps(asdict(row)))
            if args.results:
                kept = [asdict(r) for r in rows]
                about = {"model": args.model, "original": original, "python": {s: asdict(b) for s, b in baselines.items()}}
                args.results.write_text(json.dumps(about | {"rows": kept}, indent=1))
    say = lambda text: common.say(text, args.out)  # noqa: E731
    say(f"\n## {Path(args.model).name}\n\n{report(rows, original, baselines)}\n")
    for side in sides:
        packages = ["torch", "transformers", "compressed-tensors", "llmcompressor", "quantpress"]
        say(f"- {side}: {common.versions(pythons[side], packages)}")
    say(f"- machine: {common.machine(args.threads)}")
    say(f"- command: `{shlex.join(['python', 'tests/bench/peers.py', *sys.argv[1:]])}`")


if __name__ == "__main__":
    main()
