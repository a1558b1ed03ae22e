"""What each part of GPTQ brings: rounding to nearest, then one part after the other, at 4, 3 and 2 bits.

    python parts.py --model FOLDER --calibration FILE.txt --evaluation FILE.txt [FILE.txt …] [--bos]

Every row is one whole run, calibrated on the same tokens and read back from disk; each evaluation text gives perplexity
and KL divergence from the original, so that text of another domain can stand beside the one calibrated on.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantpress.eval.measure import evaluate, evaluation_text
from quantpress.quantize import machine
from quantpress.quantize.pipeline import Settings, prepare, quantize
from quantpress.quantize.recipe import Evaluation, Gates
from quantpress.quantize.recipe.file import parse
from quantpress.quantize.sources import Source, default_cache, resolve

SAMPLES, SEQ_LEN, WINDOWS, WINDOW = 32, 512, 8, 1024
PLAIN: dict[str, Any] = {"name": "gptq", "order": "natural", "weighted_scales": False, "error_correction": 0}
GROUPED = PLAIN | {"order": "group_aware"}
WEIGHTED = GROUPED | {"weighted_scales": True}
PARTS: dict[str, tuple[str, dict[str, Any]]] = {  # scale search, method
    "RTN, min-max": ("minmax", {"name": "rtn"}),
    "RTN, squared error": ("mse", {"name": "rtn"}),
    "GPTQ, natural order, min-max": ("minmax", PLAIN),
    "+ group-aware order": ("minmax", GROUPED),
    "+ scales by squared error": ("mse", GROUPED),
    "+ weighted by conditional variance": ("mse", WEIGHTED),
    "+ QEP 0.5 (the default)": ("mse", WEIGHTED | {"error_correction": 0.5}),
    "QEP 0.25 instead": ("mse", WEIGHTED | {"error_correction": 0.25}),
    "QEP 1.0 instead": ("mse", WEIGHTED | {"error_correction": 1.0}),
    "GPTAQ 0.25 instead": ("mse", WEIGHTED | {"error_correction": 0.25, "correction": "gptaq"}),
    "activation order instead": ("mse", WEIGHTED | {"order": "activation", "error_correction": 0.5}),
}


def row(
    source: Source, args: argparse.Namespace, bits: int, search: str, method: dict[str, Any], texts: list[Any]
) -> list[tuple[float, float]]:
    """Perplexity and KL (nats a token) of one run on each text."""
    bos = "always" if args.bos else "never"
    calibration = {"source": str(args.calibration), "samples": SAMPLES, "seq_len": SEQ_LEN, "bos": bos}
    weights = {"bits": bits, "group_size": args.group_size, "symmetric": False, "scale_search": search}
    recipe = parse({"model": args.model, "calibration": calibration, "weights": weights, "method": method})
    with tempfile.TemporaryDirectory() as folder:
        quantize(prepare(recipe, source), Settings(Path(folder) / "run", default_cache()))
        found = [evaluate(source.path, Path(folder) / "run" / "quantized", text, Gates()) for text in texts]
    return [(r["artifact"]["perplexity"], r["divergence"]["kl_mean"]) for r in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--bos", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    machine.flush_denormals()
    source = resolve(args.model, cache=default_cache())
    bos = "always" if args.bos else "never"
    wanted = [Evaluation(source=str(t), windows=WINDOWS, window=WINDOW, bos=bos) for t in args.evaluation]  # type: ignore[arg-type]
    texts = [evaluation_text(source.path, one, default_cache()) for one in wanted]
    names = " | ".join(f"{t.name}: perplexity | KL" for t in args.evaluation)
    sys.stdout.write(f"| bits | parts | {names} |\n|--:|---|{'--:|--:|' * len(texts)}\n")
    for bits in args.bits:
        for part in args.only or PARTS:
            figures = row(source, args, bits, *PARTS[part], texts)
            cells = " | ".join(f"{perplexity:.2f} | {kl:.3f}" for perplexity, kl in figures)
            sys.stdout.write(f"| {bits} | {part} | {cells} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
