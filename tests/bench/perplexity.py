"""Perplexity of a folder by transformers alone, for a figure that is neither contestant's own.

    python tests/bench/perplexity.py FOLDER --text FILE --windows 8 --window 2048

Windows follow one another from the start of the tokenised text; the first token of a window, BOS with `--bos`, is not
scored; logits in bfloat16 as the model makes them, the loss in float32. Prints one JSON line.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def perplexity(folder: str, text: str, windows: int, window: int, bos: bool) -> float:
    """exp of the mean loss over `windows` windows of `window` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    body = window - bos
    if len(ids) < windows * body:
        raise SystemExit(f"{len(ids)} tokens, fewer than {windows} x {body}")
    rows = ids[: windows * body].view(windows, body)
    if bos:
        rows = torch.cat([torch.full((windows, 1), tokenizer.bos_token_id), rows], dim=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    total = 0.0
    for part in rows:
        logits = model(part[None]).logits[0, :-1].float()  # [window - 1, vocab]
        total += cross_entropy(logits, part[1:], reduction="sum").item()
    return float(torch.tensor(total / (windows * (window - 1)), dtype=torch.float64).exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--bos", action="store_true")
    args = parser.parse_args()
    value = perplexity(args.folder, args.text.read_text(encoding="utf-8"), args.windows, args.window, args.bos)
    sys.stdout.write(json.dumps({"perplexity": value}) + "\n")


if __name__ == "__main__":
    main()
