"""`bos: auto`: where the tokenizer adds no BOS token, the model is asked."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantpress.artifact.artifact import open_original
from quantpress.calibrate.bos import BosTrial, try_bos
from quantpress.models.skeleton import Skeleton

from ... import tiny


def test_a_trial_is_what_transformers_computes_and_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.build("llama", folder)
    tokenizer, opened = AutoTokenizer.from_pretrained(folder), 0
    text = tiny.text(2000)

    def model() -> Skeleton:
        nonlocal opened
        opened += 1
        return open_original(folder, torch.device("cpu"), torch.float32)[1]

    found = try_bos(folder, model, tokenizer, text, "auto", tmp_path / "cache")
    assert found is not None
    again = try_bos(folder, model, tokenizer, text, "auto", tmp_path / "cache")
    assert (found, opened) == (again, 1)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: plain.config.max_position_embeddings])
    for value, front in ((found.after_bos, [tokenizer.bos_token_id]), (found.without, [])):
        row = torch.cat([torch.tensor(front, dtype=torch.int64), ids])
        with torch.no_grad():
            logits = plain(row[None]).logits[0, :-1].float()[1 - len(ids) :]
        assert value == pytest.approx(math.exp(torch.nn.functional.cross_entropy(logits, ids[1:])), rel=1e-4)


def test_what_is_decided_already_is_not_tried(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.build("llama", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def never() -> Skeleton:
        raise AssertionError("nothing is to be tried")

    assert try_bos(folder, never, tokenizer, tiny.text(2000), "always", tmp_path) is None
    assert try_bos(folder, never, tokenizer, tiny.text(2000), "never", tmp_path) is None
    assert try_bos(folder, never, tokenizer, "too short", "auto", tmp_path) is None
    tokenizer.bos_token = None
    assert try_bos(folder, never, tokenizer, tiny.text(2000), "auto", tmp_path) is None


@pytest.mark.parametrize(
    ("after", "without", "bos"), [(54.0, 229_128.0, "always"), (17.0, 17.1, "auto"), (30, 17, "auto")]
)
def test_only_what_is_plainly_better_is_taken(after: float, without: float, bos: str) -> None:
    assert BosTrial(after, without).bos == bos


def test_no_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    """GPT-2 looks its positions up in a table: one past its end is an error."""
    folder = tmp_path / "model"
    tiny.build("gpt2", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def model() -> Skeleton:
        return open_original(folder, torch.device("cpu"), torch.float32)[1]

    found = try_bos(folder, model, tokenizer, tiny.text(2000), "auto", tmp_path / "cache")
    assert found is not None
    assert math.isfinite(found.after_bos)
