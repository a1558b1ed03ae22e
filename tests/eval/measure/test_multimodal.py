"""A multimodal model is measured, and described in its card, by its text decoder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.eval.measure.results import read_results
from quantpress.eval.report.card import write_card

from ...multimodal import build
from ...quantize.engine.test_pipeline import make
from ...tiny import text
from .test_measure import command


def test_a_run_is_measured_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("qwen3_5_moe", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file) | {"mtp.fc.weight": torch.randn(64, 128).bfloat16()}
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(text())
    settings = {"source": str(tmp_path / "text.txt"), "windows": 3, "window": 48, "prompts": ["The sea"]}
    document = {"method": {"name": "rtn"}, "evaluation": settings, "weights": {"bits": 4, "group_size": 32}}
    make(tmp_path / "run", tmp_path / "model", document)
    assert command(tmp_path, monkeypatch, str(tmp_path / "run")) == 0
    results = read_results(tmp_path / "run")
    assert results.complete
    assert results.divergence is not None
    assert 0 < results.divergence.kl_mean < 1
    assert results.efficiency is not None
    assert results.efficiency.parameters == sum(tensor.numel() for tensor in tensors.values())
    card = write_card(tmp_path / "run").path.read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "model = AutoModelForImageTextToText.from_pretrained(" in card
    assert "no figure says how it answers on images or sound" in card
