"""A budget for the artifact: within its bytes, one format for what servers fuse, read back by transformers."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantpress import api
from quantpress.calibrate.budget import assign
from quantpress.core.errors import BadInput
from quantpress.engine.huggingface_folder import HuggingFaceFolder
from quantpress.engine.job import prepare
from quantpress.engine.sources import resolve
from quantpress.exports.contracts import check_job
from quantpress.recipe.loading import parse

from ...tiny import build
from .test_outer import logits
from .test_pipeline import make

MENU = [{"bits": 3, "group_size": 16}, {"bits": 8, "group_size": 16}, {"type": "nvfp4"}, None]
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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budget": {"bits": 2.0, "menu": MENU}}, r"smallest number formats of the menu take \d+ \(4\.\d\d bits"),
        ({"budget": {"bits": 5, "bytes": 10}}, "give one of bytes and bits"),
        ({"budget": {"bits": 5}, "weights": {"bits": 8}}, "weights beside budget"),
        ({"budget": {"bits": 5}, "formats": ["gptq"]}, "only compressed-tensors holds"),
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


def test_shapes_are_checked_with_every_format_of_the_menu(model: Path) -> None:
    """vLLM splits packed zeros at whole words: 3 bits of 16 outputs on each of 4 GPUs are none."""
    menu = [{"bits": 4, "group_size": 16}, {"bits": 3, "group_size": 32, "symmetric": False}]
    target = {"name": "vllm", "tensor_parallel": 2}
    with pytest.raises(BadInput, match=r"vLLM"):
        check_job(job(model, budget={"bits": 5, "menu": menu}, targets=[target]))
