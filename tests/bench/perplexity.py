"""Perplexity and KL divergence of a folder by transformers alone, for figures that are neither contestant's own.

    python tests/bench/perplexity.py FOLDER --against ORIGINAL --text FILE [FILE …] --windows 8 --window 2048

Windows follow one another from the start of each tokenised text; the first token of a window, BOS with `--bos`, is not
scored; logits in bfloat16 as the model makes them, the loss in float32. The divergence is the original's predictions
from the folder's, in nats a token. Prints one JSON line: a list of each, a figure a text.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from peer_run import fast_16_bit_products
from torch.nn.functional import kl_div, nll_loss
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def loaded(folder: str) -> Any:
    """The model. Weights with zero points, which transformers since 5.23 reads only so, are dequantized; none of the
    files measured here has such weights and rounded inputs."""
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None) or {}
    groups = quantization.get("config_groups", {}).values()
    if any(group["weights"]["symmetric"] is False and group["input_activations"] is None for group in groups):
        config.quantization_config = quantization | {"dequantize": True}
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16).eval()


def windows_of(folder: str, text: str, windows: int, window: int, bos: bool) -> torch.Tensor:
    """Token ids [windows, window] from the start of the text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    body = window - bos
    if len(ids) < windows * body:
        raise SystemExit(f"{len(ids)} tokens, fewer than {windows} x {body}")
    rows = ids[: windows * body].view(windows, body)
    return torch.cat([torch.full((windows, 1), tokenizer.bos_token_id), rows], dim=1) if bos else rows


@torch.inference_mode()
def scores(model: Any, original: Any, rows: torch.Tensor) -> tuple[float, float]:
    """exp of the mean loss over `rows` [windows, window], and the mean divergence from the original's predictions."""
    loss = divergence = 0.0
    for part in rows:
        log_probs = model(part[None]).logits[0, :-1].float().log_softmax(-1)  # [window - 1, vocab]
        loss += nll_loss(log_probs, part[1:], reduction="sum").item()
        if original is not None:
            wanted = original(part[None]).logits[0, :-1].float().log_softmax(-1)
            divergence += kl_div(log_probs, wanted, reduction="sum", log_target=True).item()
    scored = rows.shape[0] * (rows.shape[1] - 1)
    return math.exp(loss / scored), divergence / scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--against", help="the original; without it the divergence is 0")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--bos", action="store_true")
    args = parser.parse_args()
    model, original = (None if folder is None else loaded(folder) for folder in (args.folder, args.against))
    texts = [text.read_text(encoding="utf-8") for text in args.text]
    found = [
        scores(model, original, windows_of(args.folder, text, args.windows, args.window, args.bos)) for text in texts
    ]
    sys.stdout.write(json.dumps({"perplexity": [p for p, _ in found], "kl": [kl for _, kl in found]}) + "\n")


if __name__ == "__main__":
    with fast_16_bit_products():
        main()
