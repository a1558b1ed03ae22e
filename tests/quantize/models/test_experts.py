"""Experts as linears of their own, whatever the layout of the family: the model computes the same as before."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton, run_block

from ... import tiny

CPU = torch.device("cpu")
LAYERS = {**tiny._LLAMA, "num_hidden_layers": 3, "num_experts_per_tok": 2}
NO_HEAD_DIM = {k: v for k, v in LAYERS.items() if k != "head_dim"}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
DEEPSEEK = NO_HEAD_DIM | {"num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 32}
JAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False, "attn_layer_period": 2}
# family: config class, settings, an expert's linear on disk
MIXTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "deepseek_v3": (
        "DeepseekV3Config",
        DEEPSEEK | LATENT | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        "model.layers.1.mlp.experts.3.up_proj",
    ),
    "gpt_oss": (
        "GptOssConfig",
        LAYERS | {"num_local_experts": 4, "sliding_window": 8},
        "model.layers.0.mlp.experts.3.gate_proj",
    ),
    "llama4": (
        "Llama4TextConfig",
        LAYERS | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
        | {"interleave_moe_layer_step": 1, "attention_chunk_size": 64},
        "model.layers.0.feed_forward.experts.3.down_proj",
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        NO_HEAD_DIM | {"num_local_experts": 4},
        "model.layers.0.block_sparse_moe.experts.3.w2",
    ),
    "jetmoe": (
        "JetMoeConfig",
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_key_value_heads": 2}
        | {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": tiny.VOCAB},
        "model.layers.0.mlp.input_linear.3",
    ),
    "dbrx": (
        "DbrxConfig",
        {"d_model": 64, "n_heads": 4, "n_layers": 3, "vocab_size": tiny.VOCAB, "max_seq_len": 128}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
        | {"ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
        "transformer.blocks.0.ffn.experts.3.w2",
    ),
    "phimoe": (
        "PhimoeConfig",
        NO_HEAD_DIM | {"num_local_experts": 4},
        "model.layers.0.block_sparse_moe.experts.3.w1",
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        NO_HEAD_DIM | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
        "model.layers.1.mlp.experts.3.up_proj",
    ),
}  # fmt: skip


def saved(family: str, folder: Path) -> Any:
    """A tiny model of a family, its routing far from even and its saved buffers not as they are initialised."""
    name, settings, _ = MIXTURES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for key, buffer in model.named_buffers():
            if "correction_bias" in key:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return model


def block_by_block(skeleton: Skeleton, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of tokens [samples, seq_len]."""
    skeleton.open_shell()
    hidden, arguments = skeleton.embed(tokens), skeleton.block_arguments(tokens)
    for k, block in skeleton.blocks():
        run_block(block, hidden, arguments[k], device=CPU, batch=2)
    return torch.stack([skeleton.logits(row) for row in hidden])


@pytest.mark.parametrize("family", MIXTURES)
def test_split_experts_compute_what_the_whole_model_computes(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    names = [linear.name for linear in skeleton.linears()]
    assert MIXTURES[family][2] in names
    assert not [name for name in names if "router" in name or name.endswith(".gate")]
    assert not skeleton.unused
    tokens = torch.randint(3, tiny.VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(block_by_block(skeleton, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "dbrx"])
def test_an_expert_is_read_without_the_others(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(family, tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a whole tensor was read"))
    linear = next(x for x in skeleton.linears() if x.name == MIXTURES[family][2])
    weight = skeleton.reader.read(f"{linear.name}.weight")
    assert weight.shape == (linear.out_features, linear.in_features)
    assert weight.nbytes == skeleton.reader.nbytes(f"{linear.name}.weight")


def test_a_linear_that_routes_is_left_out_by_the_name_that_transformers_has_for_it(tmp_path: Path) -> None:
    saved("phimoe", tmp_path)
    names = Skeleton(Checkpoint(tmp_path), device=CPU).unquantized_modules()
    assert {"model.layers.2.block_sparse_moe.gate", "model.layers.2.mlp.router"} <= set(names)
