"""Further texts beside the first, and answers that changed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from quantpress.core.errors import BadInput
from quantpress.eval.measure.domains import chosen, load
from quantpress.eval.measure.evaluate import Watch, evaluate, prepare
from quantpress.eval.measure.statistics import flips
from quantpress.recipe import Calibration, Evaluation, Gates

from ... import tiny

DOCUMENT: dict[str, Any] = {"windows": 2, "window": 32, "prompts": []}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a text to evaluate on, one to calibrate on and one more."""
    folder = tmp_path_factory.mktemp("domains")
    for name in ("model", "other"):
        tiny.build("llama", folder / name)
    weights = load_file(folder / "other" / "model.safetensors")
    save_file({name: 1.1 * w for name, w in weights.items()}, folder / "other" / "model.safetensors", {"format": "pt"})
    for name, words in (("evaluation", 1000), ("calibration", 8000), ("more", 1200)):
        (folder / f"{name}.txt").write_text(f"{name} " + tiny.text(words))
    return folder


def test_each_text_is_measured_as_the_first_is(place: Path, tmp_path: Path) -> None:
    source = str(place / "more.txt")
    wanted = Evaluation.model_validate(
        DOCUMENT | {"source": str(place / "evaluation.txt"), "domains": [{"source": source, "windows": 3}]}
    )
    prepared = prepare(place / "model", wanted, tmp_path, calibration=Calibration())
    found = evaluate(place / "model", place / "other", prepared, Gates(), Watch())
    (domain,) = found.domains
    alone = Evaluation.model_validate(DOCUMENT | {"source": source, "windows": 3, "domains": []})
    first = evaluate(place / "model", place / "other", prepare(place / "model", alone, tmp_path), Gates(), Watch())
    assert first.text is not None
    assert first.original is not None
    assert first.divergence is not None
    assert domain.text.sha256 == first.text.sha256
    assert domain.original_perplexity == first.original.perplexity
    assert domain.perplexity_increase_interval == first.perplexity_increase_interval
    assert (domain.kl_mean, domain.kl_interval) == (first.divergence.kl_mean, first.divergence.kl_interval)


def test_the_calibrations_own_text_comes_from_a_part_that_is_not_calibrated_on(place: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    wanted = Evaluation.model_validate(DOCUMENT | {"source": str(place / "evaluation.txt")})
    calibration = Calibration(source=str(place / "calibration.txt"), samples=4, seq_len=32)
    notes: list[str] = []
    (own,) = load(wanted, calibration, tokenizer, tmp_path, notes.append)
    assert own.name == "calibration"
    assert notes == []
    text = (place / "calibration.txt").read_text()
    calibrated = tokenizer(text, add_special_tokens=False)["input_ids"][: 4 * 32]
    assert len(tokenizer.decode(calibrated)) < len(text) - 6 * 4 * 32  # the last 4 windows of 32 tokens
    last = tokenizer(text[-6 * 4 * 32 :], add_special_tokens=False)["input_ids"]
    assert own.text.tokens.ids[0].tolist() == last[:32]
    large = calibration.model_copy(update={"samples": 10_000})
    assert load(wanted, large, tokenizer, tmp_path, notes.append) == []
    assert "that is not calibrated on" in notes[0]
    named = wanted.model_copy(update={"domains": chosen(wanted, calibration)})
    with pytest.raises(BadInput, match=r"evaluation.domains, calibration: .*that is not calibrated on"):
        load(named, large, tokenizer, tmp_path, notes.append)


def test_by_default_nothing_more_is_downloaded() -> None:
    local = Evaluation(source="mine.txt")
    assert list(chosen(local, Calibration())) == []
    assert [d.source for d in chosen(local, Calibration(source="other.txt"))] == ["calibration"]
    assert [d.source for d in chosen(Evaluation(), Calibration())] == ["calibration"]
    assert list(chosen(Evaluation(domains=()), Calibration())) == []
    assert Evaluation.model_validate({"domains": ["code", "multilingual"]}).domains[1].label == "multilingual"  # type: ignore[index]
    with pytest.raises(ValueError, match="code is listed twice"):
        Evaluation.model_validate({"domains": ["code", "code"]})


def test_flips_count_both_ways() -> None:
    before, after = np.array([1.0, 1, 1, 0, 0, 0, 1, 0]), np.array([1.0, 0, 0, 1, 0, 0, 1, 0])
    found = flips(before, after)
    assert found is not None
    lost, won, interval = found
    assert (lost, won) == (2, 1)
    assert interval == pytest.approx((0.1368, 0.6943), abs=1e-3)  # Wilson's interval of 3 in 8
    assert flips(before, np.array([0.5] * 8)) is None
