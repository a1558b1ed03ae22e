"""Checkpoints as GGUF files: read by the `gguf` package with the rules restated, and run by llama.cpp."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from quantpress.artifact.artifact import Artifact
from quantpress.artifact.gguf_floats import write_floats
from quantpress.cli.app import app
from quantpress.core.errors import BadInput
from quantpress.engine.job import prepare
from quantpress.engine.pipeline import quantize
from quantpress.engine.settings import Settings
from quantpress.engine.sources import resolve
from quantpress.gguf.conversion import Conversion
from quantpress.gguf.reader import GgufCheckpoint
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton
from quantpress.recipe.loading import parse

from .models import FAMILIES, IDS, VOCAB, WRITTEN, build, logits

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHORT, LONG = [1.0 + i / 10 for i in range(8)], [2.0 + i for i in range(8)]
SCALED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
               | {"original_max_position_embeddings": 32}, "max_position_embeddings": 128}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("gemma2", {"num_hidden_layers": 4}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"tie_word_embeddings": True}),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT}
              | {"long_factor": LONG, "original_max_position_embeddings": 512, "factor": 2.0},
              "original_max_position_embeddings": 512, "max_position_embeddings": 1024}),  # contexts are 256 and more
]  # fmt: skip


def written(folder: Path, file: Path) -> dict[str, Tensor]:
    """The file's tensors in float32, by the `gguf` package alone."""
    out = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        out[tensor.name] = torch.from_numpy(np.array(values)).reshape(*reversed(tensor.shape.tolist()))
    return out


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Row i and row i + half of each head, side by side."""
    half = weight.shape[0] // heads // 2
    rows = [h * 2 * half + i + part * half for h in range(heads) for i in range(half) for part in (0, 1)]
    return weight[rows]


def grouped(weight: Tensor, heads: int) -> Tensor:
    """All queries, all keys, all values, where each head had its three one after the other."""
    size = weight.shape[0] // heads // 3
    rows = [h * 3 * size + part * size + i for part in range(3) for h in range(heads) for i in range(size)]
    return weight[rows]


def experts(state: dict[str, Tensor], name: str, n: int = 4) -> Tensor:
    return torch.stack([state[name.replace("*", str(e))] for e in range(n)])


L = "model.layers.0."
RULES: dict[str, dict[str, Callable[[dict[str, Tensor]], Tensor]]] = {
    "llama": {
        "blk.0.attn_q.weight": lambda s: interleaved(s[L + "self_attn.q_proj.weight"], 4),
        "blk.0.attn_k.weight": lambda s: interleaved(s[L + "self_attn.k_proj.weight"], 2),
        "blk.0.attn_v.weight": lambda s: s[L + "self_attn.v_proj.weight"],
        "blk.0.ffn_down.weight": lambda s: s[L + "mlp.down_proj.weight"],
        "token_embd.weight": lambda s: s["model.embed_tokens.weight"],
    },
    "mistral": {"blk.0.attn_k.weight": lambda s: interleaved(s[L + "self_attn.k_proj.weight"], 2)},
    "qwen2": {"blk.0.attn_q.bias": lambda s: s[L + "self_attn.q_proj.bias"]},
    "qwen3": {"blk.0.attn_q_norm.weight": lambda s: s[L + "self_attn.q_norm.weight"]},
    "gemma2": {
        "blk.0.ffn_norm.weight": lambda s: s[L + "pre_feedforward_layernorm.weight"] + 1,
        "blk.0.post_attention_norm.weight": lambda s: s[L + "post_attention_layernorm.weight"] + 1,
        "output_norm.weight": lambda s: s["model.norm.weight"] + 1,
    },
    "gemma": {"blk.0.ffn_norm.weight": lambda s: s[L + "post_attention_layernorm.weight"] + 1},
    "gemma3": {"blk.0.attn_k_norm.weight": lambda s: s[L + "self_attn.k_norm.weight"] + 1},
    "phi3": {"blk.0.attn_qkv.weight": lambda s: s[L + "self_attn.qkv_proj.weight"]},
    "gpt_neox": {
        "blk.0.attn_qkv.weight": lambda s: grouped(s["gpt_neox.layers.0.attention.query_key_value.weight"], 4),
        "blk.0.attn_qkv.bias": lambda s: grouped(s["gpt_neox.layers.0.attention.query_key_value.bias"], 4),
    },
    "gpt2": {
        "blk.0.attn_qkv.weight": lambda s: s["transformer.h.0.attn.c_attn.weight"].T,
        "position_embd.weight": lambda s: s["transformer.wpe.weight"],
    },
    "qwen2_moe": {
        "blk.0.ffn_gate_exps.weight": lambda s: experts(s, L + "mlp.experts.*.gate_proj.weight"),
        "blk.1.ffn_down_shexp.weight": lambda s: s["model.layers.1.mlp.shared_expert.down_proj.weight"],
    },
    "qwen3_moe": {"blk.0.ffn_down_exps.weight": lambda s: experts(s, L + "mlp.experts.*.down_proj.weight")},
    "mixtral": {
        "blk.0.ffn_up_exps.weight": lambda s: experts(s, L + "block_sparse_moe.experts.*.w3.weight"),
        "blk.0.ffn_gate_inp.weight": lambda s: s[L + "block_sparse_moe.gate.weight"],
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_by_its_rule(tmp_path: Path, family: str) -> None:
    """A few rules restated by rows; all the tensors read back under their HF names, equal to the bit."""
    build(family, tmp_path)
    write_floats(tmp_path, tmp_path / "model.gguf", "F32")
    state, tensors = load_file(tmp_path / "model.safetensors"), written(tmp_path, tmp_path / "model.gguf")
    for name, rule in RULES[family].items():
        torch.testing.assert_close(tensors[name], rule(state), rtol=0, atol=0)
    back = GgufCheckpoint(tmp_path)
    assert set(back.names()) == set(state)
    for name, tensor in state.items():
        assert back.shape(name) == tuple(tensor.shape)
        torch.testing.assert_close(back.read(name), tensor, rtol=0, atol=1e-6 if family.startswith("gemma") else 0)


@pytest.mark.parametrize("family", WRITTEN)
def test_every_tensor_is_read_back(tmp_path: Path, family: str) -> None:
    build(family, tmp_path)
    write_floats(tmp_path, tmp_path / "model.gguf", "F32")
    back, state = GgufCheckpoint(tmp_path), load_file(tmp_path / "model.safetensors")
    skeleton, original = (Skeleton(reader, device=torch.device("cpu")) for reader in (back, Checkpoint(tmp_path)))
    for k in range(original.n_blocks):
        want, got = original.read_block(k), skeleton.read_block(k)
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)
    for name in original.shell_names().values():
        torch.testing.assert_close(back.read(name), state[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, *WRITTEN])
def test_llama_cpp_gives_the_logits_of_transformers(tmp_path: Path, family: str) -> None:
    check_logits(tmp_path, family, {})


@pytest.mark.parametrize(("family", "settings"), SCALED)
def test_and_so_it_does_with_scaled_rope_biases_and_ties(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    check_logits(tmp_path, family, settings)


def check_logits(folder: Path, family: str, settings: dict[str, Any]) -> None:
    pytest.importorskip("llama_cpp")
    from quantpress.gguf.llama_cpp_library import Loaded

    model = build(family, folder, **settings)
    write_floats(folder, folder / "model.gguf", "F32")
    want = logits(model, IDS)
    with Loaded(folder / "model.gguf", 64, threads=1) as llama:
        got = torch.from_numpy(llama.logits(IDS.tolist()))
    near = 1e-2 if family.startswith("gemma4") else 2e-3  # the cache is in float16, and Gemma 4's scores are unscaled
    assert float((got - want).abs().max()) < near
    assert float((got.argmax(1) == want.argmax(1)).float().mean()) > 0.95
    assert float(want.std()) > 0.1


def test_hyper_parameters(tmp_path: Path) -> None:
    build("llama", tmp_path, rope_parameters=LLAMA3)
    write_floats(tmp_path, tmp_path / "model.gguf", "F16")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    said = {key: field.contents() for key, field in fields.items()}
    assert said["general.architecture"] == "llama"
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    want = {
        "context_length": 128, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "vocab_size": VOCAB,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "rope.dimension_count": 16,
        "rope.freq_base": 500000.0,
    }  # fmt: skip
    assert {key: said[f"llama.{key}"] for key in want} == want
    assert fields["llama.context_length"].types == [gguf.GGUFValueType.UINT32]
    factors = written(tmp_path, tmp_path / "model.gguf")["rope_freqs.weight"]
    assert factors.tolist() == pytest.approx([llama3_factor(500000.0 ** (2 * i / 16)) for i in range(8)], rel=1e-6)


def llama3_factor(inverse_frequency: float) -> float:
    """Llama 3.1's rule for one frequency, by its wavelength."""
    wavelength = 2 * math.pi * inverse_frequency
    if wavelength < 64 / 4:
        return 1.0
    if wavelength > 64:
        return 8.0
    smooth = (64 / wavelength - 1) / 3
    return 1 / ((1 - smooth) / 8 + smooth)


@pytest.mark.parametrize(("kind", "bits"), [("F16", 16), ("BF16", 16), ("F32", 32)])
def test_norms_and_vectors_stay_float32(tmp_path: Path, kind: Any, bits: int) -> None:
    build("gpt2", tmp_path)
    write_floats(tmp_path, tmp_path / "model.gguf", kind)
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        matrix = len(tensor.shape) > 1 and tensor.name != "position_embd.weight"
        assert tensor.tensor_type.name == (kind if matrix else "F32"), tensor.name


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is \\[1\\]"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("gemma2", {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar 224"),
        ("gemma2", {"attn_logit_softcapping": None}, "without logit soft-capping"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_what_llama_cpp_would_run_wrongly_is_refused(
    tmp_path: Path, family: str, settings: dict[str, Any], words: str
) -> None:
    build(family, tmp_path, **settings)
    refuse(tmp_path, words)


def test_unknown_architecture_leftover_tensor_and_overflow(tmp_path: Path) -> None:
    build("llama", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"model.vision.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    refuse(tmp_path, "model.vision.weight: a GGUF file of llama has no place for it")
    large = state["model.layers.0.mlp.up_proj.weight"].clone()
    large[0, 0] = 1e6
    save_file(state | {"model.layers.0.mlp.up_proj.weight": large}, tmp_path / "model.safetensors", {"format": "pt"})
    refuse(tmp_path, "F16 cannot hold 1e\\+06; write BF16 or F32")
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"model_type": "olmo"}))
    refuse(tmp_path, "architecture 'olmo' cannot be written as GGUF")


def refuse(folder: Path, words: str) -> None:
    """One line, and nothing written."""
    with pytest.raises(BadInput, match=words) as caught:
        write_floats(folder, folder / "new" / "model.gguf", "F16")
    assert "\n" not in str(caught.value)
    assert not list(folder.rglob("*.gguf*"))


def test_a_sliding_window_that_llama_cpp_lacks_is_noted(tmp_path: Path) -> None:
    build("mistral", tmp_path, sliding_window=8)
    (note,) = Conversion(Checkpoint(tmp_path), tmp_path).notes
    assert re.search("no sliding window for llama: beyond 8 tokens", note)


def test_the_folder_is_an_artifact(tmp_path: Path) -> None:
    build("mixtral", tmp_path)
    write_floats(tmp_path, tmp_path / "model.gguf", "F32")
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    artifact = Artifact(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    torch.testing.assert_close(artifact.read(name), state[name], rtol=0, atol=0)
    assert artifact.checkpoint.total_bytes == sum(4 * t.numel() for t in state.values())


def test_a_quantized_artifact_is_written_as_what_it_computes_with(tmp_path: Path) -> None:
    build("llama", tmp_path / "m")
    recipe = parse({"method": {"name": "rtn"}, "weights": {"group_size": 32}, "model": str(tmp_path / "m")})
    job = prepare(recipe, resolve(str(tmp_path / "m"), cache=tmp_path / "cache"))
    quantize(job, Settings(tmp_path / "run", tmp_path / "cache"))
    folder, file = tmp_path / "run" / "quantized", tmp_path / "q" / "model.gguf"
    main = CliRunner().invoke(app, ["gguf", str(folder), str(file), "--type", "F32"], catch_exceptions=False)
    assert main.output.split() == ["written:", str(file)]
    down = written(tmp_path, file)["blk.1.ffn_down.weight"]
    assert len(down[0, :32].unique()) <= 16
    torch.testing.assert_close(down, Artifact(folder).read("model.layers.1.mlp.down_proj.weight"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m", "x.bin"], "x.bin: give a name that ends in .gguf"),
        (["m", "x.gguf", "--type", "Q8_0"], "only a .gguf file of floats is rounded as it is; for m run a recipe"),
    ],
)
def test_the_command_refuses(arguments: list[str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        CliRunner().invoke(app, ["gguf", *arguments], catch_exceptions=False)
