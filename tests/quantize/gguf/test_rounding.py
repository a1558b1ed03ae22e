"""GGUF files rounded by our own methods: whole runs, read back by the gguf package."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize

from quantpress.quantize.errors import BadInput
from quantpress.quantize.pipeline import Settings, prepare, quantize
from quantpress.quantize.recipe import Recipe
from quantpress.quantize.sources import resolve

from ... import tiny
from .models import build


def made(tmp_path: Path, family: str = "llama", **settings: Any) -> tuple[dict[str, Any], gguf.GGUFReader]:
    """The manifest and the file of a run on a tiny model."""
    model, text, out = tmp_path / family, tmp_path / "text.txt", tmp_path / "out"
    if not model.exists():
        build(family, model, dtype=torch.bfloat16)
        text.write_text(tiny.text(2000))
    calibration = {"source": str(text), "samples": 4, "seq_len": 64}
    recipe = Recipe.model_validate({"calibration": calibration, "formats": ["gguf"], "evaluation": None} | settings)
    job = prepare(recipe, resolve(str(model), cache=tmp_path / "cache"))
    manifest = quantize(job, Settings(out, tmp_path / "cache", overwrite=True))
    assert job.plan.artifact_bytes >= (out / "quantized" / "model.gguf").stat().st_size
    return manifest, gguf.GGUFReader(out / "quantized" / "model.gguf")


def weights(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_a_file_close_to_the_floats(family: str, tmp_path: Path) -> None:
    _, plain = made(tmp_path, family, method={"name": "llama.cpp"}, gguf={"type": "F32"})
    manifest, reader = made(tmp_path, family, gguf={"type": "Q8_0"})
    got, want = weights(reader), weights(plain)
    assert set(got) == set(want)
    for name, w in want.items():
        assert got[name].shape == w.shape
        assert (got[name] - w).abs().max() <= 0.02 * w.abs().max(), name  # rows in another order would be far off
    assert {t.tensor_type.name for t in reader.tensors} == {"Q8_0", "F32"}
    assert manifest["artifact"]["format"] == "gguf"
    assert all(layer["scheme"] == "Q8_0" for layer in manifest["layers"])


def test_types_fall_back_and_say_so(tmp_path: Path) -> None:
    manifest, reader = made(
        tmp_path, gguf={"type": "Q4_K_M", "tensor_types": {"blk.0.attn_v.weight": "Q8_0"}}, method={"name": "rtn"}
    )
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.attn_v.weight"] == "Q8_0"
    assert types["blk.1.attn_q.weight"] == "Q5_0"  # rows of 64
    assert any("rows of 64 are not whole Q4_K blocks: Q4_K -> Q5_0" in line for line in manifest["fallbacks"])
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_the_budget_is_kept_to_the_byte(method: str, tmp_path: Path) -> None:
    made(tmp_path, gguf={"type": "Q5_0"}, method={"name": "rtn"})
    file = tmp_path / "out" / "quantized" / "model.gguf"
    room = file.stat().st_size
    manifest, _ = made(tmp_path, gguf={"budget": {"bytes": room}}, method={"name": method})
    assert room - 3000 <= file.stat().st_size <= room
    assert manifest["recipe"]["gguf"]["budget"]["bytes"] == room
    with pytest.raises(BadInput, match="smallest types take"):
        made(tmp_path, gguf={"budget": {"bytes": room // 3}}, method={"name": method})


def test_a_type_without_a_grid_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gguf.type IQ4_XS: method gptq rounds to Q8_0.*made by method llama.cpp"):
        made(tmp_path, gguf={"type": "IQ4_XS"})
