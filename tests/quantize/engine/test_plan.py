"""The plan's memory beside the peak that the kernel counted; its refusals; its measure of a machine's speed."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantpress import api
from quantpress.artifact.original import OriginalCheckpoint
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.core.products import exact_float32_products
from quantpress.core.ranks import Ranks
from quantpress.engine import needs
from quantpress.engine import plan as planning
from quantpress.engine.needs import process_bytes
from quantpress.engine.pipeline import prepare
from quantpress.engine.plan import Plan
from quantpress.engine.room import Room
from quantpress.engine.sources import resolve
from quantpress.eval.release.callbacks import Options
from quantpress.models import placed_model
from quantpress.models.skeleton import Skeleton, run_block
from quantpress.recipe import Gptq, Rtn
from quantpress.recipe.loading import parse

from ... import families
from ...tiny import build, text

MAKE = Path(__file__).parent.parent.parent / "bench" / "checkpoints.py"


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA takes more memory before any work")
@pytest.mark.parametrize(
    ("recipe", "hidden", "intermediate"),
    [
        ("w4a16-rtn", 64, 128),
        ("w4a16-rtn", 512, 1408),
        ("w4a16-rtn", 1024, 2816),  # nothing takes as much as the comparison with the whole model
        ("w4a16-rtn", 2048, 8192),  # codes of a block, and what is packed of two
        ("fp8-dynamic", 2048, 8192),  # codes of two blocks, which are written as they are
        ("nvfp4a16", 2048, 8192),  # two blocks are read, to find out which linears share a scale
        ("w4a16-gptq", 64, 128),
        ("w4a16-gptq", 512, 1408),
        ("w4a16-awq", 512, 1408),
    ],
)
def test_memory_is_as_planned(recipe: str, hidden: int, intermediate: int, tmp_path: Path) -> None:
    """Never more than the plan says, and the plan no more than 15 % above it."""
    size = ["--blocks", "2", "--hidden", str(hidden), "--intermediate", str(intermediate)]
    subprocess.run([sys.executable, str(MAKE), str(tmp_path / "model"), *size], check=True)
    (tmp_path / "text.txt").write_text(text(16_000))
    sets = [f"calibration={{source: {tmp_path / 'text.txt'}, samples: 16, seq_len: 512}}"]
    command = [sys.executable, "-m", "quantpress"]
    options = [recipe, "--model", str(tmp_path / "model"), *(f"--set={one}" for one in sets)]
    said = subprocess.run([*command, "plan", *options, "--json"], check=True, capture_output=True, text=True).stdout
    planned = json.loads(said.splitlines()[-1])["memory_bytes"]
    subprocess.run([*command, "quantize", *options, "--out", str(tmp_path / "run")], check=True, capture_output=True)
    timing = json.loads((tmp_path / "run" / "manifest.json").read_text())["timing"]
    assert timing["peak_rss_bytes"] <= planned <= 1.15 * timing["peak_rss_bytes"]


def planned(folder: Path, device: str, monkeypatch: pytest.MonkeyPatch, **calibration: Any) -> Plan:
    """The plan of a run on a device that need not be there."""
    monkeypatch.setattr(planning, "_speed", lambda device, dtype: 1e9)
    recipe = parse({"calibration": calibration, "weights": {"group_size": 32}})
    return prepare(recipe, resolve(str(folder), cache=folder.parent), torch.device(device)).plan


def test_too_little_gpu_memory_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    plan = planned(tmp_path / "model", "cuda:1", monkeypatch, samples=64, seq_len=64)
    asked = []
    monkeypatch.setattr(machine, "available_device_bytes", lambda where: asked.append(where) or plan.device_bytes - 1)
    with pytest.raises(BadInput) as refused:
        plan.check(tmp_path / "run", ignore=False)
    assert asked == [torch.device("cuda:1")]
    assert "\n" not in str(refused.value)
    assert "of GPU memory and" in str(refused.value)
    assert "free on cuda:1; lower calibration.samples or seq_len" in str(refused.value)
    plan.check(tmp_path / "run", ignore=True)
    monkeypatch.setattr(machine, "available_device_bytes", lambda where: plan.device_bytes)
    plan.check(tmp_path / "run", ignore=False)


def test_what_lies_on_the_gpu_is_not_counted_as_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    few, many = (planned(tmp_path / "model", "cuda", monkeypatch, samples=n, seq_len=64) for n in (64, 512))
    on_cpu = planned(tmp_path / "model", "cpu", monkeypatch, samples=512, seq_len=64)
    tokens, hidden = (512 - 64) * 64, 64 * 2
    assert many.memory_bytes == few.memory_bytes
    # Two models' hidden states as they enter and leave a block, and what every batch holds as it waits.
    assert many.device_bytes - few.device_bytes >= (4 + 7) * tokens * hidden
    assert many.memory_bytes < on_cpu.memory_bytes
    monkeypatch.setattr(planning, "choose", lambda needs, device, ranks: Room(on_device=False))  # what fits: test_room
    spilled = planned(tmp_path / "model", "cuda", monkeypatch, samples=512, seq_len=64)
    assert spilled.memory_bytes - many.memory_bytes == 2 * 512 * 64 * hidden
    assert spilled.device_bytes < many.device_bytes
    assert "hidden states do not fit on cuda: they are kept in the host's memory" in spilled.notes
    assert (on_cpu.device, on_cpu.device_bytes) == ("cpu", 0)


@pytest.mark.parametrize(("method", "float32"), [(Gptq(), "tf32"), (Rtn(), "ieee")])
def test_a_gpu_is_measured_in_what_it_solves_with(
    method: Gptq | Rtn, float32: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    speeds = {"tf32": 4.0, "ieee": 1.0}
    cuda: Any = torch.backends.cuda.matmul

    def speed(device: torch.device, dtype: torch.dtype) -> float:
        return 8.0 if dtype == torch.bfloat16 else speeds[cuda.fp32_precision]

    monkeypatch.setattr(planning, "_speed", speed)
    there: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    with exact_float32_products():
        assert planning._seconds(96.0, 16.0, there, method) == 80 / 8 + 16 / speeds[float32]


def test_a_machines_speed_is_taken_once_it_is_warm_and_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of its own: the first products take long, and so does one on the way; one synchronisation each."""
    clock, waits = [0.0], []
    took = iter([5.0, 3.0] + [0.5 if i == 7 else 0.01 for i in range(planning._PRODUCTS)])

    def wait(where: torch.device) -> None:
        waits.append(where)
        if len(waits) % 2 == 0:  # the product is done only now
            clock[0] += next(took)

    monkeypatch.setattr(machine, "synchronize", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert planning._measured_speed(torch.device("cpu"), torch.float32) == pytest.approx(256**3 / 0.01)
    assert len(waits) == 2 * (2 + planning._PRODUCTS)


def test_a_machines_speed_is_the_same_from_call_to_call() -> None:
    """Of five calls the middle three, on a machine that may be busy with other things."""
    found = sorted(planning._measured_speed(torch.device("cpu"), torch.float32) for _ in range(5))
    assert found[3] < 2 * found[1]


def test_a_machines_speed_is_measured_once_for_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[int] = []
    monkeypatch.setattr(planning, "_measured_speed", lambda *_: met.append(torch.get_num_threads()) or 1e9)
    planning._speed_with.cache_clear()
    for threads in (1, 2, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        planning._speed(torch.device("cpu"), torch.float32)
    planning._speed_with.cache_clear()
    assert met == [1, 2]


def test_a_machine_that_is_busy_for_a_while_is_measured_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All the first products are slow, none alike, and a single one is fast: not before others are is it believed."""
    clock, waits = [0.0], [0]
    took = iter([5.0, 3.0, 0.01, *(0.05 + 0.002 * i for i in range(planning._PRODUCTS)), *[0.0101] * planning._ALIKE])

    def wait(where: torch.device) -> None:
        waits[0] += 1
        if waits[0] % 2 == 0:
            clock[0] += next(took)

    monkeypatch.setattr(machine, "synchronize", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert planning._measured_speed(torch.device("cpu"), torch.float32) == pytest.approx(256**3 / 0.01)
    assert waits[0] == 2 * (2 + 1 + planning._PRODUCTS + planning._ALIKE - 1)


@pytest.mark.parametrize("family", ["gemma4_text", "glm_moe_dsa"])
def test_what_stays_open_and_what_blocks_leave_is_counted(family: str, tmp_path: Path) -> None:
    families.build(family, tmp_path)
    skeleton = Skeleton(OriginalCheckpoint(tmp_path), device=torch.device("cpu"))
    skeleton.open_shell()
    tokens = torch.arange(4 * 16).reshape(4, 16) * 3 % 250
    hidden, arguments = skeleton.embed(tokens), skeleton.block_arguments(tokens)
    skeleton.close_shell()
    if skeleton._reruns:
        inside = f"{skeleton.blocks_name}."
        outside = [p for n, p in skeleton.model.named_parameters() if not p.is_meta and not n.startswith(inside)]
        assert needs._open_shell(skeleton) >= sum(p.nbytes for p in outside) > 0
    most = 0
    for k, block in skeleton.blocks():
        run_block(block, hidden, arguments[k], device=skeleton.device, batch=4)
        most = max(most, sum(t.nbytes for n, t in arguments.carried(k).items() if "rounded" in n))
    assert tokens.numel() * needs._carried(skeleton.config, skeleton.linears(), 16, 2) >= most > 0


def test_experts_cost_the_tokens_that_reach_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four experts a token: half of what all of them would cost, in passes of two models and their sums."""
    build("mixtral", tmp_path / "model", torch.bfloat16)
    two = planned(tmp_path / "model", "cpu", monkeypatch, samples=64, seq_len=64).operations
    monkeypatch.setattr(placed_model, "experts_per_token", lambda config: 4)
    four = planned(tmp_path / "model", "cpu", monkeypatch, samples=64, seq_len=64).operations
    expert = sum(4 * n * out + 4 * n * n for n, out in ((64, 96), (64, 96), (96, 64)))
    assert four - two == 2 * 4 * (64 * 64 / 2) * expert  # 2 blocks of 4 experts, half of all tokens
    monkeypatch.undo()
    everywhere = {"samples": 64, "seq_len": 64, "all_experts": True}
    assert planned(tmp_path / "model", "cpu", monkeypatch, **everywhere).operations == four


def test_a_plan_for_several_processes_counts_all_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    monkeypatch.setattr(planning, "_speed", lambda device, dtype: 1e9)
    recipe = parse({"calibration": {"samples": 64, "seq_len": 64}, "weights": {"group_size": 32}})
    source = resolve(str(tmp_path / "model"), cache=tmp_path)
    alone, four, two_here = (
        prepare(recipe, source, torch.device("cpu"), ranks=ranks).plan
        for ranks in (Ranks(), Ranks(0, 4, 4), Ranks(0, 4, 2))
    )
    assert 3 * process_bytes() < four.memory_bytes - alone.memory_bytes < 3 * alone.memory_bytes
    assert four.memory_bytes == 2 * two_here.memory_bytes
    assert 3.5 < alone.seconds / four.seconds <= 4
    assert alone.room == four.room


def test_a_plan_refuses_what_a_shared_run_refuses(tmp_path: Path) -> None:
    build("llama", tmp_path, torch.bfloat16)
    few = {"calibration": {"samples": 4, "seq_len": 512}}
    for document, ranks, line in (
        ({"method": {"name": "rtn"}}, Ranks(0, 2, 2), "without calibration is not shared between processes"),
        (few, Ranks(0, 8, 8), "8 processes for 4 samples of 512 tokens"),
    ):
        recipe = parse({"model": str(tmp_path), "weights": {"group_size": 32}, **document})
        with pytest.raises(BadInput, match=line):
            api.plan(recipe, options=Options(ranks=ranks))
