"""The linears of a multimodal model's towers, quantized on request, as transformers loads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from quantpress.artifact.artifact import read_manifest
from quantpress.core.errors import BadInput
from quantpress.engine.job import prepare
from quantpress.engine.sources import resolve
from quantpress.exports.verify import verify
from quantpress.recipe.loading import parse

from ...multimodal import build
from .test_pipeline import make

FP8: dict[str, Any] = {"method": "rtn", "weights": {"type": "fp8"}, "activations": {"type": "fp8"}, "towers": True,
                       "targets": ["vllm"]}  # fmt: skip
SLOW = pytest.mark.slow
INT8 = FP8 | {"weights": {"bits": 8, "group_size": -1}, "activations": {"type": "int8"}}


@pytest.mark.parametrize(("family", "recipe"), [pytest.param("qwen3_vl", FP8, marks=SLOW), ("gemma3", INT8)])
def test_transformers_loads_towers_of_8_bits(family: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    original = build(family, tmp_path / "model")
    make(tmp_path / "run", tmp_path / "model", recipe)
    folder = tmp_path / "run" / "quantized"
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        model(input_ids=torch.arange(6, 16)[None], use_cache=False)
    before, after = original.state_dict(), model.state_dict()
    stored = load_file(folder / "model.safetensors")
    outside = read_manifest(folder).outside
    taken = [n for n in before if "blocks.0" in n or "vision_tower.encoder.layers.0" in n]
    taken = [n for n in taken if n.endswith(".weight") and before[n].dim() == 2]
    assert len(taken) >= 4
    for name in taken:
        difference = (after[name].float() - before[name].float()).abs().max() / before[name].float().abs().max()
        assert 0 < difference < 0.04  # half a step of E4M3 and of 8 bits
        disk = name if name in stored else name.removeprefix("model.")
        assert stored[disk].dtype in (torch.float8_e4m3fn, torch.int8)
        assert disk.removesuffix(".weight") in outside
    assert verify(tmp_path / "run").problems == ()
    assert verify(tmp_path / "run", original=tmp_path / "model").problems == ()


def refused(folder: Path, recipe: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as said:
        prepare(parse(recipe), resolve(str(folder), cache=folder), torch.device("cpu"))
    return str(said.value)


def test_towers_that_no_server_is_known_to_load_are_refused(tmp_path: Path) -> None:
    build("llama4", tmp_path)
    assert "towers: vLLM is not known to load those of llama4 quantized" in refused(tmp_path, FP8)
    with pytest.raises(BadInput, match=r"name yours: targets: \[vllm\]"):
        parse(FP8 | {"targets": []})


@pytest.mark.parametrize("other", [{"activations": None}, {"weights": {"bits": 4}, "activations": None}])
def test_towers_are_of_8_bits_with_dynamic_inputs(other: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="servers take those in 8 bits with dynamic activations"):
        parse(INT8 | other)
