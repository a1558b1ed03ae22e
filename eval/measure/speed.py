"""Load time, memory and speed of a model on this machine: dequantized, in transformers, in a process of its own.

A separate process, so that its peak memory is the model's alone. The weights are dequantized as they are read, so these
figures compare machines, not formats; a server's kernels for packed weights are timed by the smoke test.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantpress.artifact.artifact import open_artifact, open_original
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.recipe import Timing

from .sections import Runtime, Speed

_BASELINE_NOTE = "dequantized into transformers, eager"
_SECONDS = 3600


def time_model(folder: Path, timing: Timing, dtype: str | None = None, *, is_original: bool = False) -> Runtime:
    """Load time, peak memory and tokens a second of the model in `folder`, measured in a new process.

    Raises BadInput with that process's last line when it fails, for instance because the model does not fit in memory.
    """
    order = {
        "folder": str(folder),
        "timing": timing.model_dump(mode="json"),
        "dtype": dtype,
        "is_original": is_original,
    }
    command = [sys.executable, "-m", "quantpress.eval.measure.speed"]
    try:
        done = subprocess.run(
            command, input=json.dumps(order), capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise BadInput(f"{folder}: timing took more than {_SECONDS} s; ask for fewer tokens, or none") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BadInput(f"{folder}: could not be timed: {said[0][:300]}")
    return Runtime.model_validate_json(done.stdout.splitlines()[-1])


def measure(folder: Path, timing: Timing, dtype: str | None = None, *, is_original: bool = False) -> Runtime:
    """As `time_model`, in this process."""
    device = machine.device()
    started = time.monotonic()
    opened = open_original if is_original else open_artifact
    _, skeleton = opened(folder, device, None if dtype is None else getattr(torch, dtype))
    model = skeleton.whole()
    machine.synchronize(device)
    load_seconds = time.monotonic() - started
    vocabulary = int(skeleton.config.vocab_size)
    longest = int(getattr(skeleton.config, "max_position_embeddings", None) or 1 << 30)
    speed = [
        _speed(model, vocabulary, batch, min(context, longest - timing.new_tokens), timing, device)
        for batch in timing.batches
        for context in timing.contexts
    ]
    import transformers

    return Runtime(
        what=f"transformers {transformers.__version__}, torch {torch.__version__}, {_BASELINE_NOTE}",
        device=machine.describe(device)["device" if device.type == "cuda" else "cpu"],
        dtype=str(skeleton.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        load_seconds=load_seconds,
        peak_rss_bytes=machine.peak_rss_bytes(),
        peak_vram_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        speed=tuple(speed),
    )


def _speed(model: Any, vocabulary: int, batch: int, context: int, timing: Timing, device: torch.device) -> Speed:
    """One batch size and context; the first pass is a warm-up and not counted."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, context), generator=generator).to(device)
    prefill, decode = [], []
    for repeat in range(timing.repeats + 1):
        first, later = _pass(model, ids, timing.new_tokens, lambda: machine.synchronize(device))
        if repeat:
            prefill.append(batch * context / first)
            decode.append(batch * (timing.new_tokens - 1) / later)
    return Speed(
        batch=batch, context=context, repeats=timing.repeats,
        prefill_tokens_per_second=statistics.mean(prefill), prefill_stderr=_stderr(prefill),
        decode_tokens_per_second=statistics.mean(decode), decode_stderr=_stderr(decode),
    )  # fmt: skip


@torch.no_grad()
def _pass(model: Any, ids: torch.Tensor, new_tokens: int, wait: Callable[[], None]) -> tuple[float, float]:
    """Seconds to the first new token after ids [batch, context], and from there to the last."""
    wait()
    started = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    wait()
    between = time.perf_counter()
    for _ in range(new_tokens - 1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
    wait()
    return between - started, time.perf_counter() - between


def _stderr(values: list[float]) -> float:
    return float(statistics.stdev(values) / len(values) ** 0.5)


def _main() -> None:
    machine.flush_denormals()
    order = json.load(sys.stdin)
    try:
        timing = Timing.model_validate(order["timing"])
        found = measure(Path(order["folder"]), timing, order["dtype"], is_original=order["is_original"])
    except BadInput as error:
        sys.exit(" ".join(str(error).split()))
    sys.stdout.write(found.model_dump_json() + "\n")


if __name__ == "__main__":
    _main()
