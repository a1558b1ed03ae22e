"""How far verify came is said, and no more; eval and smoke take no artifact whose files have changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress import api
from quantpress.artifact.artifact import open_artifact
from quantpress.artifact.manifest import read_manifest
from quantpress.calibrate import block_pass
from quantpress.core.errors import BadInput
from quantpress.eval.release.callbacks import Options
from quantpress.exports.serving.reference import Noise, Paragraph, Reference
from quantpress.exports.verify import check_unchanged, original_at_hand, structure, verify
from quantpress.exports.verifying import forward
from quantpress.numbers.grid import Inputs
from quantpress.numbers.types import Activations

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


def test_inputs_that_are_dynamic_by_one_of_config_and_manifest_alone_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = block_pass.static_int8

    def unfit(spec: Activations, x: torch.Tensor, low: float, high: float) -> tuple[Inputs, float]:
        best, lost = chosen(spec, x, low, high)
        return best, 0.9 if x.shape[-1] == 512 else lost

    monkeypatch.setattr(block_pass, "static_int8", unfit)
    run = runs.make("w8a8-gptq-static", runs.original(tmp_path / "model"), tmp_path / "run")
    folder, name, other = run / "quantized", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
    assert structure(folder) == []
    unlike = {"manifest.json": "config.json", "config.json": "the manifest"}
    for file, by in unlike.items():
        kept = (folder / file).read_text()
        document = json.loads(kept)
        if file == "manifest.json":
            next(layer for layer in document["layers"] if layer["name"] == name).pop("dynamic")
        else:
            groups = document["quantization_config"]["config_groups"].values()
            static, dynamic = sorted(groups, key=lambda group: group["input_activations"]["dynamic"])
            dynamic["targets"] = [target for target in dynamic["targets"] if "layers.1" not in target]
            static["targets"].append(name)
            shard = folder / "model.safetensors"
            held = load_file(shard)
            save_file(held | {f"{name}.input_scale": held[f"{other}.input_scale"].clone()}, shard, {"format": "pt"})
        (folder / file).write_text(json.dumps(document))
        assert f"{name}: the scales of its inputs are dynamic by {by} alone" in structure(folder)
        (folder / file).write_text(kept)


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


def test_what_rounding_has_left_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 2-bit artifact may guess: by its manifest, and without one by its bits."""
    monkeypatch.setattr(forward, "_SMALLEST", 100)
    document = json.loads((run / "manifest.json").read_text())
    for layer in document["layers"]:
        layer["relative_error"] = 0.2
    for place in (run, run / "quantized"):
        (place / "manifest.json").write_text(json.dumps(document))
    found = verify(run, forward=True)
    assert found.problems == ()
    assert "no damage that can be told without the original: its manifest records 20% lost" in found.reached[2]
    bare = run / "quantized"
    (bare / "manifest.json").unlink()
    assert "predicts as if it guessed" in verify(bare, forward=True).problems[0]
    monkeypatch.setattr(forward, "_POOR_BITS", 4)
    assert verify(bare, forward=True).problems == ()


def test_a_forward_pass_is_held_against_what_the_evaluation_recorded(run: Path) -> None:
    """The random model's perplexity is no better than a guess: as recorded, or not."""
    ids = tuple(range(5, 40))
    _, skeleton = open_artifact(run / "quantized", torch.device("cpu"), torch.float32)
    (loss,) = forward._losses(skeleton, [ids])
    for off, said in ((0.0, None), (0.02, None), (0.3, "a short forward pass is not as it was: perplexity ")):
        paragraph = Paragraph(text="", ids=ids, start=1, original=(0.0,) * 34, artifact=(-loss - off,) * 34)
        digest = read_manifest(run).artifact.digest
        reference = Reference(
            schema=1, model="it", artifact=digest, libraries={}, bos=None, chat_template=None, asked=(),
            paragraph=paragraph, round_trips=(), noise=Noise(bfloat16=0, rounded_inputs=0),
        )  # fmt: skip
        (run / "eval").mkdir(exist_ok=True)
        reference.write(run / "eval" / "reference.json")
        found = verify(run, forward=True)
        assert [line.startswith(said or "") for line in found.problems] == ([] if said is None else [True])
        assert said is not None or "of a paragraph" in found.reached[2]
