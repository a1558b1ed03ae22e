"""One run of Intel's auto-round, as its user would write it: model folder in, the rounded weights in bfloat16 out.

Run by peers.py with the Python that has auto-round; imports nothing of quantpress:

    python autoround_run.py MODEL OUT --text FILE --samples 32 --seq-len 512 --bits 4 --group-size 64 --iterations 200

Its files of packed asymmetric weights are not read back on a CPU, so it writes what its scripts call "fake": the same
values, dequantized.
"""

import torch
from auto_round import AutoRound
from peer_run import peer_options, sequences
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = peer_options(__doc__.split("\n")[0])
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
