"""Whole runs on tiny models: every family, resume after a kill, equal bytes, bad input that leaves nothing behind."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.artifact.artifact import Artifact, open_artifact
from quantpress.artifact.manifest import Manifest
from quantpress.calibrate import block_pass
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.engine import blocks, journal
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.exports.verify import structure
from quantpress.models import shards
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton
from quantpress.numbers.grid import Inputs
from quantpress.numbers.types import Activations
from quantpress.recipe import matches
from quantpress.recipe.loading import parse

from ...forked import commands
from ...multiplied import Multiplied
from ...tiny import FAMILIES, build, text

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "calibration": {"samples": 6, "seq_len": 32},
    "weights": {"bits": 4, "group_size": 32, "symmetric": False},
}


def make(folder: Path, model: Path, document: dict[str, Any], words: str = "", **settings: Any) -> Manifest:
    file = folder.parent / "calibration.txt"
    file.write_text(words or text())
    calibration = BASE["calibration"] | document.get("calibration", {}) | {"source": str(file)}
    recipe = parse(BASE | document | {"calibration": calibration, "model": str(model)})
    cache = folder.parent / "cache"
    return quantize(prepare(recipe, resolve(recipe.model, cache=cache)), Settings(folder, cache, **settings))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "qwen3_moe"])
def test_no_run_multiplies_16_bit_matrices_on_a_cpu_without_instructions_for_them(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    build(family, tmp_path / "model", torch.bfloat16)
    kind = {"formats": ["gptq"]} if family == "gpt2" else {"targets": ["vllm"]}
    with Multiplied() as seen:
        make(tmp_path / "out", tmp_path / "model", kind | {"method": {"name": "gptq"}})
    assert torch.float32 in seen.types
    assert seen.types.isdisjoint((torch.bfloat16, torch.float16))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, method: str, tmp_path: Path) -> None:
    build(family, tmp_path / "model", torch.bfloat16)
    formats = ["gptq" if family == "gpt2" else "compressed-tensors"]
    targets = [] if family == "gpt2" else ["vllm"]  # experts with zero points are for servers
    document = {"method": {"name": method}, "formats": formats, "targets": targets}
    manifest = make(tmp_path / "run", tmp_path / "model", document)
    original = Checkpoint(tmp_path / "model")
    shapes = [x.name for x in Skeleton(original, device=CPU).linears()]
    back, _ = open_artifact(tmp_path / "run" / "quantized", CPU)
    assert set(back.linears) == set(shapes)
    assert [layer.name for layer in manifest.layers] == shapes
    for name in original.names():
        before, after = original.read(name), back.read(name)
        assert after.shape == before.shape
        if name.removesuffix(".weight") in shapes:
            assert not torch.equal(after, before)
            assert ((after - before).float().norm() / before.float().norm()) < 0.2
        else:
            assert torch.equal(after, before)
    assert all(0 < layer.relative_error < 0.1 for layer in manifest.layers)


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    make(tmp_path / "a", tmp_path / "model", {})
    make(tmp_path / "b", tmp_path / "model", {})
    assert files(tmp_path / "a" / "quantized") == files(tmp_path / "b" / "quantized")


class Stop(Exception):
    pass


@pytest.mark.parametrize("seconds", [0, 60])
@pytest.mark.parametrize("when", [1, 2])
def test_resume_after_a_stop_gives_the_same_bytes(
    when: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hidden states that were kept, or where a run is too short for that, from the start."""
    monkeypatch.setattr(journal, "DUMP_SECONDS", seconds)
    monkeypatch.setattr(journal, "DUMP_SHARE", 1e9)
    build("gemma3", tmp_path / "model", torch.bfloat16)
    make(tmp_path / "whole", tmp_path / "model", {})

    def stop(progress: Any) -> None:
        if progress.block == when:
            raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "cut", tmp_path / "model", {}, on_block=stop)
    assert not (tmp_path / "cut" / "quantized").exists()
    assert len(list((tmp_path / "cut" / ".work").glob("hidden-*"))) == (not seconds)  # what the plan counts on disk
    with open(tmp_path / "cut" / ".work" / "journal.jsonl", "a") as lines:
        lines.write('{"record": {"block": 2, "half a li')  # as a kill in the middle of a write leaves it
    seen: list[int] = []
    begun: list[tuple[int, int]] = []
    follow = {"on_start": lambda *at: begun.append(at), "on_block": lambda p: seen.append(p.block)}
    make(tmp_path / "cut", tmp_path / "model", {}, **follow)
    assert begun == [(0 if seconds else when, 3)]
    assert seen == list(range(begun[0][0] + 1, 4))
    assert files(tmp_path / "cut" / "quantized") == files(tmp_path / "whole" / "quantized")


DATA_FREE = [
    ("llama", {"type": "mxfp8"}),
    ("mixtral", {"type": "fp8"}),
    ("gemma3", {"bits": 3, "group_size": 16, "symmetric": False, "scale_search": "mse"}),
    ("gpt2", {"bits": 4, "group_size": 32, "scale_search": "minmax"}),
]


@pytest.mark.parametrize(("family", "grid"), DATA_FREE)
def test_weights_read_as_they_are_rounded_give_the_same_bytes(
    family: str, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(family, tmp_path / "model", torch.bfloat16)
    formats = ["gptq" if family == "gpt2" else "compressed-tensors"]
    document = {"method": {"name": "rtn"}, "weights": grid, "formats": formats}
    make(tmp_path / "rows", tmp_path / "model", document)
    begin = blocks._Run.__init__

    def whole(run: Any, *given: Any) -> None:
        begin(run, *given)
        assert run._streams
        run._streams, run._codes = False, None

    monkeypatch.setattr(blocks._Run, "__init__", whole)
    make(tmp_path / "whole", tmp_path / "model", document)
    assert files(tmp_path / "rows" / "quantized") == files(tmp_path / "whole" / "quantized")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_artifact_of_shards_after_a_stop_at_any_of_them(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    rtn = {"method": {"name": "rtn"}, "weights": {"type": "fp8"}}
    joined = make(tmp_path / "joined", tmp_path / "model", rtn)
    monkeypatch.setattr(shards, "JOINED", 0)
    whole = make(tmp_path / "whole", tmp_path / "model", rtn)
    link, linked = os.link, [0]

    def stops(*places: Any) -> None:
        linked[0] += 1
        if linked[0] == at:
            raise Stop
        link(*places)

    monkeypatch.setattr(os, "link", stops)
    with pytest.raises(Stop):
        make(tmp_path / "cut", tmp_path / "model", rtn)
    assert not (tmp_path / "cut" / "quantized").exists()
    make(tmp_path / "cut", tmp_path / "model", rtn, on_block=lambda p: pytest.fail("it was finished"))
    assert files(tmp_path / "cut" / "quantized") == files(tmp_path / "whole" / "quantized")
    one, many = Checkpoint(tmp_path / "joined" / "quantized"), Checkpoint(tmp_path / "whole" / "quantized")
    assert sorted(one.names()) == sorted(many.names())
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names())
    assert joined.artifact.bytes == whole.artifact.bytes


def test_kill_9_and_resume_through_the_command_line(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    (tmp_path / "text.txt").write_text(text())
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"calibration: {{source: {tmp_path / 'text.txt'}, samples: 4, seq_len: 32}}\nweights: {{group_size: 32}}\n"
    )
    die = (
        "import os, signal, quantpress.engine.journal as j\n"
        "write, j.DUMP_SECONDS = j.Journal._write, 0\n"
        "def kill(self, *a):\n    write(self, *a)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "j.Journal._write = kill\n"
    )
    command = ["quantize", str(recipe), "--model", str(tmp_path / "model"), "--out"]
    cut, whole = [*command, str(tmp_path / "cut")], [*command, str(tmp_path / "whole")]
    done = commands(tmp_path, [(die, cut), ("", cut), ("", whole)])
    assert [one.returncode for one in done] == [-signal.SIGKILL, 0, 0], done
    assert files(tmp_path / "cut" / "quantized") == files(tmp_path / "whole" / "quantized")


def test_an_unfinished_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)

    def stop(progress: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "run", tmp_path / "model", {}, on_block=stop)
    with pytest.raises(BadInput, match=r"recipe.method.damp: null there, 0.05 now"):
        make(tmp_path / "run", tmp_path / "model", {"method": {"name": "gptq", "damp": 0.05}})


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_an_unfinished_run_of_other_libraries_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states depend on them, and those of the finished blocks are of the other version."""
    build("llama", tmp_path / "model", torch.bfloat16)

    def stop(progress: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "run", tmp_path / "model", {}, on_block=stop)
    now = machine.libraries()
    monkeypatch.setattr(machine, "libraries", lambda: now | {name: "0.1"})
    with pytest.raises(BadInput, match=rf'unfinished run .*{name}: "{re.escape(now[name])}" there, "0\.1" now'):
        make(tmp_path / "run", tmp_path / "model", {})


def test_a_finished_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    make(tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}})
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json")}
    with pytest.raises(BadInput, match=r"already holds a finished run .*recipe.weights.bits: 4 there, 8 now"):
        make(
            tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}, "weights": {"bits": 8, "group_size": 32}}
        )
    with pytest.raises(BadInput, match="4000 are asked for"):
        make(tmp_path / "run", tmp_path / "model", {"calibration": {"samples": 4000}}, overwrite=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json")}
    make(
        tmp_path / "run",
        tmp_path / "model",
        {"method": {"name": "rtn"}, "weights": {"bits": 8, "group_size": 32}},
        overwrite=True,
    )


def test_a_finished_run_of_the_same_recipe_is_used_as_it_is(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    manifest = make(tmp_path / "run", tmp_path / "model", {})
    before = files(tmp_path / "run" / "quantized")
    (tmp_path / "run" / ".work").mkdir()  # as a kill after the manifest leaves it
    notes: list[str] = []
    again = make(tmp_path / "run", tmp_path / "model", {"evaluation": None}, on_block=pytest.fail, on_note=notes.append)
    wanted = manifest.recipe | {"evaluation": None}  # what is not of the artifact is as it is asked for now
    assert again.document() == manifest.changed(recipe=wanted).document()
    assert "finished before" in notes[0]
    assert files(tmp_path / "run" / "quantized") == before
    assert not (tmp_path / "run" / ".work").exists()
    build("llama", tmp_path / "other", torch.bfloat16, seed=1)
    with pytest.raises(BadInput, match=r"finished run of something else \(model\.model\.safetensors"):
        make(tmp_path / "run", tmp_path / "other", {})
    with pytest.raises(BadInput, match=r"something else \(calibration: "):
        make(tmp_path / "run", tmp_path / "model", {}, words="another text. " * 999)
    (tmp_path / "run" / "quantized" / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="which the manifest names, has changed"):
        make(tmp_path / "run", tmp_path / "model", {})


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    (tmp_path / "text.txt").write_text(text())
    recipe = tmp_path / "r.yaml"
    words = tmp_path / "text.txt"
    recipe.write_text(
        f"calibration: {{source: {words}, samples: 4, seq_len: 32}}\nweights: {{group_size: 32}}\n"
        f"evaluation: {{source: {words}, windows: 2, window: 64}}\n"
    )
    stop = (
        "import signal, quantpress.engine.blocks as blocks, shutil\n"
        "import quantpress.eval.measure.divergence as divergence\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it\n"
        "def stop(*a, **k): signal.raise_signal(signal.SIGINT)\n"
    )
    command = ["run", str(recipe), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run")]
    kept = f"import shutil; shutil.copytree({str(tmp_path / 'run' / 'quantized')!r}, {str(tmp_path / 'before')!r})"
    steps = [f"{stop}blocks._block_tensors = stop", f"{stop}divergence.run_block = stop", kept]
    *interrupted, done = commands(tmp_path, [(code, command) for code in steps])
    for stopped in interrupted:
        assert stopped.returncode == 130
        last = stopped.stderr.splitlines()[-1]
        assert last == "quantpress: stopped; the same command continues from what is finished"
        assert "Traceback" not in stopped.stderr
    before = files(tmp_path / "before")
    assert done.returncode == 0, done.stderr
    assert "finished before" in done.stderr
    after = files(tmp_path / "run" / "quantized")
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"README.md", "quality.png"}  # the card
    assert (tmp_path / "run" / "report" / "index.html").is_file()


def test_both_formats_hold_the_same_weights(tmp_path: Path) -> None:
    build("qwen3", tmp_path / "model", torch.bfloat16)
    make(tmp_path / "run", tmp_path / "model", {"formats": ["compressed-tensors", "gptq"]})
    one, two = (Artifact(tmp_path / "run" / f) for f in ("quantized", "converted/gptq"))
    assert set(one.linears) == set(two.linears)
    for name in one.linears:
        assert torch.equal(one.read(f"{name}.weight"), two.read(f"{name}.weight"))


def test_overrides_and_ignore_are_kept(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    document = {"overrides": [{"match": "*.down_proj", "bits": 8}], "ignore": ["model.layers.0.*"]}
    manifest = make(tmp_path / "run", tmp_path / "model", document)
    schemes = {layer.name: layer.scheme for layer in manifest.layers}
    assert schemes["model.layers.0.self_attn.q_proj"] == "16 bit"
    assert schemes["model.layers.1.mlp.down_proj"] == "int8 g32 asym"
    assert schemes["model.layers.1.mlp.up_proj"] == "int4 g32 asym"


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    shard = tmp_path / "model" / "model.safetensors"
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, shard, metadata={"format": "pt"})
    make(tmp_path / "run", tmp_path / "model", {})
    artifact = Checkpoint(tmp_path / "run" / "quantized")
    assert "lm_head.weight" not in artifact
    assert artifact.config["tie_word_embeddings"] is True


def test_experts_that_saw_few_tokens_are_reported(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path / "model", torch.bfloat16)
    few = {"samples": 1, "seq_len": 16}
    manifest = make(tmp_path / "run", tmp_path / "model", {"calibration": few, "targets": ["vllm"]})
    assert any("experts" in line and "fewer than" in line for line in manifest.fallbacks)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_expert_that_saw_no_token_has_another_ones_input_scale(method: str, tmp_path: Path) -> None:
    model = build("qwen3_moe", tmp_path / "model", torch.bfloat16)
    model.get_input_embeddings().weight.data[:] = model.get_input_embeddings().weight[5]  # all go to the same experts
    model.save_pretrained(tmp_path / "model")
    numbers = {"weights": {"type": "fp8", "group_size": 0}, "activations": {"type": "fp8", "dynamic": False}}
    document = numbers | {"method": {"name": method}}
    layers = make(tmp_path / "run", tmp_path / "model", document).layers
    artifact = Checkpoint(tmp_path / "run" / "quantized")
    unreached = [x.name for x in layers if x.tokens == 0]
    assert unreached
    for name in unreached:
        where, _, inside = name.rpartition(".experts.")
        others = [x.name for x in layers if x.name.startswith(where + ".experts.") and x.tokens]
        alike = [other for other in others if other.endswith(inside.partition(".")[2])]
        widest = max(float(artifact.read(f"{other}.input_scale")) for other in alike)
        assert float(artifact.read(f"{name}.input_scale")) == widest > 1e-6
        note = next(x.note for x in layers if x.name == name)
        assert note.endswith("static input scale taken from the other experts: the widest")


def test_inputs_that_no_static_range_fits_have_dynamic_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One linear of each block; the folder is read, and found right, as the config says."""
    chosen = block_pass.static_int8

    def unfit(spec: Activations, x: torch.Tensor, low: float, high: float) -> tuple[Inputs, float]:
        best, lost = chosen(spec, x, low, high)
        return best, 0.93 if x.shape[-1] == 96 else lost

    monkeypatch.setattr(block_pass, "static_int8", unfit)
    build("llama", tmp_path / "model", torch.bfloat16)
    document = {"method": {"name": "rtn"}, "weights": {"bits": 8, "group_size": -1}} | {
        "activations": {"type": "int8", "dynamic": False}
    }
    layers = make(tmp_path / "run", tmp_path / "model", document).layers
    artifact = Artifact(tmp_path / "run" / "quantized")
    down = {f"model.layers.{k}.mlp.down_proj" for k in (0, 1)}
    assert {x.name for x in layers if x.dynamic} == artifact.dynamic == down
    assert all("one token loses 93% of its norm; they have dynamic scales" in x.note for x in layers if x.dynamic)
    held = {name: artifact.inputs(name) for name in artifact.linears}
    assert {name for name, inputs in held.items() if inputs is not None and inputs.scale is None} == down
    assert not [name for name in artifact.names() if name.endswith("down_proj.input_scale")]
    assert structure(tmp_path / "run" / "quantized") == []


def test_a_singular_hessian_is_damped_more_and_reported(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    document = {"method": {"name": "gptq", "damp": 1e-9}, "calibration": {"samples": 1, "seq_len": 8}}
    fallbacks = make(tmp_path / "run", tmp_path / "model", document).fallbacks
    assert [line for line in fallbacks if "q_proj: singular Hessian: damping raised from 1e-09 to" in line]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_weight_of_zeros_is_no_damage(method: str, tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file, {"format": "pt"})
    make(tmp_path / "run", tmp_path / "model", {"method": {"name": method}})
    assert structure(tmp_path / "run" / "quantized") == []


def test_an_expert_of_zeros_is_not_unlike_the_others(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path / "model", torch.bfloat16)
    file, expert = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.experts.1."
    tensors = {n: torch.zeros_like(t) if n.startswith(expert) else t for n, t in load_file(file).items()}
    assert [n for n in tensors if n.startswith(expert)]
    save_file(tensors, file, {"format": "pt"})
    make(tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}, "targets": ["vllm"]})
    assert structure(tmp_path / "run" / "quantized") == []


def test_the_gate_of_a_shared_expert_stays_as_it_is(tmp_path: Path) -> None:
    build("qwen2_moe", tmp_path / "model", torch.bfloat16)
    make(tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}, "targets": ["vllm"]})
    name, artifact = "model.layers.0.mlp.shared_expert_gate", Checkpoint(tmp_path / "run" / "quantized")
    assert torch.equal(artifact.read(f"{name}.weight"), Checkpoint(tmp_path / "model").read(f"{name}.weight"))
    assert any(matches(pattern, name) for pattern in artifact.config["quantization_config"]["ignore"])


def test_routers_and_head_are_named_as_ignored(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path / "model", torch.bfloat16)
    make(tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}, "targets": ["vllm"]})
    ignore = Checkpoint(tmp_path / "run" / "quantized").config["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} <= {
        name
        for name in ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
        if any(matches(pattern, name) for pattern in ignore)
    }


@pytest.mark.parametrize(
    ("algorithm", "document"),
    [
        ("FP8", {"weights": {"type": "fp8", "group_size": 0}, "activations": {"type": "fp8", "dynamic": False}}),
        ("FP8_PER_CHANNEL_PER_TOKEN", {"weights": {"type": "fp8"}, "activations": {"type": "fp8"}}),
        ("NVFP4", {"weights": {"type": "nvfp4"}, "activations": {"type": "nvfp4"}}),
        ("W4A16_NVFP4", {"weights": {"type": "nvfp4"}}),
        ("W4A16_AWQ", {"weights": {"bits": 4, "group_size": 64}, "ignore": ["*.down_proj"]}),
        ("W8A16", {"weights": {"bits": 8, "group_size": -1}}),
    ],
)
def test_modelopt_checkpoints(algorithm: str, document: dict[str, Any], tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    manifest = make(
        tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}} | {"formats": ["modelopt"]} | document
    )
    out, original = tmp_path / "run" / "quantized", Checkpoint(tmp_path / "model")
    stated = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert stated["quant_algo"] == algorithm
    assert ("model.layers.1.mlp.down_proj" in stated["exclude_modules"]) == ("ignore" in document)
    assert "lm_head" in stated["exclude_modules"]
    back, _ = open_artifact(out, CPU)
    assert len(back.linears) == (12 if "ignore" in document else 14)
    for name in back.linears:
        before, after = original.read(f"{name}.weight").float(), back.read(f"{name}.weight").float()
        assert 0 < (after - before).norm() / before.norm() < 0.15
        assert (back.inputs(name) is None) == (document.get("activations") is None)
    if algorithm in ("FP8", "NVFP4"):  # what servers fuse has one scale
        parts = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
        inputs = [back.checkpoint.read(f"{part}.input_scale").item() for part in parts]
        kind = "weight_scale" if algorithm == "FP8" else "weight_scale_2"
        assert len({*inputs}) == len({back.checkpoint.read(f"{part}.{kind}").item() for part in parts}) == 1
        assert inputs[0] > 0
    assert manifest.artifact.format == "modelopt"
    assert 4 <= manifest.artifact.quantized_bits_per_weight < 9
