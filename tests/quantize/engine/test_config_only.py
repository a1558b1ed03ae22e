"""A plan from config.json alone says what the plan of the whole checkpoint says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantpress import api
from quantpress.core.errors import BadInput
from quantpress.engine import plan as planning
from quantpress.engine.sources import resolve_config

from ... import multimodal, tiny

RECIPE: dict[str, Any] = {"method": "rtn", "weights": {"group_size": 32}}
LLAMA_405B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": 16384,
    "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_speed", lambda device, dtype: 1e9)


def _compared(model: Path, recipe: dict[str, Any]) -> tuple[str, ...]:
    """The notes of the plan from config.json, in a folder of its own, which is otherwise that of the checkpoint."""
    alone = model.parent / "alone"
    alone.mkdir()
    shutil.copy(model / "config.json", alone)
    whole, found = api.plan(recipe, str(model)), api.plan(recipe, str(alone), config_only=True)
    assert found.linears == whole.linears
    notes = found.plan.notes
    assert set(whole.plan.notes) <= set(notes)
    assert replace(found.plan, notes=(), original_bytes=0) == replace(whole.plan, notes=(), original_bytes=0)
    assert found.plan.original_bytes == whole.plan.original_bytes
    return tuple(note for note in notes if note not in whole.plan.notes)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3_moe", "mixtral"])
def test_it_is_the_plan_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    tiny.build(family, tmp_path / "model")
    (note,) = _compared(tmp_path / "model", RECIPE)
    assert note.startswith("from config.json alone: ")


def test_calibrated_recipes_and_rotation_are_planned(tmp_path: Path) -> None:
    tiny.build("qwen3", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(4000))
    calibration = {"source": str(text), "samples": 4, "seq_len": 16}
    _compared(tmp_path / "model", RECIPE | {"method": "gptq", "transforms": ["hadamard"], "calibration": calibration})


def test_gguf_files_are_planned_but_for_their_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_405B))
    recipe = {"formats": ["gguf"], "method": "rtn", "gguf": {"type": "Q8_0"}, "evaluation": None}
    found = api.plan(recipe, str(tmp_path), config_only=True)
    assert {scheme for *_, scheme in found.linears} == {"Q8_0"}
    assert 8.5 <= 8 * found.plan.artifact_bytes / 405_853_388_800 < 8.51
    with pytest.raises(BadInput, match="needs the whole checkpoint"):
        api.plan(recipe | {"gguf": {"type": "Q8_0", "converter": "llama.cpp"}}, str(tmp_path), config_only=True)


def test_a_multimodal_model(tmp_path: Path) -> None:
    multimodal.build("qwen2_5_vl", tmp_path / "model")
    _compared(tmp_path / "model", RECIPE)


def test_405_billion_weights_from_the_file_itself(tmp_path: Path) -> None:
    file = tmp_path / "llama-405b.json"
    file.write_text(json.dumps(LLAMA_405B))
    found = api.plan("w4a16-rtn", str(file), config_only=True)
    assert found.plan.original_bytes == 2 * 405_853_388_800
    assert {n for _, n, _ in found.linears} == {126}
    assert resolve_config(str(file)).id == "llama-405b"


def test_what_config_json_says_beyond_the_model_is_noted(tmp_path: Path) -> None:
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = LLAMA_405B | {"num_hidden_layers": 1, "quantization_config": stated, "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    notes = api.plan("w4a16-rtn", str(tmp_path), config_only=True).plan.notes
    assert any("itself quantized (fp8); its size is counted as if it were not" in note for note in notes)
    assert any("layers that predict further tokens (1)" in note for note in notes)


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json: no such file"):
        api.plan("w4a16-rtn", str(tmp_path), config_only=True)
    with pytest.raises(BadInput, match="--config-only takes a folder"):
        api.plan("w4a16-rtn", str(tmp_path / "model.gguf"), config_only=True)
