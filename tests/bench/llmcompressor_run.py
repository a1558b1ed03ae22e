"""One llm-compressor run, as its user would write it: model folder in, compressed-tensors folder out.

Run by peers.py with the Python that has llm-compressor; of quantpress it has how 16-bit floats are multiplied, no more:

    python llmcompressor_run.py MODEL OUT --text FILE --samples 32 --seq-len 512 --method gptq --bits 4 --group-size 64
    python llmcompressor_run.py MODEL OUT --text FILE … --method gptq --scheme W8A8 --smoothquant 0.8
"""

import argparse
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier, SmoothQuantModifier
from peer_run import fast_16_bit_products, peer_options, sequences
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = peer_options(__doc__.split("\n")[0])
    parser.add_argument("--method", choices=["rtn", "gptq", "awq"], required=True)
    parser.add_argument("--scheme", help="a preset scheme instead of integer weights, such as FP8_DYNAMIC")
    parser.add_argument("--observer", help="what finds the weights' ranges in the place of min-max, such as mse")
    parser.add_argument("--smoothquant", type=float, help="its strength; SmoothQuant goes before the method")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    what = {"ignore": ["lm_head"], **scheme(args)}
    # The modifiers' defaults: GPTQ has static act-order and damp 0.01.
    recipe = [GPTQModifier(**what) if args.method == "gptq" else QuantizationModifier(**what)]
    if args.method == "awq":
        recipe.insert(0, AWQModifier())
        if not torch.cuda.is_available():  # it pins memory whatever the device, which fails without a GPU
            torch.Tensor.pin_memory = lambda tensor, *_: tensor
    if args.smoothquant is not None:
        recipe.insert(0, SmoothQuantModifier(smoothing_strength=args.smoothquant))
    if len(recipe) == 1 and args.method == "rtn":
        oneshot(model=model, recipe=recipe)
    else:
        windows = sequences(tokenizer, args)
        dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * args.seq_len for _ in windows]})
        oneshot(
            model=model,
            dataset=dataset,
            recipe=recipe,
            max_seq_length=args.seq_len,
            num_calibration_samples=args.samples,
            shuffle_calibration_samples=False,
        )
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)


def scheme(args: argparse.Namespace) -> dict[str, Any]:
    """What a modifier is told to round to."""
    if args.scheme and not args.observer:
        return {"targets": "Linear", "scheme": args.scheme}
    if args.scheme:
        whole = preset_name_to_scheme(args.scheme, ["Linear"])
    else:
        weights = QuantizationArgs(
            num_bits=args.bits, type="int", strategy="group", group_size=args.group_size, symmetric=args.symmetric
        )
        whole = QuantizationScheme(targets=["Linear"], weights=weights)
    if args.observer:
        whole = whole.model_copy(update={"weights": whole.weights.model_copy(update={"observer": args.observer})})
    return {"config_groups": {"group_0": whole}}


if __name__ == "__main__":
    with fast_16_bit_products():
        main()
