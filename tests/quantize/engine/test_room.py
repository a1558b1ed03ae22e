"""How the memory of a device is used: what fits is chosen, and what is chosen changes nothing but time and memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress.core import machine
from quantpress.core.errors import OutOfMemory
from quantpress.core.ranks import Ranks
from quantpress.core.transfers import file_empty
from quantpress.engine import blocks, plan
from quantpress.engine.room import Needs, Room, choose

from ...tiny import build
from .test_pipeline import files, make

GB = 10**9
LLAMA_8B = Needs(  # of 128 sequences of 2048 tokens
    weights=436_000_000, hidden=2_147_000_000, streams=2, kept=0, waiting=11_800_000_000, token=129_000,
    solve=6_000_000_000, shell=2_100_000_000, tokens=128 * 2048, process=600_000_000,
)  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("llama", {}),
    "experts": ("qwen2_moe", {"targets": ["vllm"]}),
    "awq": ("qwen3", {"transforms": [{"name": "awq", "points": 3}]}),
    "static fp8 and its cache": (
        "llama",
        {"weights": {"type": "fp8", "group_size": 0}, "activations": {"type": "fp8", "dynamic": False},
         "kv_cache": "fp8"},
    ),
    "tuned": ("llama", {"method": {"name": "autoround", "steps": 4, "batch_size": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_room_changes_no_bit(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, document = CASES[case]
    build(family, tmp_path / "model", torch.bfloat16)
    made = {}
    on_disk = Room(batch_tokens=64, on_device=False, on_disk=True)
    for room in (Room(64), Room(64, restarts=True), Room(64, spare=True), on_disk):
        monkeypatch.setattr(plan, "choose", lambda needs, device, ranks, room=room: room)
        out = tmp_path / f"run{len(made)}"
        make(out, tmp_path / "model", document)
        made[room] = files(out / "quantized")
    first, *others = ({n: content for n, content in one.items() if n != "manifest.json"} for one in made.values())
    assert others == [first] * 3


def test_states_on_disk_take_their_room_at_once_and_leave_no_file(tmp_path: Path) -> None:
    states = file_empty((3, 5, 8), torch.bfloat16, tmp_path / "work")
    assert not [*(tmp_path / "work").iterdir()]
    assert torch.equal(states.copy_(torch.arange(120).view(3, 5, 8)), torch.arange(120).view(3, 5, 8).bfloat16())
    with pytest.raises(OSError, match=r"No space left|too large"):
        file_empty((1 << 30, 1 << 26), torch.bfloat16, tmp_path / "work")
    assert not [*(tmp_path / "work").iterdir()]


def test_a_gpu_without_memory_left_goes_on_with_fewer_tokens_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the second block, twice; the block is begun again from the original weights and states."""
    build("llama", tmp_path / "model", torch.bfloat16)
    make(tmp_path / "whole", tmp_path / "model", {})
    monkeypatch.setattr(plan, "choose", lambda needs, device, ranks: Room(spare=True))
    calls = [0]
    inner = blocks.lend_input_scales

    def fail(*args: Any) -> None:
        calls[0] += 1
        if calls[0] in (2, 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        inner(*args)

    monkeypatch.setattr(blocks, "lend_input_scales", fail)
    notes: list[str] = []
    make(tmp_path / "cut", tmp_path / "model", {}, on_note=notes.append)
    assert notes == [
        "block 1: out of memory with 4096 tokens at once; it goes on with 2048",
        "block 1: out of memory with 2048 tokens at once; it goes on with 1024",
    ]
    assert files(tmp_path / "cut" / "quantized") == files(tmp_path / "whole" / "quantized")


def test_where_nothing_is_left_to_halve_memory_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    monkeypatch.setattr(plan, "choose", lambda needs, device, ranks: Room(spare=True, batch_tokens=63))

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(blocks, "lend_input_scales", fail)
    with pytest.raises(OutOfMemory, match=r"while block 1 of 2 was quantized .*; lower calibration.samples or"):
        make(tmp_path / "run", tmp_path / "model", {})


def test_the_fastest_way_that_fits_a_gpu_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")

    def chosen(gigabytes: float, needs: Needs = LLAMA_8B, host: int = 200) -> Room:
        memory = int(gigabytes * GB)
        monkeypatch.setattr(machine, "device_memory", lambda where: (memory, memory))
        monkeypatch.setattr(machine, "available_memory_bytes", lambda: host * GB)
        found = choose(needs, cuda)
        assert needs.on_device(found) <= 0.9 * memory or found == Room(4096, False, False, True)
        return found

    assert chosen(80) == Room(32768, on_device=True, spare=True)
    assert chosen(27) == Room(32768, on_device=True, spare=False)
    assert chosen(23) == Room(32768, on_device=False)
    many = replace(LLAMA_8B, hidden=16 * 2_147_000_000, waiting=16 * 11_800_000_000, tokens=16 * 128 * 2048)
    assert chosen(80, many) == Room(32768, on_device=False, restarts=True)
    assert "run again for each of its linears" in (chosen(80, many).note(cuda) or "")
    assert chosen(1) == Room(4096, on_device=False, restarts=True)
    assert chosen(80, host=3) == Room(32768, on_device=True, spare=True)
    spilled = chosen(23, host=5)
    assert spilled == Room(32768, on_device=False, on_disk=True)
    assert "in files below the run's folder" in (spilled.note(cuda) or "")
    assert (
        LLAMA_8B.on_disk(spilled)
        == 2 * LLAMA_8B.hidden
        == LLAMA_8B.on_host(Room(on_device=False)) - LLAMA_8B.on_host(spilled)
    )


def test_batches_are_the_same_whatever_little_is_taken_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for free in (80 * GB, 79 * GB, 75 * GB):
        monkeypatch.setattr(machine, "device_memory", lambda where, free=free: (free, 80 * GB))
        found.add(choose(LLAMA_8B, torch.device("cuda")))
    assert len(found) == 1


def test_processes_share_the_tokens_and_take_as_many_at_once_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, four = torch.device("cuda"), Ranks(0, 4, 4)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 200 * GB)
    monkeypatch.setattr(machine, "device_memory", lambda where: (16 * GB, 16 * GB))
    alone, shared = choose(LLAMA_8B, cuda), choose(LLAMA_8B, cuda, four)
    assert alone.restarts
    assert not shared.restarts
    assert shared.batch_tokens == alone.batch_tokens
    one = LLAMA_8B.of_one(four)
    assert (one.hidden * 4, one.waiting * 4, one.tokens * 4) == (LLAMA_8B.hidden, LLAMA_8B.waiting, LLAMA_8B.tokens)
    assert one.solve == LLAMA_8B.solve
    # Four times the block and a process's own, but the states and what waits once.
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 48 * GB)
    cpu = torch.device("cpu")
    assert choose(LLAMA_8B, cpu, four) == Room()
    assert 4 * one.on_cpu(Room()) <= 48 * GB < 4 * LLAMA_8B.on_cpu(Room())


def test_a_host_with_little_memory_has_states_on_disk_then_runs_blocks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk = Room(on_device=False, on_disk=True)
    ways = ((64, Room()), (20, on_disk), (12, replace(on_disk, restarts=True)), (1, Room()))
    for free, wanted in ((gigabytes * GB, way) for gigabytes, way in ways):
        monkeypatch.setattr(machine, "available_memory_bytes", lambda free=free: free)
        assert choose(LLAMA_8B, torch.device("cpu")) == wanted
