"""Families whose parameters are split, reordered or stacked in GGUF, quantized: read back as llama.cpp runs them."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers

from quantpress.artifact.artifact import open_artifact
from quantpress.artifact.manifest import Manifest
from quantpress.engine.job import Job, prepare
from quantpress.engine.pipeline import quantize
from quantpress.engine.settings import Settings
from quantpress.engine.sources import resolve
from quantpress.gguf.tensor_types import expected_types
from quantpress.recipe.loading import parse

from ...tiny import FAMILIES, text
from ..gguf.models import IDS, VOCAB, build, logits, tokenizer


def job(folder: Path, method: str, **section: Any) -> Job:
    document = {"method": {"name": method}, "formats": ["gguf"], "evaluation": None, "model": str(folder)}
    return prepare(parse(document | {"gguf": section}), resolve(str(folder), cache=folder.parent / "cache"))


def run(job: Job, out: Path) -> Manifest:
    return quantize(job, Settings(out, out.parent / "cache"))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "qwen3_5_text", "gpt_oss"])
def test_llama_cpp_runs_what_is_read_back(tmp_path: Path, family: str) -> None:
    pytest.importorskip("llama_cpp")
    from quantpress.gguf.llama_cpp_library import Loaded

    build(family, tmp_path / "m", dtype=torch.bfloat16)
    work = job(tmp_path / "m", "rtn", type="Q4_0")
    manifest = run(work, tmp_path / "out")
    assert [layer.name for layer in manifest.layers] == [linear.name for linear in work.linears]
    _, skeleton = open_artifact(tmp_path / "out" / "quantized", torch.device("cpu"), torch.float32)
    want = logits(skeleton.whole(), IDS)
    with Loaded(tmp_path / "out" / "quantized" / "model.gguf", 64, threads=1) as llama:
        got = torch.from_numpy(llama.logits(IDS.tolist()))
    assert float((got - want).norm() / want.norm()) < 0.02  # llama.cpp rounds what it multiplies with Q4_0, too
    assert float((want - logits(build(family, tmp_path / "m"), IDS)).norm() / want.norm()) > 0.02


def test_what_the_hessian_does_not_reach_is_noted(tmp_path: Path) -> None:
    """Of qwen3_next the joint projection of the delta nets is split over two tensors, which are rounded to nearest."""
    build("qwen3_next", tmp_path / "m", dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text(text())
    document = {"method": {"name": "gptq"}, "formats": ["gguf"], "evaluation": None, "gguf": {"type": "Q4_0"}}
    calibration = {"source": str(tmp_path / "text.txt"), "samples": 4, "seq_len": 32}
    recipe = parse(document | {"calibration": calibration})
    manifest = run(prepare(recipe, resolve(str(tmp_path / "m"), cache=tmp_path / "cache")), tmp_path / "out")
    noted = [line for line in manifest.fallbacks if "rounded to nearest: it is not one whole linear" in line]
    assert len(noted) == 1
    assert "attn_qkv.weight" in noted[0]
    assert "ffn_down" not in noted[0]


def test_of_a_multimodal_model_the_text_decoder(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from quantpress.gguf.llama_cpp_library import Loaded

    text = FAMILIES["gemma3"][1] | {"vocab_size": VOCAB}
    towers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=towers | {"image_size": 32, "patch_size": 8}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    manifest = run(job(tmp_path / "m", "rtn", type="Q8_0"), tmp_path / "out")
    assert any("of the text decoder alone" in note for note in manifest.fallbacks)
    _, skeleton = open_artifact(tmp_path / "out" / "quantized", torch.device("cpu"), torch.float32)
    want = logits(skeleton.whole(), IDS)
    with Loaded(tmp_path / "out" / "quantized" / "model.gguf", 64, threads=1) as llama:
        got = torch.from_numpy(llama.logits(IDS.tolist()))
    assert float((got - want).norm() / want.norm()) < 0.02


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "lfm2", "gpt_oss"])
def test_the_plan_knows_the_types_that_llama_cpp_chooses(tmp_path: Path, family: str) -> None:
    pytest.importorskip("llama_cpp")
    build(family, tmp_path / "m", dtype=torch.bfloat16)
    work = job(tmp_path / "m", "llama.cpp", type="Q4_K_M")
    kinds, known = expected_types(work.recipe, work.backend.conversion)  # type: ignore[attr-defined]
    run(work, tmp_path / "out")
    made = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "out" / "quantized" / "model.gguf").tensors}
    assert known
    assert {name: made[name] for name in kinds} == kinds
