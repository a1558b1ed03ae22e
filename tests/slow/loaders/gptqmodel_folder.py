"""GPTQModel, by itself or under transformers with optimum, on a GPTQ or AWQ folder: `python gptqmodel_folder.py HOW
FOLDER IDS OUT`. Writes the logits of the ids (safetensors) on the CPU, and prints which kernels it chose."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it compiles otherwise


def main() -> None:
    how, folder, ids, out = sys.argv[1:]
    awq = json.loads(Path(folder, "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    if how == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16).model
    else:
        from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

        # By itself it chooses a kernel that it first compiles for minutes.
        chosen = AwqConfig(bits=4, backend="torch_awq") if awq else GPTQConfig(bits=4, backend="gptq_torch")
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", dtype=torch.float16, quantization_config=chosen
        )
    model.eval()
    with torch.inference_mode():
        logits = model(torch.tensor(json.loads(ids))).logits
    save_file({"logits": logits.float().contiguous()}, out)
    kinds = sorted({type(one).__name__ for one in model.modules() if "Linear" in type(one).__name__})
    sys.stdout.write(f"SAID{json.dumps(kinds)}\n")


main()
