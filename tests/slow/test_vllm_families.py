"""The real vLLM loads a mixture of experts, a hybrid, a multimodal model and GPT-2, and computes what their files say.

    make setup-vllm && .venv/bin/pytest tests/slow/test_vllm_families.py

Tiny random models. vLLM on a CPU has no kernel for 4-bit experts, nor for linears with fewer than 32 rows: these stay
in 16 bit here. The multimodal model needs torchvision beside vLLM.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from quantpress.artifact.artifact import open_artifact
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import Source
from quantpress.models.skeleton import run_block
from quantpress.recipe.loading import parse

from ..quantize.originals import trained
from ..tiny import text
from .test_vllm import PYTHON

CPU = torch.device("cpu")
IDS = torch.randint(5, 200, (1, 100), generator=torch.Generator().manual_seed(0))
_TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
_DELTA_NETS = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "shared_expert_intermediate_size": 64, "head_dim": 64,
}  # fmt: skip
_VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "projection_dim": 64,
}  # fmt: skip
_ASK = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, ids = sys.argv[1], json.loads(sys.argv[2])
    model = LLM(model=folder, max_model_len=128, enforce_eager=True, dtype="bfloat16")
    answer = model.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    print("ANSWER" + json.dumps([of[id].logprob for of, id in zip(answer.prompt_logprobs[1:], ids[1:])]))
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="no vLLM: run `make setup-vllm`")]


def build(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained(), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    config: Any
    if kind == "llava":
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**_TEXT),
            vision_config=transformers.CLIPVisionConfig(**_VISION),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
        file = folder / "model.safetensors"  # the towers' names as in published files, which vLLM knows
        tensors = {
            name.replace("vision_tower.", "vision_tower.vision_model.", 1) if "vision_model" not in name else name: t
            for name, t in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
        images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        LlavaProcessor(
            image_processor=images, tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, image_token="<image>",
        ).save_pretrained(folder)  # fmt: skip
        return
    if kind == "mixture":
        config = transformers.Qwen3MoeConfig(**_TEXT | _EXPERTS)
    elif kind == "gpt2":  # it keeps its weights as [in, out], in a Conv1D
        sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 512, "vocab_size": 512}
        config = transformers.GPT2Config(**sizes, initializer_range=0.1, bos_token_id=1, eos_token_id=2)
    else:
        config = transformers.Qwen3NextConfig(**_TEXT | _EXPERTS | _DELTA_NETS)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def expected(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """log p of each of IDS but the first, of an artifact or a model."""
    _, skeleton = open_artifact(folder, CPU, dtype)
    skeleton.open_shell()
    hidden, arguments = skeleton.embed(IDS), skeleton.block_arguments(IDS)
    for k, block in skeleton.blocks():
        run_block(block, hidden, arguments[k], device=CPU, batch=1)
    skeleton.open_shell()
    likely = torch.log_softmax(skeleton.logits(hidden[0]).float(), -1)
    return likely[:-1].gather(1, IDS[0, 1:, None])[:, 0]


@pytest.mark.parametrize(
    ("kind", "ignore", "format"),
    [
        ("mixture", ["*.experts.*"], "compressed-tensors"),
        ("hybrid", ["*.experts.*", "*.in_proj_ba"], "compressed-tensors"),
        ("llava", [], "compressed-tensors"),
        ("gpt2", [], "gptq"),
    ],
)
def test_vllm_computes_what_the_files_say(kind: str, ignore: list[str], format: str, tmp_path: Path) -> None:
    assert PYTHON is not None
    if kind == "llava":
        found = subprocess.run([PYTHON, "-c", "import torchvision"], capture_output=True)
        if found.returncode:
            pytest.skip("vLLM loads multimodal models only with torchvision")
    build(kind, tmp_path / "model")
    (tmp_path / "text.txt").write_text(text())
    recipe = parse(
        {
            "method": {"name": "gptq"},
            "weights": {"bits": 4, "group_size": 32, "symmetric": True},
            "ignore": ignore,
            "formats": [format],
            "calibration": {"source": str(tmp_path / "text.txt"), "samples": 8, "seq_len": 64},
            "targets": [{"name": "vllm", "device": "cpu"}],
        }
    )
    job = prepare(recipe, Source(tmp_path / "model", "folder", kind), CPU)
    quantize(job, Settings(tmp_path / "run", tmp_path / "cache"))
    artifact = tmp_path / "run" / "quantized"
    (tmp_path / "ask.py").write_text(_ASK)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [PYTHON, str(tmp_path / "ask.py"), str(artifact), json.dumps(IDS[0].tolist())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert "ANSWER" in done.stdout, done.stderr[-3000:]
    got = torch.tensor(json.loads(done.stdout.partition("ANSWER")[2].splitlines()[0]))
    exact, shortened = (expected(artifact, dtype) for dtype in (torch.float32, torch.bfloat16))
    # It computes in bfloat16, and may be off as much as transformers is with the same weights in bfloat16.
    assert (got - exact).norm() < 2 * (shortened - exact).norm()
