"""quantpress against llm-compressor and auto-round: one model, one text, one machine, one run.

    make bench-setup                    # both in .venv-bench: they pin another compressed-tensors than ours
    .venv/bin/python tests/bench/peers.py [--model FOLDER] [--calibration FILE.txt --evaluation FILE.txt] [--bos]

Every row is a process of its own whose CPU-seconds (user + system, all threads) and peak memory the kernel counted,
from starting Python to the finished folder. Both sides calibrate on the same token ids (the first 32 x 512 of the
text, or `--samples` of 512) and are scored by perplexity.py, which is neither's own code. CPU-seconds grow on a busy
machine too, if less than wall time. Without the peers quantpress is measured alone. `--results FILE` keeps the rows;
with it `--side quantpress` measures only that side and takes the others' rows from the file.
"""

import argparse
import importlib.util
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import common
from common import HERE, Usage

ROOT = HERE.parent.parent
OURS, ONE_SHOT, OBSERVED, TUNING = "quantpress", "llm-compressor", "llm-compressor-observer", "auto-round"
SCRIPTS = {ONE_SHOT: "llmcompressor_run.py", OBSERVED: "llmcompressor_run.py", TUNING: "autoround_run.py"}
SEQ_LEN = 512
WINDOW = 2048


@dataclass(frozen=True)
class Case:
    """One kind of artifact, asked of each side; without peers of quantpress alone, to show what a part brings."""

    ours: dict[str, object]  # recipe keys
    one_shot: str | None = None  # options of llmcompressor_run.py
    tuning: str | None = None  # options of autoround_run.py
    observer: str | None = None  # llm-compressor's best for such weights, beside its default, which takes the range

    def sides(self) -> dict[str, str]:
        """The peers that are asked, with the options of their scripts."""
        searched = None if self.observer is None else f"{self.one_shot} --observer {self.observer}"
        asked = {ONE_SHOT: self.one_shot, OBSERVED: searched, TUNING: self.tuning}
        return {side: options for side, options in asked.items() if options is not None}


def _weights(bits: int, symmetric: bool, search: str = "mse") -> dict[str, object]:
    grid = {"bits": bits, "group_size": 64, "symmetric": symmetric, "scale_search": search}
    return {f"weights.{key}": json.dumps(value) for key, value in grid.items()}


def _gptq(correction: float) -> dict[str, object]:
    return {"method": f"{{name: gptq, error_correction: {correction}}}"}


RTN: dict[str, object] = {"method": "{name: rtn}"}
LIGHT: dict[str, object] = {"method": "{name: autoround, light: true}"}
TUNED: dict[str, object] = {"method": "{name: autoround}"}
AWQ: dict[str, object] = {"transforms": "[{name: awq}]"}
SMOOTH: dict[str, object] = {"transforms": "[{name: smoothquant, alpha: 0.8}]"}
INT8: dict[str, object] = {
    "weights": "{bits: 8, group_size: -1, symmetric: true}",
    "activations": "{type: int8}",
}
FP8: dict[str, object] = {"weights": "{type: fp8}", "activations": "{type: fp8}"}
NVFP4: dict[str, object] = {"weights": "{type: nvfp4}"}
MXFP4: dict[str, object] = {"weights": "{type: mxfp4}"}
CASES = {
    # rounding to nearest is there to show the same grid, so both take the range
    "rtn-asym": Case(RTN | _weights(4, False, "minmax"), "--method rtn --bits 4"),
    "rtn-sym": Case(RTN | _weights(4, True, "minmax"), "--method rtn --bits 4 --symmetric"),
    "gptq-asym-uncorrected": Case(_gptq(0) | _weights(4, False)),
    "gptq-asym": Case(_gptq(0.5) | _weights(4, False), "--method gptq --bits 4", observer="mse"),
    "gptq-sym": Case(_gptq(0.5) | _weights(4, True), "--method gptq --bits 4 --symmetric", observer="mse"),
    "awq-asym": Case(AWQ | RTN | _weights(4, False, "activation"), "--method awq --bits 4"),
    "awq-gptq-asym": Case(AWQ | _gptq(0.5) | _weights(4, False)),
    "gptq-3bit": Case(_gptq(0.5) | _weights(3, False), "--method gptq --bits 3", observer="mse"),
    "gptq-2bit": Case(_gptq(0.5) | _weights(2, False), "--method gptq --bits 2", observer="mse"),
    # auto-round's default is 200 iterations of 8 sequences
    "autoround-light": Case(LIGHT | _weights(4, False), tuning="--bits 4 --iterations 20"),
    "autoround": Case(TUNED | _weights(4, False), tuning="--bits 4 --iterations 200"),
    "autoround-3bit": Case(TUNED | _weights(3, False), tuning="--bits 3 --iterations 200"),
    "w8a8-rtn": Case(RTN | INT8, "--method rtn --scheme W8A8"),
    "w8a8-smoothquant-gptq": Case(SMOOTH | _gptq(0.5) | INT8, "--method gptq --scheme W8A8 --smoothquant 0.8"),
    "fp8-dynamic": Case(RTN | FP8, "--method rtn --scheme FP8_DYNAMIC"),
    "nvfp4a16": Case(RTN | NVFP4, "--method rtn --scheme NVFP4A16", observer="nvfp4_expanded_mse"),
    "nvfp4a16-gptq": Case(_gptq(0.5) | NVFP4, "--method gptq --scheme NVFP4A16", observer="nvfp4_expanded_mse"),
    "mxfp4a16": Case(RTN | MXFP4, "--method rtn --scheme MXFP4A16", observer="mse"),
    "mxfp4a16-gptq": Case(_gptq(0.5) | MXFP4, "--method gptq --scheme MXFP4A16", observer="mse"),
}


@dataclass(frozen=True)
class Inputs:
    """What both sides are given."""

    model: str
    calibration: str
    evaluation: list[str]
    bos: bool
    samples: int  # calibration sequences
    windows: int  # of 2048 tokens of each evaluation text
    threads: int


@dataclass(frozen=True)
class Row:
    """One side's answer to one case."""

    case: str
    side: str
    perplexity: list[float]  # on each evaluation text
    kl: list[float]  # from the original, nats a token
    file_mb: float | None
    usage: Usage


def peer_command(side: str, options: str, given: Inputs, out: Path, python: str) -> list[str]:
    """A peer's run; its artifact is `out` itself."""
    command = [python, str(HERE / SCRIPTS[side]), given.model, str(out)]
    command += ["--text", given.calibration, "--samples", str(given.samples), "--seq-len", str(SEQ_LEN)]
    return command + shlex.split(options) + ["--bos"] * given.bos


def our_command(case: Case, given: Inputs, out: Path) -> list[str]:
    """quantpress's run; its artifact is `out`/quantized."""
    settings: dict[str, object] = {
        "calibration.source": given.calibration,
        "calibration.samples": given.samples,
        "calibration.seq_len": SEQ_LEN,
        "calibration.bos": "always" if given.bos else "never",
    }
    return common.quantpress(given.model, out, settings | case.ours)


def score(folder: str | Path, given: Inputs, against: str | None) -> dict[str, list[float]]:
    """Perplexity and KL of a folder on the first windows of each evaluation text."""
    command = [sys.executable, str(HERE / "perplexity.py"), str(folder), "--text", *given.evaluation]
    command += ["--windows", str(given.windows), "--window", str(WINDOW)] + ["--bos"] * given.bos
    return common.answer(command + ([] if against is None else ["--against", against]))


def run(name: str, side: str, python: str, given: Inputs, work: Path) -> Row:
    """Quantize, score, and remove the artifact."""
    out, case = work / side / name, CASES[name]
    shutil.rmtree(out, ignore_errors=True)
    ours = side == OURS
    command = our_command(case, given, out) if ours else peer_command(side, case.sides()[side], given, out, python)
    used = common.measured(command, given.threads, out.with_suffix(".log"))
    artifact = out / "quantized" if ours else out
    megabytes = None if side == TUNING else common.weight_bytes(artifact) / 1e6  # auto-round's are dequantized
    row = Row(name, side, **score(artifact, given, given.model), file_mb=megabytes, usage=used)
    shutil.rmtree(out)
    return row


def report(rows: Sequence[Row], original: tuple[list[float], float], alone: dict[str, Usage]) -> str:
    """The table, and under it how quantpress stands to each peer in each case."""
    header = ["case", "side", "perplexity", "KL", "file MB", "CPU s", "peak MB", "above Python MB", "wall s"]
    lines = [["original", "", _list(original[0], 3), "", f"{original[1]:.1f}", "", "", "", ""]]
    for row in rows:
        u, above = row.usage, row.usage.peak_mb - alone[row.side].peak_mb
        cost = [f"{u.cpu_s:.1f}", f"{u.peak_mb:.0f}", f"{above:.0f}", f"{u.wall_s:.1f}"]
        megabytes = "" if row.file_mb is None else f"{row.file_mb:.1f}"
        lines.append([row.case, row.side, _list(row.perplexity, 3), _list(row.kl, 4), megabytes, *cost])
    for side, u in alone.items():
        lines.append(
            [
                "Python, torch and transformers",
                side,
                "",
                "",
                "",
                f"{u.cpu_s:.1f}",
                f"{u.peak_mb:.0f}",
                "0",
                f"{u.wall_s:.1f}",
            ]
        )
    return "\n".join([common.table(header, lines), "", *verdicts(rows, alone)])


def _list(values: Sequence[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def verdicts(rows: Sequence[Row], alone: dict[str, Usage]) -> list[str]:
    """One line a case and peer that were both measured."""
    found = {(row.case, row.side): row for row in rows}
    lines = []
    for theirs in rows:
        ours = found.get((theirs.case, OURS))
        if ours and theirs.side != OURS:
            memory = (ours.usage.peak_mb - alone[OURS].peak_mb) / (theirs.usage.peak_mb - alone[theirs.side].peak_mb)
            lines.append(
                f"- {theirs.case}: perplexity {_list(_less(ours.perplexity, theirs.perplexity), 3)} and KL "
                f"{_list(_less(ours.kl, theirs.kl), 4)} to {theirs.side}; of its "
                f"CPU-seconds {ours.usage.cpu_s / theirs.usage.cpu_s:.2f}, of its memory above Python's {memory:.2f}"
            )
    return lines


def _less(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def peer_python(wanted: str | None) -> str | None:
    """A Python that has llm-compressor and auto-round, which it brings: the one named, .venv-bench, or this one."""
    if wanted is not None:
        return wanted
    beside = ROOT / ".venv-bench" / "bin" / "python"
    if beside.exists():
        return str(beside)
    return sys.executable if importlib.util.find_spec("llmcompressor") else None


class Results:
    """Rows and what they were measured with, kept in a JSON file when there is one."""

    def __init__(self, path: Path | None, given: Inputs) -> None:
        self.path, self.given = path, given
        self.rows: list[Row] = []
        self.alone: dict[str, Usage] = {}
        self.original: tuple[list[float], float] | None = None
        if path is not None and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["given"] == asdict(given):
                self.rows = [Row(**r | {"usage": Usage(**r["usage"])}) for r in kept["rows"]]
                self.alone = {side: Usage(**u) for side, u in kept["alone"].items()}
                self.original = tuple(kept["original"])

    def add(self, row: Row) -> None:
        """Take `row` in place of an older one."""
        self.rows = [r for r in self.rows if (r.case, r.side) != (row.case, row.side)] + [row]
        order = list(CASES)
        self.rows.sort(key=lambda r: (order.index(r.case), r.side == OURS))
        if self.path is not None:
            rows, alone = [asdict(r) for r in self.rows], {s: asdict(u) for s, u in self.alone.items()}
            kept = {"given": asdict(self.given), "original": self.original, "alone": alone, "rows": rows}
            self.path.write_text(json.dumps(kept, indent=1), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an unquantized Hugging Face folder; default the embedded model")
    parser.add_argument("--calibration", help="a .txt file; default the embedded text")
    parser.add_argument("--evaluation", nargs="+", help=".txt files; default the embedded text")
    parser.add_argument("--bos", action="store_true", help="BOS before every sequence; some models are lost without")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of 512 tokens")
    parser.add_argument("--windows", type=int, default=8, help="of 2048 tokens of each evaluation text")
    parser.add_argument("--peer-python", help="a python that has the peers; default .venv-bench/bin/python")
    parser.add_argument("--side", choices=["all", OURS, *SCRIPTS], default="all")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the report to this file as well")
    parser.add_argument("--results", type=Path, help="keep the rows in this JSON file")
    parser.add_argument("--work", type=Path, help="folder for artifacts and logs; default a temporary one")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        asked = [sys.executable, str(HERE / "defaults.py"), str(work)]
        for name in ("model", "calibration", "evaluation"):
            value = getattr(args, name)
            asked += [] if value is None else [f"--{name}", *([value] if isinstance(value, str) else value)]
        sizes = {"samples": args.samples, "windows": args.windows, "threads": args.threads}
        compare(args, Inputs(**common.answer(asked), bos=args.bos, **sizes), work)


def compare(args: argparse.Namespace, given: Inputs, work: Path) -> None:
    """Measure what was asked for, printing each row as it is known, then the table."""
    peer = peer_python(args.peer_python)
    if peer is None and args.side != OURS:
        common.say("the peers are not installed (make bench-setup): quantpress alone")
    pythons = {ONE_SHOT: peer, OBSERVED: peer, TUNING: peer, OURS: sys.executable}
    sides = {side: python for side, python in pythons.items() if python and args.side in ("all", side)}
    results = Results(args.results, given)
    results.alone |= {side: common.interpreter(python, given.threads) for side, python in sides.items()}
    if results.original is None:
        results.original = (score(given.model, given, None)["perplexity"], common.weight_bytes(Path(given.model)) / 1e6)
    for name in args.only:
        for side, python in sides.items():
            if side not in (OURS, *CASES[name].sides()):
                continue
            try:
                row = run(name, side, python, given, work)
            except common.ChildFailed as error:  # a peer that cannot do it is a result too
                common.say(f"{name}, {side}: {str(error).splitlines()[-1]}", args.out)
                if side == OURS:
                    raise
                continue
            results.add(row)
            common.say(f"{row.case}, {side}: perplexity {_list(row.perplexity, 3)}, KL {_list(row.kl, 4)}, {row.usage}")
    text = report(results.rows, results.original, results.alone)
    packages = ["torch", "transformers", "compressed-tensors", "llmcompressor", "auto-round", "quantpress"]
    lines = [f"\n## {args.model or 'embedded default model'}{', BOS' if given.bos else ''}\n", text, ""]
    lines += [f"- {side}: {common.versions(python, packages)}" for side, python in pythons.items() if python]
    lines += [f"- calibration {given.samples} x {SEQ_LEN} tokens, perplexity over {given.windows} x {WINDOW} tokens"]
    lines += [
        f"- machine: {common.machine(given.threads)}",
        f"- `{shlex.join(['tests/bench/peers.py', *sys.argv[1:]])}`",
    ]
    common.say("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
