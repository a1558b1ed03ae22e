"""Block tuning: every family, resume, and the guarantee that a block never ends worse than it started."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantpress.artifact.artifact import open_artifact
from quantpress.artifact.manifest import LayerRecord
from quantpress.engine import journal, tuning
from quantpress.engine.block_weights import place, weight_of
from quantpress.engine.pipeline import prepare
from quantpress.engine.plan import Plan
from quantpress.engine.sources import resolve
from quantpress.engine.tuning import Passes, Tuning, batches
from quantpress.methods.rtn import rtn
from quantpress.models.block_arguments import BlockArguments
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.placed_model import LinearLayer
from quantpress.models.skeleton import Skeleton, run_block
from quantpress.numbers.grid import Grid, QuantizedLinear
from quantpress.recipe import AutoRound, Qat, Rtn
from quantpress.recipe.loading import parse

from ...tiny import FAMILIES, build
from .test_pipeline import CPU, Stop, files, make

QUICK: dict[str, dict[str, Any]] = {
    "autoround": {"name": "autoround", "steps": 16, "batch_size": 2, "lr": 0.04},
    "qat": {"name": "qat", "steps": 16, "batch_size": 2},
}


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, method: str, tmp_path: Path) -> None:
    build(family, tmp_path / "model", torch.bfloat16)
    formats = ["gptq" if family == "gpt2" else "compressed-tensors"]
    document = {"formats": formats, "targets": [] if family == "gpt2" else ["vllm"]}
    manifest = make(tmp_path / "run", tmp_path / "model", {"method": QUICK[method] | {"steps": 6}} | document)
    back, _ = open_artifact(tmp_path / "run" / "quantized", CPU)
    original = Checkpoint(tmp_path / "model")
    for layer in manifest.layers:
        assert layer.tuning["loss_after"] <= layer.tuning["loss_before"]
        assert 0 < layer.relative_error < 0.1
        before, after = (x.read(f"{layer.name}.weight").float() for x in (original, back))
        assert 0 < (after - before).norm() / before.norm() < 0.2


@pytest.mark.parametrize("method", QUICK)
def test_a_resumed_run_and_a_second_one_give_the_same_bytes(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "DUMP_SECONDS", 0)  # as in a run that takes long
    monkeypatch.setattr(journal, "DUMP_SHARE", 1e9)
    build("llama", tmp_path / "model", torch.bfloat16)
    document = {"method": QUICK[method] | {"start": "rtn"}}
    whole = make(tmp_path / "whole", tmp_path / "model", document)
    assert all(layer.tuning["steps"] > 0 for layer in whole.layers)

    def stop(progress: Any) -> None:
        if progress.block == 1:
            raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "run", tmp_path / "model", document, on_block=stop)
    seen: list[int] = []
    make(tmp_path / "run", tmp_path / "model", document, on_block=lambda p: seen.append(p.block))
    assert seen == [2]
    assert files(tmp_path / "run" / "quantized") == files(tmp_path / "whole" / "quantized")
    other = {"method": document["method"] | {"seed": 1}}
    make(tmp_path / "other", tmp_path / "model", other)
    name = "model.safetensors"
    assert files(tmp_path / "other" / "quantized")[name] != files(tmp_path / "whole" / "quantized")[name]


class Scene:
    """Block 0 of a tiny model, rounded to 3 bits, with inputs that earlier rounding has shifted."""

    def __init__(self, family: str, folder: Path, settings: Any, dtype: torch.dtype = torch.float32) -> None:
        build(family, folder, dtype)
        skeleton = Skeleton(Checkpoint(folder), device=CPU)
        skeleton.open_shell()
        g = torch.Generator().manual_seed(0)
        tokens = torch.randint(2, 256, (8, 24), generator=g)
        reference = skeleton.embed(tokens)
        self.arguments: BlockArguments = skeleton.block_arguments(tokens)[0]
        self.inputs = reference + 0.02 * reference.std() * torch.randn(reference.shape, generator=g).to(dtype)
        block = next(iter(skeleton.blocks()))[1]
        self.block = copy.deepcopy(block)
        self.linears = {x.name: x for x in skeleton.linears() if x.block == 0}
        self.targets = reference.clone()
        run_block(self.block, self.targets, self.arguments, device=CPU, batch=8)
        self.reference = reference
        hidden = {"hidden": self.inputs, "reference": reference}
        self.tuning = Tuning(settings, 0, self.block, self.linears, hidden)
        self.rounded = {name: self.round(linear) for name, linear in self.linears.items()}
        self.start = dict(self.rounded)
        self.records = {name: LayerRecord(name=name, bits=3, scheme="int3", tokens=8 * 24) for name in self.rounded}

    def round(self, linear: LinearLayer) -> QuantizedLinear:
        one = rtn(weight_of(self.block, linear), Grid(bits=3, group_size=16, symmetric=False), Rtn()).linear
        place(self.block, linear, one)
        return one

    def run(self) -> Tensor:
        hidden = {"hidden": torch.empty(0), "reference": self.targets}
        self.tuning.run(self.rounded, self.records, hidden, self.arguments, CPU)
        return hidden["hidden"]

    def output(self, block: nn.Module) -> Tensor:
        hidden = self.inputs.clone()
        run_block(block, hidden, self.arguments, device=CPU, batch=8)
        return hidden


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("settings", [AutoRound(steps=60, batch_size=4), Qat(steps=60, batch_size=4)])
def test_a_tuned_block_is_clearly_nearer_to_its_target(family: str, settings: Any, tmp_path: Path) -> None:
    scene = Scene(family, tmp_path, settings)
    before = (scene.output(scene.block) - scene.targets).square().mean()
    propagated = scene.run()
    after = (scene.output(scene.block) - scene.targets).square().mean()
    summary = scene.records[next(iter(scene.records))].tuning
    assert summary["loss_before"] == pytest.approx(float(before), rel=1e-4)
    assert summary["loss_after"] == pytest.approx(float(after), rel=1e-4)
    assert float(after) < 0.8 * float(before)
    assert torch.equal(propagated, scene.output(scene.block))  # the next block gets what the stored weights make
    for name, one in scene.rounded.items():
        assert torch.equal(weight_of(scene.block, scene.linears[name]), one.dequantize())
    for name, entry in scene.records.items():
        assert entry.loss / entry.relative_error > 0, name


@pytest.mark.parametrize("settings", [AutoRound(steps=4, lr=5.0), Qat(steps=4, weight_lr=5.0, quant_lr=5.0)])
def test_a_block_that_only_gets_worse_keeps_its_start(settings: Any, tmp_path: Path) -> None:
    scene = Scene("llama", tmp_path, settings)
    scene.run()
    for name, one in scene.start.items():
        assert torch.equal(scene.rounded[name].codes, one.codes)
        assert torch.equal(scene.rounded[name].scales, one.scales)
    summary = scene.records[next(iter(scene.records))].tuning
    assert summary["loss_after"] == summary["loss_before"]
    assert summary["steps"] == 0


def test_patience_ends_what_does_not_get_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    gradients = Passes.gradients
    monkeypatch.setattr(Passes, "gradients", lambda *a: taken.append(1) or gradients(*a))
    Scene("llama", tmp_path, AutoRound(steps=40, lr=5.0, patience=10)).run()
    assert len(taken) == 10


def test_errors_on_record_are_those_of_the_linears(tmp_path: Path) -> None:
    """Against the original's outputs: its weights on the inputs that the original block gives them."""
    scene = Scene("llama", tmp_path, AutoRound(steps=4))
    seen: dict[str, list[Tensor]] = {name: [] for name in scene.linears}
    originals = dict(scene.tuning._weights)
    scene.run()
    tuned = copy.deepcopy(scene.block)
    for name, linear in scene.linears.items():
        module: Any = scene.block.get_submodule(linear.module)
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2)))
    scene.output(scene.block)
    for name, linear in scene.linears.items():
        scene.block.get_submodule(linear.module).weight = nn.Parameter(originals[name])
    run_block(scene.block, scene.reference.clone(), scene.arguments, device=CPU, batch=8)
    for name, (x, original) in seen.items():
        wanted = original @ originals[name].T
        error = (x @ weight_of(tuned, scene.linears[name]).T - wanted).square().sum()
        assert scene.records[name].relative_error == pytest.approx(float(error / wanted.square().sum()), rel=1e-4)
        assert scene.records[name].loss == pytest.approx(float(error) / (8 * 24), rel=1e-4)
        assert scene.records[name].error_measure == "output_accumulated"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_products_give_the_gradients_of_float32_ones(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(family, tmp_path, AutoRound(), torch.bfloat16)
    weights = {}
    for name, one in scene.rounded.items():
        weight = one.dequantize()
        weights[f"{scene.linears[name].module}.weight"] = weight.T if scene.linears[name].transposed else weight
    found = {}
    for native in (True, False):
        monkeypatch.setattr(tuning, "multiplies", lambda dtype, where, native=native: native)
        passes = Passes(scene.block, scene.inputs, scene.targets, scene.arguments, CPU)
        found[native] = passes.loss(weights), passes.gradients(weights, torch.arange(8))
    assert found[True][0] == pytest.approx(found[False][0], rel=0.02)
    assert found[True][0] != found[False][0]
    for name, plain in found[False][1].items():
        fast = found[True][1][name]
        assert fast.dtype == torch.float32
        assert (fast - plain).norm() < 0.05 * plain.norm(), name


def test_only_a_bfloat16_model_is_multiplied_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "multiplies", lambda dtype, where: True)
    scene = Scene("llama", tmp_path, AutoRound(), torch.float32)
    seen = []
    passes = Passes(scene.block, scene.inputs, scene.targets, scene.arguments, CPU)
    passes._block.get_submodule("mlp.down_proj").register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    passes.loss({})
    assert seen == [torch.float32]


def test_batches_meet_every_sample_and_depend_on_seed_and_block_alone() -> None:
    def first(n: int, *key: int) -> list[list[int]]:
        source = batches(6, 2, *key)
        return [next(source).tolist() for _ in range(n)]

    assert sorted(i for batch in first(3, 0, 0) for i in batch) == list(range(6))
    assert first(6, 0, 1) == first(6, 0, 1)
    assert first(6, 0, 1) != first(6, 0, 2)
    assert first(6, 0, 1) != first(6, 1, 1)
    assert [len(x) for x in (next(batches(3, 8, 0, 0)), next(batches(5, 2, 0, 0)))] == [3, 2]


@pytest.mark.parametrize("method", QUICK)
def test_the_plan_counts_steps_and_what_they_keep(method: str, tmp_path: Path) -> None:
    build("mixtral", tmp_path / "model", torch.bfloat16)

    def plan(settings: dict[str, Any]) -> Plan:
        calibration = {"samples": 64, "seq_len": 64}
        recipe = parse({"method": settings, "calibration": calibration, "weights": {"group_size": 32}})
        source = resolve(str(tmp_path / "model"), cache=tmp_path)
        return prepare(recipe, source, CPU).plan

    rounded = plan({"name": "gptq"})
    short, long = (plan({"name": method, "steps": n}) for n in (10, 30))
    wide = plan({"name": method, "steps": 10, "batch_size": 32})
    assert short.memory_bytes > rounded.memory_bytes
    assert wide.memory_bytes > short.memory_bytes
    # A step is three forward passes (2 operations a weight) over 2 x 64 tokens; each meets 2 of the 4 experts.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 2 * 3 * 64 * 96)
    assert long.operations - short.operations == 20 * 3 * 2 * 2 * 64 * weights
    assert short.passes == rounded.passes == 2


def test_the_plan_counts_training_end_to_end(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)

    def plan(steps: int | None, seq_len: int = 64) -> Plan:
        method = {"name": "qat", "steps": 4, "end_to_end": steps and {"steps": steps}}
        calibration = {"samples": 64, "seq_len": seq_len}
        recipe = parse({"method": method, "calibration": calibration, "weights": {"group_size": 32}})
        source = resolve(str(tmp_path / "model"), cache=tmp_path)
        return prepare(recipe, source, CPU).plan

    none, short, long = plan(None), plan(10), plan(30)
    assert short.memory_bytes >= none.memory_bytes
    # A step is four forward passes (2 operations a weight, those of the head too) over 4 x 64 tokens.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 64 * 256
    assert long.operations - short.operations == 20 * 4 * 2 * 4 * 64 * weights
    looks = 5 * 8 * 2 * 64 * weights
    blocks = weights - 64 * 256
    original, errors = 64 * 2 * 64 * blocks, 4 * 64 * 2 * 64 * blocks
    assert short.operations - none.operations == 10 * 4 * 2 * 4 * 64 * weights + looks + original + errors
