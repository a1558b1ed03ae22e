"""The skeleton runs every family block by block exactly as transformers runs it whole."""

from pathlib import Path

import pytest
import torch
import transformers

from quantpress.core.errors import BadInput
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton, run_block

from ...tiny import FAMILIES, VOCAB, build

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_whole_model(family: str, tmp_path: Path) -> None:
    whole = transformers.AutoModelForCausalLM.from_pretrained(build_in(family, tmp_path), dtype=torch.float32)
    tokens = torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    hidden = skeleton.embed(tokens)
    arguments = skeleton.block_arguments(tokens.shape[1])
    for k, block in skeleton.blocks():
        run_block(block, hidden, arguments[k], device=CPU, batch=2)
        assert next(block.parameters()).device.type == "cpu"
    with torch.no_grad():
        expected = whole(tokens).logits
    got = torch.stack([skeleton.logits(row) for row in hidden])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


OTHERS = {
    "opt": ("OPTConfig", {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2, "ffn_dim": 96}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2}),  # biases of attention come with the batch's size
    "gemma4_text": ("Gemma4TextConfig", {**FAMILIES["llama"][1], "hidden_size_per_layer_input": 16}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_without_a_row_a_model_runs_as_it_is_or_is_refused(kind: str, tmp_path: Path) -> None:
    name, settings = OTHERS[kind]
    heads = {"n_head" if kind == "bloom" else "num_attention_heads": 4}
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings | heads | {"vocab_size": VOCAB, "pad_token_id": 1})
    whole = transformers.AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    if kind != "opt":
        with pytest.raises(BadInput, match=f"model_type '{kind}' is not supported: its blocks are given "):
            skeleton.check_arguments()
        return
    skeleton.check_arguments()
    skeleton.open_shell()
    tokens = torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    hidden, arguments = skeleton.embed(tokens), skeleton.block_arguments(24)
    for k, block in skeleton.blocks():
        run_block(block, hidden, arguments[k], device=CPU, batch=2)
    with torch.no_grad():
        expected = whole(tokens).logits
    torch.testing.assert_close(torch.stack([skeleton.logits(row) for row in hidden]), expected, rtol=1e-4, atol=1e-5)


def build_in(family: str, folder: Path) -> Path:
    build(family, folder)
    return folder


def test_router_embedding_and_head_are_no_linears_to_quantize(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path)
    names = [x.name for x in Skeleton(Checkpoint(tmp_path), device=CPU).linears()]
    assert "model.layers.1.mlp.experts.3.down_proj" in names
    assert not [n for n in names if n.endswith(("mlp.gate", "lm_head", "embed_tokens"))]


def test_mixtral_keeps_its_names_on_disk(tmp_path: Path) -> None:
    build("mixtral", tmp_path)
    names = [x.name for x in Skeleton(Checkpoint(tmp_path), device=CPU).linears()]
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "nonesuch"}, "unknown architecture: model_type 'nonesuch'"),
        ({"model_type": "t5"}, "model_type 't5' is an encoder with a decoder"),
        ({"num_hidden_layers": 5}, "lacks .* tensors, the first model.layers.2"),
        ({"dtype": "int4"}, "dtype 'int4'"),
    ],
)
def test_configs_that_cannot_be_run_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.config |= change
    checkpoint.config.pop("layer_types", None)
    with pytest.raises(BadInput, match=message):
        Skeleton(checkpoint, device=CPU)
