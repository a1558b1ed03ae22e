"""How evenly processes share a run: the products that each does, counted, against those of a single process.

    python -m tests.bench.ranks [--ranks 2 4] [--hidden 256 --intermediate 1024] [--samples 64 --seq-len 256]

One JSON line for each number of processes. efficiency: the operations of one process over those of all, if each had
done as many as the busiest. Products, factors and attention are counted, not what goes element by element.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ..tiny import text
from ..together import Step, runs

_COUNT = """
import atexit, json, os, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
aten = torch.ops.aten
left = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1, aten.bmm: 0, aten.baddbmm: 1}
class Counting(TorchDispatchMode):
    total = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kind = func(*args, **(kwargs or {})), func.overloadpacket
        if kind in left:
            self.total += 2 * out.numel() * args[left[kind]].shape[-1]
        elif kind is aten.linalg_cholesky_ex:
            self.total += args[0].shape[-1] ** 3 // 3
        elif kind is aten.linalg_solve_triangular:
            self.total += args[0].shape[-1] ** 3
        elif "attention" in str(kind) and kind in flop_registry:
            self.total += flop_registry[kind](*args, **(kwargs or {}), out_val=out)
        return out
counting = Counting()
counting.__enter__()
atexit.register(lambda: open(os.environ["COUNTED"] + os.environ["RANK"], "w").write(str(counting.total)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make = [sys.executable, str(Path(__file__).parent / "checkpoints.py"), str(place / "model"), "--blocks", "2"]
        make += ["--hidden", str(given.hidden), "--intermediate", str(given.intermediate)]
        subprocess.run(make, check=True)
        (place / "text.txt").write_text(text(given.samples * given.seq_len))
        calibration = {"source": str(place / "text.txt"), "samples": given.samples, "seq_len": given.seq_len}
        recipe = {"name": "bench", "calibration": calibration | {"bos": "never"}, "weights": {"group_size": 64}}
        (place / "recipe.yaml").write_text(json.dumps(recipe))
        steps = {}
        for size in (1, *given.ranks):
            code = f"import os; os.environ['COUNTED'] = {str(place / f'count-{size}-')!r}\n{_COUNT}"
            command = ["quantize", str(place / "recipe.yaml"), "--model", str(place / "model"), "--out"]
            steps[str(size)] = Step(
                size, [*command, str(place / f"out-{size}")], codes=dict.fromkeys(range(size), code)
            )
        ended = runs(place, steps)
        if failed := [one.stderr for each in ended.values() for one in each if one.returncode]:
            sys.exit(failed[0])
        (alone,) = _counted(place, 1)
        for size in given.ranks:
            each = _counted(place, size)
            line = {"ranks": size, "operations": each, "alone": alone, "efficiency": alone / (size * max(each))}
            sys.stdout.write(json.dumps(line | {"efficiency": round(line["efficiency"], 3)}) + "\n")


def _counted(place: Path, size: int) -> list[int]:
    return [int((place / f"count-{size}-{rank}").read_text()) for rank in range(size)]


if __name__ == "__main__":
    main()
