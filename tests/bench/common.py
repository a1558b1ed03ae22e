"""What the benchmarks share: one child process under accounting, a perplexity that is nobody's own, tables.

Imported by peers.py and memory.py, which run as scripts from this folder. Nothing here imports torch: a child's peak
starts at what its parent held when it was forked, so the parent has to stay small.
"""

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BASELINE = "import torch, transformers; from transformers import AutoModelForCausalLM"


@dataclass(frozen=True)
class Usage:
    """What one child process cost."""

    cpu_s: float  # user + system, with every thread and every child it waited for
    peak_mb: float  # largest resident set of one process, 10^6 bytes
    wall_s: float


class ChildFailed(RuntimeError):
    """A measured command ended with another status than 0."""


def measured(command: Sequence[str], threads: int, log: Path) -> Usage:
    """Run `command` to its end with its output in `log` and return what it used.

    Raises ChildFailed with the last lines of the output.
    """
    # Of a checkout bytecode is kept, too, as an installer makes it of packages: its compilation is no part of a run.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # waiting threads would spin, and a busy machine turn that into CPU-seconds
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("wb") as out:
        child = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - start
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ChildFailed(f"{' '.join(command)}\nended with {child.returncode}; the end of {log}:\n{tail}")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts kibibytes
    return Usage(used.ru_utime + used.ru_stime, peak / 1e6, wall)


def answer(command: Sequence[str]) -> dict[str, Any]:
    """The JSON on the last line that `command` prints; not measured. Raises ChildFailed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ChildFailed(f"{shlex.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def quantpress(model: str, out: Path, settings: dict[str, object]) -> list[str]:
    """The command that quantizes `model` into `out`/quantized by a bare recipe with `settings`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = out.parent / "bench.yaml"
    recipe.write_text("name: bench\nevaluation: null\n", encoding="utf-8")
    command = [sys.executable, "-m", "quantpress", "quantize", str(recipe)]
    command += ["--model", model, "--out", str(out)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return command


def interpreter(python: str, threads: int) -> Usage:
    """What `python` costs before it does anything: torch and transformers imported."""
    with tempfile.TemporaryDirectory() as folder:
        return measured([python, "-c", BASELINE], threads, Path(folder) / "log")


def weight_bytes(folder: Path) -> int:
    """Bytes of all safetensors files in `folder`."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def versions(python: str, packages: Sequence[str]) -> str:
    """`name version` of each package that `python` has."""
    code = (
        "import json, platform, sys, importlib.metadata as m\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "have['Python'] = platform.python_version()\n"
        "print(json.dumps({p: have[p] for p in ['Python', *sys.argv[1:]] if p in have}))"
    )
    named = answer([python, "-I", "-c", code, *packages])
    return ", ".join(f"{name} {version}" for name, version in named.items())


def machine(threads: int) -> str:
    """The processor, its count, memory and load, in words."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = os.getloadavg()[0]
    return f"{model}, {os.cpu_count()} CPUs, {memory:.0f} GB; {threads} threads; load {load:.1f} at the end"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; every column but the first two is set right."""
    rule = ["---" if i < 2 else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def say(text: str, to: Path | None = None) -> None:
    """Print `text`, and append it to the file `to`."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    if to is not None:
        with to.open("a", encoding="utf-8") as out:
            out.write(text + "\n")
