"""A run made again from its manifest: equal hashes, or the first difference and its cause."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantpress.artifact.artifact import verify
from quantpress.cli.app import app
from quantpress.core.errors import BadInput
from quantpress.engine.pipeline import Settings, prepare
from quantpress.engine.sources import resolve
from quantpress.eval.release.reproduce import Reproduction, make_again, open_recorded

from ...quantize.engine.test_pipeline import make
from ...tiny import build


def again(manifest: Path, out: Path, model: Path | None = None, **changes: Any) -> Reproduction:
    original = open_recorded(manifest)
    recipe = original.recipe.model_copy(update={"model": str(model) if model else original.model} | changes)
    cache = out.parent / "cache"
    return make_again(original, prepare(recipe, resolve(recipe.model, cache=cache)), Settings(out, cache))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    build("llama", tmp_path / "model", torch.bfloat16)
    make(tmp_path / "run", tmp_path / "model", {})
    return tmp_path / "run"


def test_the_same_bytes_come_out_of_a_manifest(run: Path) -> None:
    files = len(list((run / "quantized").iterdir())) - 1  # the manifest is not in its own list
    assert again(run, run.parent / "again") == Reproduction(run.parent / "again", files, None, ())
    alone = run.parent / "alone.json"
    alone.write_bytes((run / "manifest.json").read_bytes())
    assert again(alone, run.parent / "once more").first is None


def test_a_run_that_is_there_already_proves_nothing(run: Path) -> None:
    again(run, run.parent / "again")
    with pytest.raises(BadInput, match="holds a finished run, which would prove nothing; give another --out"):
        again(run, run.parent / "again")
    for manifest in (run, run / "quantized"):
        with pytest.raises(BadInput, match="is the run that is to be reproduced; give another --out"):
            again(manifest, run)


def test_other_settings_show_at_the_first_layer_and_are_named(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["method"]["damp"] = 0.05
    (run / "manifest.json").write_text(json.dumps(manifest))
    result = again(run, run.parent / "again")
    first = manifest["layers"][0]["name"]
    assert result.first is not None
    assert result.first.startswith(f"layer {first}: ")
    assert 0 < result.files < len(manifest["artifact"]["files"])
    assert result.causes == ()  # the recipe is what the manifest says: it was made with another


def test_a_manifest_of_before_the_formats_own_files_were_hashed_is_taken(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    make(tmp_path / "run", tmp_path / "model", {"formats": ["gptq"]})
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["artifact"]["files"].pop("quantize_config.json")
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    assert verify(tmp_path / "run") == len(manifest["artifact"]["files"])
    assert again(tmp_path / "run", tmp_path / "again").first is None
    (tmp_path / "again" / "quantized" / "quantize_config.json").unlink()
    with pytest.raises(BadInput, match=r"quantize_config.json, which the manifest names, is absent"):
        verify(tmp_path / "again")


def test_another_version_is_a_likely_cause(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    manifest["machine"]["cpu"] = "abacus"
    weights = run / "quantized" / "model.safetensors"
    tensors = load_file(weights)
    name = sorted(n for n in tensors if n.endswith("weight_packed"))[1]
    tensors[name].view(-1)[0] ^= 1
    save_file(tensors, weights, metadata={"format": "pt"})
    manifest["artifact"]["files"]["model.safetensors"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    result = again(run, run.parent / "again")
    assert result.first == f"tensor {name}: 1 of {4 * tensors[name].numel()} bytes differ"
    assert [cause.partition(":")[0] for cause in result.causes] == ["torch", "cpu"]


def test_another_model_is_refused_before_the_work(run: Path) -> None:
    build("llama", run.parent / "other", torch.bfloat16, seed=1)
    with pytest.raises(BadInput, match=r"model.safetensors: .* give the right one with --model"):
        again(run, run.parent / "again", run.parent / "other")
    assert not (run.parent / "again").exists()


def test_a_hub_model_is_pinned_to_its_revision(run: Path) -> None:
    original = open_recorded(run)
    model = original.manifest.model.changed(kind="hub", id="org/name@main", revision="abc")
    original = replace(original, manifest=original.manifest.changed(model=model))
    assert original.model == "org/name@abc"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no such file"), ("[]", "not the manifest"), ("{", "cannot be read"), ("{}", "no 'recipe' in it")],
)
def test_what_is_no_manifest_is_refused(content: str | None, complaint: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "m.json").write_text(content)
    with pytest.raises(BadInput, match=complaint):
        open_recorded(tmp_path / "m.json")


def test_the_command(run: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["reproduce", str(run), "--out", str(run.parent / "again")])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1].startswith("reproduced: all ")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["artifact"]["files"]["config.json"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    command = ["reproduce", str(run), "--out", str(run.parent / "again"), "--json"]
    done = runner.invoke(app, [*command, "--overwrite"])
    assert done.exit_code == 1
    assert json.loads(done.output.splitlines()[-1])["first"] == "file config.json"
