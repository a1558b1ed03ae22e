"""What the perplexity and KL pass costs beside the bare transformers forward over the same windows.

    python tests/bench/evaluation.py ORIGINAL ARTIFACT --text FILE --windows 8 --window 1024

In one process, alternately, on `--threads` threads: the original's own forward with its logits, one window at a time,
weights already in memory; and the whole pass over the artifact, its weights read and dequantized, both models' logits
made and compared, with the original's reference in the cache, as for every artifact after the first. Prints a table
with the least CPU-seconds and seconds of `--repeats` rounds, and their ratio.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantpress.artifact.artifact import open_artifact
from quantpress.core import machine
from quantpress.eval.measure.divergence import Windows, compare, divergence, last_hidden, windows
from quantpress.eval.measure.reference import reference
from quantpress.recipe import Evaluation

CPU = torch.device("cpu")


def the_pass(original: Path, artifact: Path, text: Windows, cache: Path) -> None:
    """Perplexity and divergence of the artifact, as an evaluation measures them."""
    _, plain = open_artifact(original, CPU)
    _, quantized = open_artifact(artifact, CPU, plain.dtype)
    hidden, noise = reference(plain, original, text, cache)
    divergence(
        compare((plain, quantized), (hidden, last_hidden(quantized, text.tokens.ids, lambda: None)), text), noise
    )


@torch.inference_mode()
def bare(model: torch.nn.Module, text: Windows) -> None:
    """The model's forward, logits included, over every window."""
    for row in text.tokens.ids:
        model(row[None], use_cache=False)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """CPU-seconds and seconds of `work`."""
    cpu, wall = time.process_time(), time.monotonic()
    work()
    return time.process_time() - cpu, time.monotonic() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--bos", action="store_true", help="BOS before every window")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    wanted = parser.parse_args()
    machine.flush_denormals()
    torch.set_num_threads(wanted.threads)
    settings = Evaluation(windows=wanted.windows, window=wanted.window, bos="always" if wanted.bos else "never")
    tokenizer = AutoTokenizer.from_pretrained(wanted.original)
    text = windows(tokenizer, wanted.text.read_text(encoding="utf-8"), wanted.text.name, settings)
    model = AutoModelForCausalLM.from_pretrained(wanted.original, dtype="auto").eval()
    with tempfile.TemporaryDirectory() as folder:
        first = timed(lambda: the_pass(wanted.original, wanted.artifact, text, Path(folder)))
        rounds = [
            (
                timed(lambda: bare(model, text)),
                timed(lambda: the_pass(wanted.original, wanted.artifact, text, Path(folder))),
            )
            for _ in range(wanted.repeats)
        ]
    plain = [min(round[0][i] for round in rounds) for i in (0, 1)]
    ours = [min(round[1][i] for round in rounds) for i in (0, 1)]
    rows = [
        ["bare forward", f"{wanted.windows} x {wanted.window}", *(f"{x:.2f}" for x in plain), ""],
        ["perplexity and KL", "reference kept", *(f"{x:.2f}" for x in ours), f"{ours[0] / plain[0]:.2f}"],
        ["perplexity and KL", "first time", *(f"{x:.2f}" for x in first), f"{first[0] / plain[0]:.2f}"],
    ]
    common.say(common.table(["pass", "", "CPU s", "s", "CPU ratio"], rows))
    common.say(common.machine(wanted.threads))


if __name__ == "__main__":
    main()
