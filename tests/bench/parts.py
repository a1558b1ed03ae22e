"""What each part brings: rounding to nearest, GPTQ part by part, then what goes before and after it, at 4, 3, 2 bits.

    python parts.py --model FOLDER --calibration FILE.txt --evaluation FILE.txt [FILE.txt …] [--bos]

Every row is one whole run, calibrated on the same tokens and read back from disk; each evaluation text gives perplexity
and KL divergence from the original, so that text of another domain can stand beside the one calibrated on.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.core import machine
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import Source, default_cache, resolve
from quantpress.eval.measure.evaluate import Prepared, evaluate
from quantpress.eval.measure.evaluate import prepare as prepare_evaluation
from quantpress.recipe import Evaluation, Gates
from quantpress.recipe.loading import parse

SAMPLES, SEQ_LEN, WINDOWS, WINDOW = 32, 512, 8, 1024
PLAIN: dict[str, Any] = {"name": "gptq", "order": "natural", "weighted_scales": False, "error_correction": 0}
GROUPED = PLAIN | {"order": "group_aware"}
WEIGHTED = GROUPED | {"weighted_scales": True}
DEFAULT = WEIGHTED | {"error_correction": 0.5}


@dataclass(frozen=True)
class Part:
    """What differs from run to run."""

    method: dict[str, Any]
    search: str = "mse"
    transforms: tuple[dict[str, Any], ...] = ()


PARTS = {
    "RTN, min-max": Part({"name": "rtn"}, "minmax"),
    "RTN, squared error": Part({"name": "rtn"}),
    "GPTQ, natural order, min-max": Part(PLAIN, "minmax"),
    "+ group-aware order": Part(GROUPED, "minmax"),
    "+ scales by squared error": Part(GROUPED),
    "+ weighted by conditional variance": Part(WEIGHTED),
    "+ QEP 0.5 (the default)": Part(DEFAULT),
    "QEP 0.25 instead": Part(WEIGHTED | {"error_correction": 0.25}),
    "QEP 1.0 instead": Part(WEIGHTED | {"error_correction": 1.0}),
    "activation order instead": Part(DEFAULT | {"order": "activation"}),
    "AWQ before it": Part(DEFAULT, transforms=({"name": "awq"},)),
    "AWQ before it, no correction": Part(WEIGHTED, transforms=({"name": "awq"},)),
    "Hadamard before it": Part(DEFAULT, transforms=({"name": "hadamard"},)),
    "Hadamard before it, no correction": Part(WEIGHTED, transforms=({"name": "hadamard"},)),
    "autoround, light, after it": Part({"name": "autoround", "light": True}),
    "autoround after it": Part({"name": "autoround"}),
    "qat after it": Part({"name": "qat"}),
    "qat after it, then end to end": Part({"name": "qat", "end_to_end": {}}),
}


def row(
    source: Source, args: argparse.Namespace, bits: int, part: Part, texts: list[Prepared]
) -> list[tuple[float, float]]:
    """Perplexity and KL (nats a token) of one run on each text."""
    bos = "always" if args.bos else "never"
    calibration = {"source": str(args.calibration), "samples": SAMPLES, "seq_len": SEQ_LEN, "bos": bos}
    weights = {"bits": bits, "group_size": args.group_size, "symmetric": False, "scale_search": part.search}
    document = {"model": args.model, "calibration": calibration, "weights": weights, "method": part.method}
    recipe = parse(document | {"transforms": part.transforms})
    with tempfile.TemporaryDirectory() as folder:
        quantize(prepare(recipe, source), Settings(Path(folder) / "run", default_cache()))
        found = [evaluate(source.path, Path(folder) / "run" / "quantized", text, Gates()) for text in texts]
    return [(r.artifact.perplexity, r.divergence.kl_mean) for r in found if r.artifact and r.divergence]


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
    wanted = {"windows": WINDOWS, "window": WINDOW, "bos": "always" if args.bos else "never", "prompts": ()}
    texts = [
        prepare_evaluation(source.path, Evaluation(source=str(text), **wanted), default_cache())
        for text in args.evaluation
    ]
    names = " | ".join(f"{t.name}: perplexity | KL" for t in args.evaluation)
    sys.stdout.write(f"| bits | parts | {names} |\n|--:|---|{'--:|--:|' * len(texts)}\n")
    for bits in args.bits:
        for part in args.only or PARTS:
            figures = row(source, args, bits, PARTS[part], texts)
            cells = " | ".join(f"{perplexity:.2f} | {kl:.3f}" for perplexity, kl in figures)
            sys.stdout.write(f"| {bits} | {part} | {cells} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
