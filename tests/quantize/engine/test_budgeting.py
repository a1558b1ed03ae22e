"""A budget for the artifact: within its bytes, one format for what servers fuse, read back by transformers."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantpress import api
from quantpress.artifact.artifact import Artifact
from quantpress.artifact.convert import convert
from quantpress.calibrate import budget
from quantpress.calibrate.budget import assign
from quantpress.core.errors import BadInput
from quantpress.engine import budgeting
from quantpress.engine.budgeting import Menu
from quantpress.engine.huggingface_folder import HuggingFaceFolder
from quantpress.engine.job import prepare
from quantpress.engine.sources import resolve
from quantpress.exports.contracts import check_job
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.placed_model import LinearLayer
from quantpress.numbers.types import Activations, Grid
from quantpress.recipe.loading import parse

from ...tiny import build
from .test_outer import logits
from .test_pipeline import make

MENU = [{"bits": 3, "group_size": 16}, {"bits": 8, "group_size": 16}, {"type": "nvfp4"}, None]
FLOATS: list[dict[str, Any] | None] = [{"type": "nvfp4"}, {"type": "fp8", "group_size": 0}, None]
_ALIKE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def test_the_choice_is_the_best_of_all_and_fits() -> None:
    draw = torch.Generator().manual_seed(0)
    names, options = [f"l{i}" for i in range(5)], ["a", "b", "c"]
    costs = {n: dict(zip(options, torch.rand(3, generator=draw).tolist(), strict=True)) for n in names}
    sizes = {
        n: dict(zip(options, torch.randint(10**9, 4 * 10**9, (3,), generator=draw).tolist(), strict=True))
        for n in names
    }
    for room in (7 * 10**9, 11 * 10**9 + 1, 10**12):
        every = [dict(zip(names, picked, strict=True)) for picked in itertools.product(options, repeat=5)]
        fits = [one for one in every if sum(sizes[n][o] for n, o in one.items()) <= room]
        if not fits:
            with pytest.raises(ValueError, match="do not fit"):
                assign(costs, sizes, room)
            continue
        got = assign(costs, sizes, room)
        assert sum(sizes[n][o] for n, o in got.items()) <= room
        best = min(sum(costs[n][o] for n, o in one.items()) for one in fits)
        assert sum(costs[n][o] for n, o in got.items()) == pytest.approx(best)


def test_the_solver_says_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS now and then writes a line of its own to the process's standard output, where our JSON goes."""
    solve = budget.milp

    def talking(*args: Any, **keys: Any) -> Any:
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution")
        return solve(*args, **keys)

    monkeypatch.setattr(budget, "milp", talking)
    assert budget.assign({"l": {"a": 1.0, "b": 0.5}}, {"l": {"a": 1, "b": 3}}, 2) == {"l": "a"}
    os.write(1, b"ours")
    assert capfd.readouterr().out == "ours"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_budget_is_kept_and_read_back(family: str, tmp_path: Path) -> None:
    build(family, tmp_path / "model")
    recipe: dict[str, Any] = {"weights": {}, "budget": {"bits": 5.5, "menu": MENU}, "method": "gptq"}
    if family == "qwen3_moe":
        recipe["budget"]["menu"] = [grid for grid in MENU if grid != {"type": "nvfp4"}]  # transformers drops its scales
    recipe["weights"] = parse({}).weights.model_dump(mode="json")
    manifest = make(tmp_path / "run", tmp_path / "model", recipe)
    bits = manifest.artifact.quantized_bits_per_weight
    schemes = {layer.name: layer.scheme for layer in manifest.layers}
    assert len(set(schemes.values())) > 1
    planned = api.plan(recipe | {"calibration": {"samples": 6, "seq_len": 32}}, str(tmp_path / "model")).plan
    assert manifest.artifact.bytes <= planned.artifact_bytes
    assert "16 bit" in schemes.values() or bits <= 5.5
    for name, fused in itertools.product(schemes, _ALIKE):
        if name.endswith(fused[0]):
            assert len({schemes[name.removesuffix(fused[0]) + part] for part in fused}) == 1
    for block in {name.partition(".experts.")[0] for name in schemes if ".experts." in name}:
        assert len({scheme for name, scheme in schemes.items() if name.startswith(f"{block}.experts.")}) == 1
    folder, ids = tmp_path / "run" / "quantized", torch.arange(24)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # as it unpacks nvfp4
    found, ours = theirs(ids).logits[0].detach().float(), logits(folder, ids)
    assert (found - ours).abs().max() < 0.03 * ours.abs().max()
    assert api.verify(folder).sound
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == len(set(schemes.values()) - {"16 bit"})


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_the_scales_of_the_cache_are_within_the_budget(model: Path, format: str, tmp_path: Path) -> None:
    text = {"calibration": {"samples": 6, "seq_len": 32}}
    recipe: dict[str, Any] = {"kv_cache": "fp8", "formats": [format], "weights": {"type": "nvfp4"}}
    manifest = make(tmp_path / "one", model, recipe)
    assert api.plan(recipe | text, str(model)).plan.artifact_bytes == manifest.artifact.bytes
    room = (manifest.artifact.bytes or 0) + 4001
    recipe |= {"weights": parse({}).weights.model_dump(mode="json"), "budget": {"bytes": room, "menu": FLOATS}}
    recipe |= {"activations": {"type": "as-weights"}}
    found, folder = make(tmp_path / "two", model, recipe), tmp_path / "two" / "quantized"
    assert room - 4000 < (found.artifact.bytes or 0) <= room == api.plan(recipe | text, str(model)).plan.artifact_bytes
    assert len({layer.scheme for layer in found.layers}) > 1
    assert Artifact(folder).kv_cache == "fp8"
    assert api.verify(folder).sound


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_inputs_of_the_type_of_the_weights(model: Path, format: str, tmp_path: Path) -> None:
    """NVFP4 and FP8 in one artifact, each with inputs of its own kind, read back and converted to the other format."""
    recipe: dict[str, Any] = {"budget": {"bits": 6.0, "menu": FLOATS}, "activations": {"type": "as-weights"}}
    recipe |= {"formats": [format], "weights": parse({}).weights.model_dump(mode="json")}
    manifest, folder = make(tmp_path / "run", model, recipe), tmp_path / "run" / "quantized"
    planned = api.plan(recipe | {"calibration": {"samples": 6, "seq_len": 32}}, str(model)).plan
    assert manifest.artifact.bytes <= planned.artifact_bytes
    artifact = Artifact(folder)
    found = {name: (grid.type, artifact.inputs(name)) for name, grid in artifact.linears.items()}
    assert {kind for kind, _ in found.values()} == {"nvfp4", "fp8"}
    for kind, inputs in found.values():
        assert inputs is not None
        assert inputs.spec == Activations(type=kind, dynamic=kind == "nvfp4")  # type: ignore[arg-type]
        assert inputs.scale is not None
    assert api.verify(folder).sound
    other = tmp_path / "other"
    convert(folder, other, "modelopt" if format == "compressed-tensors" else "compressed-tensors")
    ids = torch.arange(24)[None]
    assert torch.equal(logits(folder, ids), logits(other, ids))


def test_as_weights_in_all_layers_of_one_type_is_that_type(model: Path, tmp_path: Path) -> None:
    weights = {"weights": {"type": "nvfp4"}, "method": "rtn"}
    for name in ("as-weights", "nvfp4"):
        make(tmp_path / name, model, weights | {"activations": {"type": name}})
    files = [(tmp_path / name / "quantized" / "model.safetensors").read_bytes() for name in ("as-weights", "nvfp4")]
    assert files[0] == files[1]
    assert api.verify(tmp_path / "as-weights" / "quantized").sound


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget") / "model"
    build("qwen3", folder)
    return folder


def job(model: Path, **keys: Any) -> Any:
    return prepare(parse({"model": str(model)} | keys), resolve(str(model), cache=model))


def test_bytes_are_of_the_whole_artifact(model: Path) -> None:
    """What the menu may take and what it cannot change make the budget."""
    made = job(model, budget={"bytes": 200_000, "menu": MENU})
    assert isinstance(made.backend, HuggingFaceFolder)
    assert made.plan.artifact_bytes == 200_000
    integers = {"bytes": 200_000, "menu": [*MENU[:2], None]}
    made, smaller = job(model, budget=integers), job(model, budget=integers, head={"bits": 8, "group_size": -1})
    assert smaller.plan.artifact_bytes == 200_000
    assert smaller.backend.menu.room - made.backend.menu.room == smaller.backend.outer.saved_bytes(smaller.skeleton)


def test_a_budget_above_all_of_the_menu_is_not_what_the_artifact_takes(model: Path, tmp_path: Path) -> None:
    """The plan said the budget's own size."""
    menu = [{"bits": 4, "group_size": 16}, {"bits": 8, "group_size": 16}]
    made = job(model, budget={"bytes": "1GiB", "menu": menu})
    assert isinstance(made.backend, HuggingFaceFolder)
    whole = job(model, weights=menu[1], head=None)
    assert made.plan.artifact_bytes == whole.plan.artifact_bytes


def test_the_head_is_on_the_menu_of_a_budget_in_bytes(model: Path, tmp_path: Path) -> None:
    """Where the targets load it: with 8 bits, its default, and in what it is given it is read back."""
    channel, menu = Grid(bits=8, group_size=-1), [{"bits": 4, "group_size": 32}, {"bits": 6, "group_size": 32}, None]
    keys = {"targets": ["vllm"], "method": "gptq", "weights": parse({}).weights.model_dump(mode="json")}
    whole = Checkpoint(model).total_bytes
    chosen = {}
    for share in (0.5, 0.95):
        recipe = keys | {"budget": {"bytes": int(share * whole), "menu": menu}}
        made = make(tmp_path / f"{share}", model, recipe)
        assert made.artifact.bytes <= int(share * whole)
        assert api.verify(tmp_path / f"{share}" / "quantized").sound
        chosen[share] = made.outside.get("lm_head", "16 bit")
    planned = job(model, **recipe)
    grids = [Grid.model_validate(grid) for grid in menu if grid is not None]
    assert list(planned.backend.menu.sizes["lm_head"]) == [channel, *grids, None]
    assert planned.plan.artifact_bytes == int(0.95 * whole)
    assert chosen[0.5] in map(str, (channel, *grids))
    assert chosen[0.95] == "16 bit"
    for settled in ({"head": None}, {"budget": {"bits": 8, "menu": menu}}):
        assert "lm_head" not in job(model, **recipe | settled).backend.menu.sizes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budget": {"bits": 2.0, "menu": MENU}}, r"smallest number formats of the menu take \d+ \(4\.\d\d bits"),
        ({"budget": {"bits": 32, "menu": MENU}}, "32 bits hold all linears in 16 bit, and nothing would be quantized"),
        ({"budget": {"bits": 5, "bytes": 10}}, "give one of bytes and bits"),
        ({"budget": {"bits": 5}, "weights": {"bits": 8}}, "weights beside budget"),
        ({"budget": {"bits": 5}, "formats": ["gptq"]}, "which compressed-tensors and modelopt hold"),
        ({"budget": {"bits": 5}, "activations": {"type": "fp8"}}, "activations of type fp8 beside budget"),
        ({"budget": {"bits": 5}, "activations": {"type": "as-weights"}}, "as-weights go with fp8 and nvfp4"),
        ({"budget": {"bits": 5}, "formats": ["gguf"]}, "gguf.budget"),
        (
            {"budget": {"bits": 5, "menu": [{"bits": 3, "group_size": 32}, None]}, "targets": ["tgi"]},
            "TGI does not take",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(model: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        job(model, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"formats": ["modelopt"], "activations": {"type": "as-weights"}}, "SGLang reads no such mixture"),
        ({}, "SGLang fuses .* and does not find it by name"),
    ],
)
def test_a_server_that_takes_no_mixture_is_refused(model: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_job(job(model, budget={"bits": 6, "menu": FLOATS}, targets=["sglang"], **keys))


def test_shapes_are_checked_with_every_format_of_the_menu(model: Path) -> None:
    """vLLM splits packed zeros at whole words: 3 bits of 16 outputs on each of 4 GPUs are none."""
    menu = [{"bits": 4, "group_size": 16}, {"bits": 3, "group_size": 32, "symmetric": False}]
    target = {"name": "vllm", "tensor_parallel": 2}
    with pytest.raises(BadInput, match=r"vLLM"):
        check_job(job(model, budget={"bits": 5, "menu": menu}, targets=[target]))


@pytest.mark.parametrize(
    ("last", "room", "wanted"),
    [
        (2.2, 80, [4, 4, 4, 4]),  # 4.8, and 3, 4, 3 and 6 bits are foretold 4.32: nine tenths
        (3.0, 80, [3, 4, 3, 6]),  # 4.4 for 5.6
        (2.2, 70, [4, 3, 3, 4]),  # 6.4: first and last block in more; another pair would be 6.3
        (2.2, 75, [4, 4, 3, 4]),  # what that leaves is spent
    ],
)
def test_a_plain_choice_stays_unless_another_is_clearly_better(
    last: float, room: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four blocks of a group each, in 3, 4 or 6 bits of 15, 20 or 30 bytes; in the last one errors cost most."""
    grids = {bits: Grid(bits=bits, group_size=32) for bits in (3, 4, 6)}
    weigh = {"b.0": 1.0, "b.1": 1.1, "b.2": 0.5, "b.3": last}
    costs = {name: {grids[k]: weight * cost for k, cost in {3: 2.0, 4: 1.0, 6: 0.1}.items()}
             for name, weight in weigh.items()}  # fmt: skip
    members = {f"b.{k}": [LinearLayer(f"b.{k}", "b", k, 4, 4, transposed=False)] for k in range(4)}
    sizes = {name: {grid: 5 * bits for bits, grid in grids.items()} for name in members}
    monkeypatch.setattr(budgeting, "_costs", lambda group, *_: costs[group[0].name])
    chosen = Menu(sizes, members, room).choose({}, lambda name: torch.empty(0))
    assert [grid and grid.bits for grid in chosen.values()] == wanted
