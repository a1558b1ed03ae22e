"""Names on disk, and buffers: what the file holds is read, what it does not hold is what the class computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantpress.core.errors import BadInput
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.names import TensorNames
from quantpress.models.skeleton import Skeleton

from ... import tiny
from .test_experts import LAYERS, block_by_block

CPU = torch.device("cpu")
TOKENS = torch.randint(3, tiny.VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))


def test_names_of_stacked_experts_and_of_a_head_that_is_called_otherwise(tmp_path: Path) -> None:
    tiny.build("mixtral", tmp_path / "mixtral")
    tiny.build("gpt_neox", tmp_path / "gpt_neox")
    mixtral = Skeleton(Checkpoint(tmp_path / "mixtral"), device=CPU)
    inside = "mlp.experts.1.w2.weight"
    assert mixtral.block_names(0)[inside] == "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert Skeleton(Checkpoint(tmp_path / "gpt_neox"), device=CPU).head_names() == ["embed_out"]


def test_a_checkpoint_without_the_prefix_of_the_whole_model(tmp_path: Path) -> None:
    model = tiny.build("qwen3", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): t for name, t in load_file(file).items()}, file)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    assert skeleton.linears()[0].name == "layers.0.self_attn.q_proj"
    with torch.no_grad():
        torch.testing.assert_close(block_by_block(skeleton, TOKENS), model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_a_file_with_fewer_experts_than_its_config_says_is_refused(tmp_path: Path) -> None:
    tiny.build("mixtral", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if ".1.block_sparse_moe.experts.3." not in name}, file)
    with pytest.raises(BadInput, match=r"lacks 3 tensors, the first model\.layers\.1\."):
        Skeleton(Checkpoint(tmp_path), device=CPU)


def test_tensors_beyond_the_model_are_found(tmp_path: Path) -> None:
    model = tiny.build("qwen3", tmp_path)
    extra = "model.layers.7.self_attn.q_proj.weight"
    names = TensorNames(model, [*model.state_dict(), extra])
    assert names.unused == [extra]


BUFFERS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", {k: v for k, v in LAYERS.items() if k != "head_dim"}),
    "gemma4": (
        "Gemma4TextConfig",
        LAYERS | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 8}
        | {"global_head_dim": 16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "falcon_h1": (
        "FalconH1Config",
        LAYERS | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
        | {"time_step_limit": (0.0, 1e9), "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_come_from_the_file_or_from_the_class(family: str, tmp_path: Path) -> None:
    name, settings = BUFFERS[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)).eval()
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith(("layer_scalar", "beta")):
                buffer.mul_(0.7)
    model.save_pretrained(tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    with torch.no_grad():
        torch.testing.assert_close(block_by_block(skeleton, TOKENS), model(TOKENS).logits, rtol=1e-4, atol=1e-5)
