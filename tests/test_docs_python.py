"""The Python page's examples run, one after the other in one session as a reader would, on a tiny model."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import transformers

from quantpress import verify
from quantpress.calibrate import texts
from quantpress.eval.release.sweep import RunOutcome, Sweep

from .tiny import text, tokenizer

PAGE = (Path(__file__).parent.parent / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(texts, "_default", lambda role, name, cache: ([text(8000)], "some text"))
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {}
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(examples) == 8
    for example in examples:
        exec(example.replace("smollm2-135m", str(tmp_path / "model")), session)
    said = capsys.readouterr().out
    assert "recipe 'w4a16-gtpq': no such file and no shipped recipe; did you mean w4a16-gptq" in said
    assert "('quantizing', 2, 2)" in said
    assert session["exported"]["vllm"].folder == Path("runs/steps/export/vllm")
    _shows_itself(session["forecast"], "Plan", "down_proj", "int8 channel sym")
    _shows_itself(session["results"], "Perplexity", "KL divergence")
    _shows_itself(session["release"], "<td style='text-align:left'>runs/python/report/index.html", "Perplexity")
    _shows_itself(session["found"], "w4a16-rtn" if session["found"].choice is None else "Take ")
    _shows_itself(session["proposal"], "Take ", "the weights may take")
    _shows_itself(verify("runs/steps"), "Sound", "files compared")


def _shows_itself(result: Any, *said: str) -> None:
    """In a notebook, as HTML that is well formed."""
    html = result._repr_html_()
    ElementTree.fromstring(f"<div>{html}</div>")
    for words in said:
        assert words in html


def test_what_a_notebook_shows_is_escaped() -> None:
    sweep = Sweep((RunOutcome("a<b>", "failed", "<script>"), RunOutcome("c", "done", reused=True)), None)
    _shows_itself(sweep, "a&lt;b&gt;", "&lt;script&gt;", "done (finished before)")
