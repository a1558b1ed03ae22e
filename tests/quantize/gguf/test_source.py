"""GGUF files, written here from tiny random models, become the checkpoints they were made from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantpress.artifact.gguf_floats import write_floats
from quantpress.core import files
from quantpress.core.errors import BadInput
from quantpress.engine.sources import resolve
from quantpress.gguf.conversion import FloatType

from ..originals import ORIGINALS, refused, tiny, write_gguf
from .models import FAMILIES, IDS, build, logits
from .test_conversion import SCALED

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arch", "settings"),
    [
        ("Llama", "llama", {"tie_word_embeddings": False}),
        ("Llama", "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("Llama", "llama", {"rope_parameters": LLAMA3_ROPE}),
        ("Mistral", "llama", {"sliding_window": None}),
        ("Qwen2", "qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", "qwen3", {"head_dim": 32}),
        ("GPT2", "gpt2", {}),
    ],
)
def test_gguf_gives_the_original_logits(tmp_path: Path, name: str, arch: str, settings: dict[str, Any]) -> None:
    model = tiny(name, **settings)
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf", model, arch)), cache=tmp_path / "cache")
    assert (source.kind, source.id) == ("gguf", "tiny")
    back = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    ids = torch.arange(40)[None] * 7 % model.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((source.path / "config.json").read_text())
    stored = load_file(source.path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert config["dtype"] == "bfloat16"
    assert ("lm_head.weight" in stored) is not config["tie_word_embeddings"]
    assert config["tie_word_embeddings"] is model.config.tie_word_embeddings
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert json.loads((source.path / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_written_by_us_comes_back(tmp_path: Path, family: str) -> None:
    """Equal weights, a config that computes the same."""
    build(family, tmp_path / "m", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    write_floats(tmp_path / "m", tmp_path / "model.gguf", "F32")
    source = resolve(str(tmp_path / "model.gguf"), cache=tmp_path / "cache")
    before, after = load_file(tmp_path / "m" / "model.safetensors"), load_file(source.path / "model.safetensors")
    assert set(after) == set(before)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6 if family.startswith("gemma") else 0)
    back = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    assert type(back) is type(model) or family == "mistral"  # whose files are Llama's
    torch.testing.assert_close(logits(back, IDS), logits(model, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "settings"), SCALED)
def test_and_so_do_scaled_rope_biases_and_ties(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    if "llama3" in str(settings):
        settings = {"rope_parameters": LLAMA3_ROPE}  # Llama's own numbers: a file holds what they come to, not them
    model = build(family, tmp_path / "m", **settings)
    write_floats(tmp_path / "m", tmp_path / "model.gguf", "F32")
    source = resolve(str(tmp_path / "model.gguf"), cache=tmp_path / "cache")
    back = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(back, IDS), logits(model, IDS), rtol=0.03, atol=0.03)  # bf16


@pytest.mark.parametrize(
    ("dtype", "kind", "wanted"),
    [
        (torch.bfloat16, "F16", torch.bfloat16),
        (torch.bfloat16, "F32", torch.bfloat16),
        (torch.float16, "F16", torch.float16),
        (torch.float32, "F32", torch.float32),
        (torch.float32, "BF16", torch.bfloat16),
    ],
)
def test_matrices_of_a_file_of_floats_lose_nothing(
    dtype: torch.dtype, kind: FloatType, wanted: torch.dtype, tmp_path: Path
) -> None:
    build("llama", tmp_path / "m", dtype=dtype)
    write_floats(tmp_path / "m", tmp_path / "model.gguf", kind)
    folder = resolve(str(tmp_path / "model.gguf"), cache=tmp_path / "cache").path
    after = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {wanted}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items():
        if tensor.dim() > 1:
            in_file = tensor.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
            assert torch.equal(after[name].float(), in_file.float()), name


def test_a_file_with_a_sliding_window_is_not_taken_for_one_without(tmp_path: Path) -> None:
    """Files of OLMo 3 name the architecture of OLMo 2."""
    build("olmo3", tmp_path / "m", dtype=torch.bfloat16)
    write_floats(tmp_path / "m", tmp_path / "model.gguf", "F32")
    with pytest.raises(BadInput, match="a file of olmo3, with a sliding window, is not read"):
        resolve(str(tmp_path / "model.gguf"), cache=tmp_path / "cache")


def test_an_output_that_repeats_the_embedding_is_tied(tmp_path: Path) -> None:
    model = tiny("Llama", tie_word_embeddings=False)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf", model, "llama")), cache=tmp_path)
    assert json.loads((source.path / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(source.path / "model.safetensors")


def test_shards_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.gguf.source.SHARD_BYTES", 40_000)
    model = tiny("Qwen3")
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf", model, "qwen3")), cache=tmp_path)
    index = json.loads((source.path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in source.path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    stored = {name: t for file in files for name, t in load_file(source.path / file).items()}
    assert stored.keys() == index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in stored.values())


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny("Qwen2"), "qwen2")
    first = resolve(str(file), cache=tmp_path / "cache")
    assert first.revision == files.file_sha256(file)
    monkeypatch.setattr("quantpress.gguf.source.write_checkpoint", lambda *_: pytest.fail("converted again"))
    assert resolve(str(shutil.copy(file, tmp_path / "b.gguf")), cache=tmp_path / "cache").path == first.path
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]


@pytest.mark.parametrize(
    ("arch", "pre", "extra", "words"),
    [
        ("qwen2", "qwen2", {"qwen2.expert_count": 4}, "mixture-of-experts"),
        ("qwen2", "qwen2", {"qwen2.rope.scaling.type": "longrope"}, "RoPE scaling 'longrope'"),
        ("qwen2", "qwen2", {"qwen2.rope.dimension_count": 8}, "partial rotary"),
        ("qwen2", "qwen2", {"split.count": 2}, "split in 2"),
        ("qwen3", "qwen2", {}, "no tensor for model.layers.0.self_attn.q_norm.weight"),
        ("qwen2", "gpt-2", {}, "transformers reads this tokenizer by other rules"),
        ("qwen2", "qwen2", {"tokenizer.ggml.unknown_token_id": 9999}, "unknown_token_id 9999 of"),
    ],
)
def test_gguf_files_that_are_refused(tmp_path: Path, arch: str, pre: str, extra: dict[str, Any], words: str) -> None:
    refused(write_gguf(tmp_path / "t.gguf", tiny("Qwen2"), arch, pre, extra), words, tmp_path / "cache")


def test_unknown_pre_tokenizer_architecture_and_leftover_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ORIGINALS, "qwen9", ORIGINALS["gpt-2"])
    file = write_gguf(tmp_path / "a.gguf", tiny("Qwen2"), "qwen2", "qwen9")
    refused(file, "unknown pre-tokenizer 'qwen9' .near: qwen2", tmp_path / "cache")
    refused(write_gguf(tmp_path / "b.gguf", tiny("Qwen2"), "qwen2vl"), "architecture 'qwen2vl'", tmp_path / "cache")
    file = write_gguf(tmp_path / "c.gguf", tiny("Qwen2"), "llama")  # its biases are of q, k and v only
    refused(file, "no tensor for model.layers.0.self_attn.o_proj.bias", tmp_path / "cache")
    file = write_gguf(tmp_path / "d.gguf", tiny("Qwen2"), "qwen2", blocks=1)
    refused(file, "that a qwen2 model does not have: blk.1.attn_k.bias", tmp_path / "cache")


def test_damaged_gguf(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", tiny("Qwen2"), "qwen2").read_bytes()
    for name, data in {"empty": b"", "cut": whole[:-4000], "head": whole[:3000], "zip": b"PK" + whole[2:]}.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(data)
        refused(file, "not a whole GGUF file", tmp_path / "cache")
