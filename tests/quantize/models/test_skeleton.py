"""The skeleton runs every family block by block exactly as transformers runs it whole."""

from pathlib import Path

import pytest
import torch
import transformers

from quantpress.core.errors import BadInput
from quantpress.models.architecture import empty_model
from quantpress.models.building import computed_buffers, stored_tensors, to_meta
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton, run_block

from ... import families
from ...tiny import FAMILIES, VOCAB, build

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_whole_model(family: str, tmp_path: Path) -> None:
    whole = transformers.AutoModelForCausalLM.from_pretrained(build_in(family, tmp_path), dtype=torch.float32)
    tokens = torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    hidden = skeleton.embed(tokens)
    arguments = skeleton.block_arguments(tokens)
    for k, block in skeleton.blocks():
        run_block(block, hidden, arguments[k], device=CPU, batch=2)
        assert next(block.parameters()).device.type == "cpu"
    with torch.no_grad():
        expected = whole(tokens).logits
    got = torch.stack([skeleton.logits(row) for row in hidden])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family",
    [
        "opt",
        "modernbert-decoder",  # what it calls its decoder is the head
        "xglm",  # its masks are as long as the batch
        "bloom",  # biases of attention come with the batch's size
        "gemma4_text",  # an embedding for each block; keys and values of earlier blocks
        "gemma3n_text",  # as before, with several states of a token, in front of the samples
        "zaya",  # the router of a block is given what the one before has made
        "deepseek_v4",  # the tokens themselves
        "qwen4_exp_text",  # as before; integers among the weights
        "longcat_flash",  # two layers a block; experts that change nothing
        "zamba",  # one attention in several blocks, which is given the embedding too
    ],
)
def test_blocks_are_given_what_the_model_gives_them(family: str, tmp_path: Path) -> None:
    whole = families.build(family, tmp_path, torch.float32)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    hidden, arguments = skeleton.embed(tokens), skeleton.block_arguments(tokens)
    for k, block in skeleton.blocks():
        run_block(block, hidden, arguments[k], device=CPU, batch=2)
    with torch.no_grad():
        expected = whole(tokens, use_cache=False).logits
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


def test_what_several_blocks_share_is_left_out_of_all(tmp_path: Path) -> None:
    families.build("zamba", tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    assert not [x.name for x in skeleton.linears() if "shared_transf" in x.name]
    left = [name for name, _, why in skeleton.left_out() if why == "it is part of several blocks"]
    shared = set(left)
    assert len(left) == len(shared)  # counted once
    assert "model.layers.1.shared_transf.self_attn.q_proj.weight" in shared
    outside = skeleton.unquantized_modules()
    assert {f"model.layers.{k}.shared_transf.self_attn.q_proj" for k in (1, 3)} <= set(outside)


def test_a_model_that_comes_back_to_its_blocks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Dory does, of transformers 5.24: block by block each would be run once."""
    once = transformers.LlamaModel.forward

    def twice(self: transformers.LlamaModel, input_ids: torch.Tensor, use_cache: bool = False) -> object:
        first = once(self, input_ids=input_ids, use_cache=use_cache)[0]
        return once(self, inputs_embeds=first, use_cache=use_cache)

    skeleton = Skeleton(Checkpoint(build_in("llama", tmp_path)), device=CPU)
    monkeypatch.setattr(transformers.LlamaModel, "forward", twice)
    with pytest.raises(BadInput, match="'llama' is not supported: it runs its blocks 2 times over the same text"):
        skeleton.open_shell()


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_neo", "gemma3n_text"])
def test_what_a_module_stores_is_what_transformers_would_save(family: str) -> None:
    model = empty_model(families.config_of(family), torch.bfloat16)
    saved, buffers = model.state_dict(), dict(model.named_buffers())
    assert list(stored_tensors(model)) == [n for n, _ in model.named_parameters()] + [n for n in buffers if n in saved]
    assert computed_buffers(model).keys() == buffers.keys() - saved.keys()
    assert any(not buffer.is_meta for buffer in buffers.values())
    to_meta(model)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
