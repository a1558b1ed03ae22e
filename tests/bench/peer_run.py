"""What the runs of peers share: their options, the token ids they are given, and products of 16-bit floats. No
peer is imported here: it would be charged to another one.
"""

import argparse
import importlib.util
from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def peer_options(description: str) -> argparse.ArgumentParser:
    """MODEL OUT, the text and how it is cut, and an integer grid."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--bos", action="store_true", help="BOS as the first token of every sequence")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    return parser


def fast_16_bit_products() -> AbstractContextManager[None]:
    """quantpress's own, so that on a CPU without instructions for 16-bit floats neither side waits for torch's.

    By its path: the file needs torch alone, and where a peer lives there is no quantpress.
    """
    file = Path(__file__).resolve().parents[2] / "quantize" / "core" / "products.py"
    spec = importlib.util.spec_from_file_location("products", file)
    assert spec is not None
    assert spec.loader is not None
    products = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(products)
    context: AbstractContextManager[None] = products.fast_16_bit_products()
    return context


def sequences(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[list[int]]:
    """The first `samples` windows [seq_len] of the text; BOS, when asked for, is the first of the seq_len tokens."""
    ids = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    start = [tokenizer.bos_token_id] if args.bos else []
    body = args.seq_len - len(start)
    windows = [start + ids[i * body : (i + 1) * body] for i in range(args.samples)]
    if len(windows[-1]) < args.seq_len:
        raise SystemExit(f"{args.text}: {len(ids)} tokens, fewer than {args.samples} x {body}")
    return windows
