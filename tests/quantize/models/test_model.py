"""The skeleton runs every family block by block exactly as transformers runs it whole."""

from pathlib import Path

import pytest
import torch
import transformers

from quantpress.calibrate.block_pass import BlockPass
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


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2", "qwen3_moe"])
def test_moments_are_those_of_each_linears_own_input(family: str, tmp_path: Path) -> None:
    build(family, tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))
    hidden, arguments = skeleton.embed(tokens), skeleton.block_arguments(16)
    _, block = next(skeleton.blocks())
    linears = {x.name: block.get_submodule(x.module) for x in skeleton.linears() if x.block == 0}
    own: dict[str, list[torch.Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, a, n=n: own.setdefault(n, []).append(a[0].reshape(-1, a[0].shape[-1])))
        for n, m in linears.items()
    ]
    run_block(block, hidden.clone(), arguments[0], device=CPU, batch=2)
    for handle in handles:
        handle.remove()
    expected = hidden.clone()
    run_block(block, expected, arguments[0], device=CPU, batch=2)
    passing = list(BlockPass(block, hidden, arguments[0], linears, device=CPU, batch=2, reference=hidden.clone()))
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)
    assert sorted(name for shared in passing for name in shared.names) == sorted(linears)
    for shared in passing:
        for name in shared.names:
            x = torch.cat(own[name])
            assert shared.tokens == len(x)
            assert shared.moment is not None
            torch.testing.assert_close(shared.moment, x.T @ x, rtol=1e-4, atol=1e-4)
        assert shared.drift is not None
        assert not shared.drift.any()
    shared = len(linears) - len(passing)
    assert shared == {"llama": 3, "phi3": 0, "gpt_neox": 0, "gpt2": 0, "qwen3_moe": 2 + 4}[family]


def test_a_block_pass_goes_on_with_what_was_rounded(tmp_path: Path) -> None:
    """Weights replaced at a halt are the ones the pass goes on with; the reference keeps the original ones."""
    build("llama", tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.randint(VOCAB, (5, 16), generator=torch.Generator().manual_seed(0))
    start, arguments = skeleton.embed(tokens), skeleton.block_arguments(16)
    _, block = next(skeleton.blocks())
    linears = {x.name: block.get_submodule(x.module) for x in skeleton.linears() if x.block == 0}
    original, reference, hidden = start.clone(), start.clone(), start.clone()
    run_block(block, original, arguments[0], device=CPU, batch=2)
    drifted = []
    for shared in BlockPass(block, hidden, arguments[0], linears, device=CPU, batch=2, reference=reference):
        assert shared.drift is not None
        drifted.append(bool(shared.drift.any()))
        for name in shared.names:
            linears[name].weight = torch.nn.Parameter(linears[name].weight * 0.9, requires_grad=False)
    assert drifted == [False, True, True, True]  # q/k/v, o, gate/up, down
    torch.testing.assert_close(reference, original, rtol=0, atol=0)
    propagated = start.clone()
    run_block(block, propagated, arguments[0], device=CPU, batch=2)
    torch.testing.assert_close(hidden, propagated, rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_a_block_pass_given_up_leave_no_trace(tmp_path: Path) -> None:
    build("llama", tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    hidden, arguments = skeleton.embed(torch.zeros(3, 8, dtype=torch.int64)), skeleton.block_arguments(8)
    before = hidden.clone()
    _, block = next(skeleton.blocks())
    linears = {x.name: block.get_submodule(x.module) for x in skeleton.linears() if x.block == 0}
    passing = BlockPass(block, hidden, arguments[0], linears, device=CPU, batch=2).__iter__()
    next(passing)
    passing.close()  # what an exception in the caller comes to
    assert torch.equal(hidden, before)
    assert not any(module._forward_pre_hooks for module in block.modules())


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
        ({"model_type": "t5"}, "unknown architecture: model_type 't5'"),
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
