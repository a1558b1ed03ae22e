"""What budgets.py and pareto.py share: whole runs in this process, read back from disk, on the same tokens."""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fetch

from quantpress.core import machine
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import default_cache, resolve
from quantpress.eval.measure.evaluate import evaluate
from quantpress.eval.measure.evaluate import prepare as prepare_evaluation
from quantpress.recipe import Evaluation, Gates
from quantpress.recipe.loading import parse

SEQ_LEN = 512


@dataclass(frozen=True)
class Figures:
    """Of one run. bytes: of its weights on disk; perplexity, kl (nats a token): on each text; cpu_s: of this process,
    from the start of the run to the finished folder."""

    bytes: int
    perplexity: list[float]
    kl: list[float]
    cpu_s: float


class Runs:
    """Runs on one model, calibrated and measured on the same tokens. What was measured with the same is kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        machine.flush_denormals()
        self.source = resolve(args.model, cache=default_cache())
        bos, cache = "always" if args.bos else "never", default_cache() / "bench"
        texts = [str(fetch.text(text, cache)) for text in args.evaluation]
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        wanted = {"windows": args.windows, "window": SEQ_LEN, "bos": bos, "prompts": ()}
        self.texts = [
            prepare_evaluation(self.source.path, Evaluation(source=text, **wanted), default_cache()) for text in texts
        ]
        calibration = {"source": str(fetch.text(args.calibration, cache)), "samples": args.samples}
        calibration |= {"seq_len": SEQ_LEN, "bos": bos, "seed": args.seed}
        self.base: dict[str, Any] = {"model": args.model, "method": args.method, "calibration": calibration}
        self.file, self.given = args.keep, [bos, args.windows, *(Path(text).name for text in args.evaluation)]
        self.kept: dict[str, Any] = {}
        if self.file and self.file.exists():
            self.kept = json.loads(self.file.read_text(encoding="utf-8"))
        rows = {"weights": {"bits": 8, "group_size": -1}}  # which every model takes
        self.blocks = prepare(parse(self.base | rows), self.source).skeleton.n_blocks

    def figures(self, document: dict[str, Any]) -> Figures:
        """Of the recipe with these keys."""
        key = json.dumps([self.given, self.base | document], sort_keys=True)
        if key not in self.kept:
            self.kept[key] = asdict(self._measured(document))
            if self.file:
                self.file.write_text(json.dumps(self.kept, indent=1) + "\n", encoding="utf-8")
        return Figures(**self.kept[key])

    def _measured(self, document: dict[str, Any]) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            quantize(prepare(parse(self.base | document), self.source), Settings(Path(folder) / "run", default_cache()))
            spent = time.process_time() - started
            artifact = Path(folder) / "run" / "quantized"
            stored = sum(f.stat().st_size for f in artifact.iterdir() if f.suffix in (".safetensors", ".gguf"))
            found = [evaluate(self.source.path, artifact, text, Gates()) for text in self.texts]
        pairs = [(r.artifact.perplexity, r.divergence.kl_mean) for r in found if r.artifact and r.divergence]
        return Figures(stored, [p for p, _ in pairs], [kl for _, kl in pairs], spent)


def options(description: str) -> argparse.ArgumentParser:
    """Model, texts and how much of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences of 512 tokens")
    parser.add_argument("--seed", type=int, default=0, help="another draws other samples; 0 takes the first")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens of each evaluation text")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bos", action="store_true", help="BOS before every sequence")
    parser.add_argument("--keep", type=Path, help="keep the rows in this JSON file, so that a stopped run goes on")
    return parser


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
