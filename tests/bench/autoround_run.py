"""One run of Intel's auto-round, as its user would write it: model folder in, the rounded weights in bfloat16 out.

Run by peers.py with the Python that has auto-round; imports nothing of quantpress:

    python autoround_run.py MODEL OUT --text FILE --samples 32 --seq-len 512 --bits 4 --group-size 64 --iterations 200

Its files of packed asymmetric weights are not read back on a CPU, so it writes what its scripts call "fake": the same
values, dequantized.
"""

import argparse
from pathlib import Path

import torch
from auto_round import AutoRound
from llmcompressor_run import sequences
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--bos", action="store_true", help="BOS as the first token of every sequence")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--iterations", type=int, required=True, help="its default is 200")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    windows = [torch.tensor([window]) for window in sequences(tokenizer, args)]
    rounder = AutoRound(
        model, tokenizer, bits=args.bits, group_size=args.group_size, sym=args.symmetric, iters=args.iterations,
        dataset=windows, nsamples=args.samples, seqlen=args.seq_len, batch_size=8, device_map="cpu",
    )  # fmt: skip
    rounder.quantize_and_save(str(args.out), format="fake")
    (named,) = args.out.iterdir()  # it makes a folder of its own inside, named after model and scheme
    for file in named.iterdir():
        file.rename(args.out / file.name)
    named.rmdir()


if __name__ == "__main__":
    main()
