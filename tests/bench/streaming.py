"""Rounding without calibration, quantpress against llm-compressor's `model_free_ptq`: one checkpoint, one run.

    make bench-setup                    # llm-compressor in .venv-bench
    .venv/bin/python tests/bench/streaming.py [--blocks 5] [--case fp8] [--out REPORT.md]

The checkpoint is random, in blocks of Llama-3-8B's shape, and made here: 0.44 GB a block. Both sides round to the same
grid, by min-max; the last row of a type is quantpress with the search that its recipes have. Every row is a process of
its own whose CPU-seconds (user + system) and peak memory the kernel counted, start-up included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common

_PEER = (
    "import sys; from llmcompressor import model_free_ptq; "
    "model_free_ptq(sys.argv[1], sys.argv[2], scheme=sys.argv[3], ignore=['lm_head', 're:.*embed_tokens.*'], "
    "max_workers=1, device='cpu')"
)
_GRIDS = {
    "fp8": ({"type": "fp8"}, {"type": "fp8"}, "FP8_DYNAMIC"),
    "int4": ({"bits": 4, "group_size": 128, "symmetric": True}, None, "W4A16"),
    "nvfp4": ({"type": "nvfp4"}, None, "NVFP4A16"),
    "mxfp4": ({"type": "mxfp4"}, None, "MXFP4A16"),
    "mxfp8": ({"type": "mxfp8"}, None, "MXFP8A16"),
}
_SEARCHES = ("minmax", "mse")


def settings(case: str, search: str) -> dict[str, object]:
    """The recipe's keys."""
    weights, activations, _ = _GRIDS[case]
    found: dict[str, object] = {"method": "{name: rtn}", "weights": json.dumps(weights | {"scale_search": search})}
    return found if activations is None else found | {"activations": json.dumps(activations)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=_GRIDS, action="append", help="these types only")
    parser.add_argument("--search", choices=_SEARCHES, action="append", help="quantpress with these only")
    parser.add_argument("--peer", type=Path, default=common.HERE.parent.parent / ".venv-bench" / "bin" / "python")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = work / "model"
        made = ["--blocks", str(args.blocks), "--hidden", str(args.hidden), "--intermediate", str(args.intermediate)]
        subprocess.run([sys.executable, str(common.HERE / "checkpoints.py"), str(model), *made], check=True)
        rows = []
        for case in args.case or _GRIDS:
            sides: dict[str, list[str]] = {}
            if args.peer.exists():
                sides["llm-compressor"] = [
                    str(args.peer), "-c", _PEER, str(model), str(work / f"{case}-peer"), _GRIDS[case][2],
                ]  # fmt: skip
            for search in args.search or _SEARCHES:
                sides[f"quantpress, {search}"] = common.quantpress(
                    str(model), work / f"{case}-{search}" / "run", settings(case, search)
                )
            for side, command in sides.items():
                used = common.measured(command, args.threads, work / f"{case}-{side}.log")
                rows.append([case, side, f"{used.cpu_s:.1f}", f"{used.peak_mb / 1000:.2f}"])
        gigabytes = common.weight_bytes(model) / 1e9
        heading = f"{gigabytes:.2f} GB of bfloat16; {common.machine(args.threads)}"
        common.say(heading + "\n\n" + common.table(["type", "side", "CPU s", "peak GB"], rows), args.out)


if __name__ == "__main__":
    main()
