"""What a file says of the model's origin: by the gguf package's rules, and the same settings for Ollama."""

import json
from pathlib import Path

import gguf
import pytest

from quantpress.artifact.gguf_floats import write_floats
from quantpress.gguf.conversion import Conversion
from quantpress.gguf.general import sampling
from quantpress.models.checkpoint import Checkpoint

from .models import build

CARD = """---
license: apache-2.0
language: [en, de]
tags: [text-generation]
base_model: org/Base-7B
---
# A model
"""
GENERATION = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "do_sample": True}


def test_card_generation_config_and_name(tmp_path: Path) -> None:
    folder = tmp_path / "Tiny-Llama-Instruct-v1.5"
    build("llama", folder)
    (folder / "README.md").write_text(CARD)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    write_floats(folder, folder / "model.gguf", "F16")
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    said = {key: field.contents() for key, field in fields.items() if key.startswith("general.")}
    assert said == {
        "general.architecture": "llama", "general.type": "model", "general.name": "Tiny-Llama-Instruct-v1.5",
        "general.basename": "Tiny-Llama", "general.finetune": "Instruct", "general.version": "v1.5",
        "general.size_label": said["general.size_label"], "general.license": "apache-2.0",
        "general.base_model.count": 1, "general.base_model.0.name": "Base 7B",
        "general.base_model.0.organization": "Org", "general.base_model.0.repo_url": "https://huggingface.co/org/Base-7B",
        "general.tags": ["text-generation"], "general.languages": ["en", "de"],
        "general.sampling.temp": pytest.approx(0.7), "general.sampling.top_k": 20,
        "general.sampling.top_p": pytest.approx(0.8), "general.sampling.penalty_repeat": pytest.approx(1.05),
        "general.file_type": gguf.LlamaFileType.MOSTLY_F16, "general.quantization_version": 2,
    }  # fmt: skip
    assert fields["general.sampling.top_k"].types == [gguf.GGUFValueType.INT32]
    metadata = Conversion(Checkpoint(folder), folder).metadata
    assert sampling(metadata) == {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repeat_penalty": 1.05}


def test_without_any_of_them_the_size_alone(tmp_path: Path) -> None:
    build("llama", tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    (tmp_path / "m" / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    metadata = Conversion(Checkpoint(tmp_path / "m"), tmp_path / "m").metadata
    kept = {key for key in metadata if key.startswith("general.")}
    assert kept == {"general.architecture", "general.type", "general.name", "general.size_label"}
