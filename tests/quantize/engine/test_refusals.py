"""What cannot be done is refused in one line before the work, and the plan knows what a run takes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.api import plan
from quantpress.artifact.config_only import headers_of_config
from quantpress.core.errors import BadInput
from quantpress.engine import journal
from quantpress.engine.pipeline import prepare
from quantpress.engine.sources import resolve
from quantpress.exports.verify import structure
from quantpress.recipe.loading import parse

from ... import families
from ...forked import commands
from ...tiny import build, text
from .test_pipeline import BASE, make


def test_conv1d_is_refused_for_compressed_tensors(tmp_path: Path) -> None:
    build("gpt2", tmp_path / "model", torch.bfloat16)
    with pytest.raises(BadInput, match="is a Conv1D"):
        make(tmp_path / "run", tmp_path / "model", {})


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_that_cannot_run_is_refused_whatever_runs_it_first(method: str, tmp_path: Path) -> None:
    """Its last block takes keys and values of an earlier one of its kind, of which there is none."""
    kinds = [*["sliding_attention"] * 3, "full_attention"]
    config = families.config_of("gemma4_text", layer_types=kinds, num_hidden_layers=4)
    try:
        families.save(config, tmp_path / "model")
    except ValueError:  # transformers from 5.24 on does not build it
        config.save_pretrained(tmp_path / "model")
        with pytest.raises(BadInput, match="layer types"):
            headers_of_config(tmp_path / "model" / "config.json")
        return
    with pytest.raises(BadInput, match=r"gemma4_text model does not run with this config\.json: KeyError"):
        make(tmp_path / "run", tmp_path / "model", {"method": method})


def spoil(folder: Path, how: str) -> None:
    shard = folder / "model.safetensors"
    if how == "nan":
        tensors = load_file(shard)
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})
    elif how == "shape":
        tensors = load_file(shard)
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:10].clone()
        save_file(tensors, shard, metadata={"format": "pt"})
    elif how == "vocabulary":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "quantized":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "aqlm"}}))
    elif how == "no config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("how", "document", "message"),
    [
        ("nan", {}, "model.layers.1.mlp.up_proj.weight holds NaN"),
        ("shape", {}, r"layers.1.mlp.up_proj.weight: shape \[10, 64\] on disk, \[96, 64\] by config.json"),
        ("vocabulary", {}, r"embed_tokens.weight: shape \[256, 64\] on disk, \[100, 64\] by config.json"),
        ("truncated", {}, "model.safetensors: truncated"),
        ("quantized", {}, "quantized with 'aqlm', which cannot be dequantized here"),
        ("no config", {}, "config.json"),
        (
            "",
            {"weights": {"group_size": 40}},
            "not a multiple of group_size 40; choose 8, 16, 32, 64, -1",
        ),
        ("", {"ignore": ["*.q_prj"]}, "matches no linear layer; the nearest names are .*q_proj"),
        ("", {"calibration": {"samples": 4000}}, "sequences of 32 tokens, 4000 are asked for"),
        ("", {"calibration": {"seq_len": 4000}}, "more than the model's 128 positions"),
        ("", {"calibration": {"chat_template": True}}, "no chat template"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    how: str, document: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    spoil(tmp_path / "model", how)
    with pytest.raises(BadInput, match=message) as caught:
        make(tmp_path / "run", tmp_path / "model", document)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_config_that_says_it_is_not_quantized_is_believed(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    make(tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}})
    made = json.loads((tmp_path / "run" / "quantized" / "config.json").read_text())
    assert made["quantization_config"]["quant_method"] == "compressed-tensors"


def test_a_plan_that_says_ok_has_opened_the_tokenizer(tmp_path: Path) -> None:
    """And says that code of a family which transformers has is not run."""
    build("llama", tmp_path / "model", torch.bfloat16)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    recipe = {"method": {"name": "rtn"}, "weights": {"group_size": 32}}
    notes = plan(recipe, str(tmp_path / "model")).plan.notes
    assert notes == ("the checkpoint's own code (auto_map) is not run, but transformers' class for llama",)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="no tokenizer that can be read"):
        plan(recipe, str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("generation_config.json", "[]", "expected a JSON object, found list"),
        ("generation_config.json", "{no", "not readable as JSON"),
        ("chat_template.jinja", "{% for m in %}", "the chat template is broken: .*; mend or remove it"),
    ],
)
def test_a_plan_that_says_ok_has_read_what_goes_with_the_weights(
    file: str, content: str, said: str, tmp_path: Path
) -> None:
    build("llama", tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(BadInput, match=said):
        plan({"method": {"name": "rtn"}, "weights": {"group_size": 32}}, str(tmp_path))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('give a language') }}", "refuses a plain user's message: give a language"),
        ("{{ bos_token }}", "drops what a user says"),
    ],
)
def test_a_template_that_wants_more_than_a_plain_message_is_noted(template: str, said: str, tmp_path: Path) -> None:
    """As TranslateGemma's, which wants the languages; the artifact's is the original's, and no damage."""
    build("llama", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    forecast = plan({"method": {"name": "rtn"}, "weights": {"group_size": 32}}, str(tmp_path / "model"))
    assert f"the chat template {said}" in forecast.servability
    make(tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}})
    assert structure(tmp_path / "run" / "quantized") == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "no class of that name is for model_type 'llama'; correct it"),
        ({"eos_token_id": 99999}, "eos_token_id 99999, and the embedding has 256 rows; correct it"),
    ],
)
def test_a_plan_that_says_ok_has_read_what_the_config_says(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    build("llama", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    with pytest.raises(BadInput, match=said):
        plan({"method": {"name": "rtn"}, "weights": {"group_size": 32}}, str(tmp_path))


def test_activations_and_weights_that_overflow_are_named(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.float16)
    shard = tmp_path / "model" / "model.safetensors"
    tensors = load_file(shard)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 3e4  # their product leaves float16
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"layers.1.mlp.down_proj: its inputs hold NaN or inf; try bfloat16"):
        make(tmp_path / "run", tmp_path / "model", {})
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.full((64, 96), 6e4, dtype=torch.float16)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 100
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="activations that leave block 0 hold NaN or inf"):
        make(tmp_path / "block", tmp_path / "model", {})
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.full((96, 64), 1e30)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"layers.1.mlp.up_proj.weight holds 1e\+30, and more than 65504 cannot be held"):
        make(tmp_path / "again", tmp_path / "model", {"method": {"name": "rtn"}})


def test_the_command_line_refuses_before_the_work_in_one_line(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    build("llama", tmp_path / "mute", torch.bfloat16)
    for file in (tmp_path / "mute").glob("tokenizer*"):
        file.unlink()
    (tmp_path / "text.txt").write_text(text())
    (tmp_path / "short.txt").write_text("short")
    sets = {"calibration.source": tmp_path / "text.txt", "evaluation.source": tmp_path / "text.txt"}
    sets |= {"calibration.samples": 4, "calibration.seq_len": 32, "evaluation.window": 64, "evaluation.windows": 2}
    sets |= {"weights.group_size": 32}
    cases = (
        ("model", {"evaluation.source": tmp_path / "short.txt"}, "evaluation text short.txt gives 0 windows"),
        ("model", {"evaluation.source": tmp_path / "none.txt"}, "none.txt: no such file"),
        ("mute", {}, "no tokenizer; copy the original's tokenizer files there"),
    )
    steps = []
    for i, (model, change, _) in enumerate(cases):
        chosen = [f"--set={key}={value}" for key, value in (sets | change).items()]
        steps.append(("", ["run", "--model", str(tmp_path / model), "--out", str(tmp_path / f"run-{i}"), *chosen]))
    for (_, _, words), done in zip(cases, commands(tmp_path, steps), strict=True):
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("run-*"))


def test_too_little_disk_by_the_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BadInput, match=r"needs .* on disk and .* has 1.00 kB free; free some, give another --out"):
        make(tmp_path / "run", tmp_path / "model", {})
    assert not (tmp_path / "run").exists()


def test_too_little_memory_by_the_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    monkeypatch.setattr("quantpress.core.machine.available_memory_bytes", lambda: 10_000_000)
    with pytest.raises(BadInput, match=r"needs .* of memory and 10.0 MB are free"):
        make(tmp_path / "run", tmp_path / "model", {})
    make(tmp_path / "run", tmp_path / "model", {}, ignore_limits=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"weights": {"bits": 8, "group_size": -1}, "activations": {"type": "int8", "dynamic": False}},
        {"weights": {"bits": 4, "group_size": 32}, "activations": {"type": "int8"}},
        {"weights": {"type": "fp8", "group_size": 0}, "activations": {"type": "fp8", "dynamic": False}},
        {"weights": {"type": "mxfp8"}},
        {"weights": {"type": "nvfp4"}, "activations": {"type": "nvfp4"}},
    ],
    ids=str,
)
def test_the_plan_knows_the_bytes(numbers: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    build("phi3", tmp_path / "model", dtype)
    document = {"method": {"name": "rtn"}} | numbers
    recipe = parse(BASE | {"model": str(tmp_path / "model")} | document)
    job = prepare(recipe, resolve(recipe.model, cache=tmp_path / "cache"))
    manifest = make(tmp_path / "run", tmp_path / "model", document)
    assert job.plan.artifact_bytes == manifest.artifact.bytes
    shutil.rmtree(tmp_path / "run")


def test_the_plan_knows_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies under `out` is never more than the plan says, and not much less at its most."""
    monkeypatch.setattr(journal, "DUMP_SECONDS", 0)  # as in a run that takes long
    monkeypatch.setattr(journal, "DUMP_SHARE", 1e9)
    build("gemma3", tmp_path / "model", torch.bfloat16)
    calibration = BASE["calibration"] | {"samples": 60}
    recipe = parse(BASE | {"model": str(tmp_path / "model"), "calibration": calibration})
    job = prepare(recipe, resolve(recipe.model, cache=tmp_path / "cache"))
    held = []

    def measure(*_: Any) -> None:
        held.append(sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()))

    make(tmp_path / "run", tmp_path / "model", {"calibration": {"samples": 60}}, on_block=measure)
    assert job.plan.disk_bytes / 3 < max(held) <= job.plan.disk_bytes
