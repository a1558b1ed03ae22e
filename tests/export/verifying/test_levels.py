"""How far verify came is said, and no more; eval and smoke take no artifact whose files have changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress import api
from quantpress.core.errors import BadInput
from quantpress.eval.release.callbacks import Options
from quantpress.exports.verify import check_unchanged, original_at_hand, verify
from quantpress.exports.verifying import forward

from . import runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levels")
    return runs.make("w4a16-rtn", runs.original(folder / "model"), folder / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def change_a_weight(run: Path) -> None:
    """One value of the final norm."""
    file = run / "quantized" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = 0.5
    save_file(tensors, file, {"format": "pt"})


def test_each_level_is_said_once_it_is_reached(run: Path, made: Path) -> None:
    alone = verify(run)
    assert [line.split(" ")[0] for line in alone.reached] == ["6", "every"]
    whole = verify(run, original=made.parent / "model")
    assert "14 linears are the original's within what their grids lose, all other tensors exactly" in whole.reached[2]
    assert verify(run, original="it is on the moon").not_reached == ("weights against the original: it is on the moon",)
    assert verify(run, forward=True).reached[2].startswith("a short forward pass: perplexity ")


def test_what_failed_is_not_said_to_be_reached(run: Path, made: Path) -> None:
    change_a_weight(run)
    found = verify(run, original=made.parent / "model")
    assert len(found.problems) == 2  # by its checksum, and beside the original
    assert found.reached == ()


def test_the_original_is_found_by_the_manifest_while_it_is_unchanged(run: Path, made: Path, tmp_path: Path) -> None:
    assert original_at_hand(run, tmp_path) == made.parent / "model"
    for place in (run, run / "quantized"):
        document = json.loads((place / "manifest.json").read_text())
        document["recipe"]["model"] = str(tmp_path / "moved")
        (place / "manifest.json").write_text(json.dumps(document))
    assert "is not on this machine; --original" in str(original_at_hand(run, tmp_path))
    shutil.copytree(made.parent / "model", tmp_path / "moved")
    assert original_at_hand(run, tmp_path) == tmp_path / "moved"
    (tmp_path / "moved" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json, of which it was made, has changed" in str(original_at_hand(run, tmp_path))


def test_an_artifact_whose_files_have_changed_is_neither_measured_nor_served(run: Path, tmp_path: Path) -> None:
    check_unchanged(run)
    check_unchanged(run / "quantized")
    change_a_weight(run)
    said = "model.safetensors, which manifest.json lists, has changed"
    for where in (run, run / "quantized"):
        with pytest.raises(BadInput, match=said):
            check_unchanged(where)
    with pytest.raises(BadInput, match=said):
        api.evaluate(run, recipe={"evaluation": {}})
    with pytest.raises(BadInput, match=said):
        api.smoke(run, {"server": "url", "url": "http://127.0.0.1:9"})
    with pytest.raises(BadInput) as other:  # on it goes, to a text that is not there
        api.evaluate(
            run, recipe={"model": str(run.parent / "no"), "evaluation": {}}, options=Options(although_changed=True)
        )
    assert "has changed" not in str(other.value)


def test_a_model_that_predicts_nothing_is_told_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model guesses; of one with few tokens that is no failing."""
    assert verify(run, forward=True).problems == ()
    monkeypatch.setattr(forward, "_SMALLEST", 100)
    (line,) = verify(run, forward=True).problems
    assert line.startswith("a short forward pass predicts as if it guessed: perplexity ")
    monkeypatch.setattr(forward, "log_probabilities", lambda _, states: torch.full((len(states), 352), torch.nan))
    (line,) = verify(run, forward=True).problems
    assert "NaN or inf" in line
