"""Memory that ends is one line with what to do; a container's limit counts, not the host's memory."""

import errno
import os
from pathlib import Path

import pytest
import torch

from quantpress.cli import app as application
from quantpress.core import memory
from quantpress.core.errors import BadInput, OutOfMemory
from quantpress.core.memory import doing, is_out_of_memory, told

ENDED = [  # as they were seen, the last three on GPUs
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 34359738368 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("could not create a primitive"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
                           "which 1.02 GiB is free."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
]  # fmt: skip


@pytest.mark.parametrize("error", ENDED, ids=lambda error: str(error)[:30] or "MemoryError")
def test_the_end_of_memory_is_told_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with doing(lambda: "block 3 of 32 was quantized", "lower calibration.samples or calibration.seq_len"):
            raise error

    for at in (work, lambda: (_ for _ in ()).throw(error)):
        monkeypatch.setattr(application, "app", lambda at=at, **_: next(at()) if at is not work else at())
        monkeypatch.setattr("sys.argv", ["quantpress", "quantize", "r.yaml"])
        with pytest.raises(SystemExit) as end:
            application.main()
        assert end.value.code == 1
        said = " ".join(capsys.readouterr().err.split())
        assert said.startswith("quantpress: out of ")
        assert said.endswith("the same command continues from what is finished")
        if at is work:
            assert "while block 3 of 32 was quantized" in said
            assert "free); lower calibration.samples or calibration.seq_len; " in said
        assert "B free)" in said


def test_how_much_was_asked_for_is_said() -> None:
    assert "(34.4 GB more asked for, " in told(ENDED[1], "it ran", "")
    assert "out of GPU memory while it ran (2.68 GB more asked for, " in told(ENDED[4], "it ran", "")


def test_other_errors_are_left_alone() -> None:
    for error in (RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "full"), BadInput("no"), ValueError("no")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error), match=str(error)[:5].replace("[", ".")), doing(lambda: "", ""):
            raise error


def test_only_the_first_says_what_was_being_done() -> None:
    with (
        pytest.raises(OutOfMemory, match="while the inner"),
        doing(lambda: "the outer was done", ""),
        doing(lambda: "the inner was done", ""),
    ):
        raise MemoryError


def write(folder: Path, **numbers: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in numbers.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_the_limits_of_control_groups_of_version_2(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/pod/container\n")
    stat = "anon 5\ninactive_file 200\nactive_file 50\n"
    write(tmp_path / "pod/container", memory__max=1000, memory__current=600, memory__stat=stat)
    write(tmp_path / "pod", memory__max="max", memory__current=900, memory__stat=stat)
    assert list(memory._below_limits(tmp_path, own)) == [1000 - 600 + 250]
    write(tmp_path / "pod", memory__max=1000)
    assert min(memory._below_limits(tmp_path, own)) == 1000 - 900 + 250
    own.write_text("0::/elsewhere\n")  # a container sees its own group at the top
    write(tmp_path, memory__max=700, memory__current=600)
    assert list(memory._below_limits(tmp_path, own)) == [100]


def test_the_limits_of_control_groups_of_version_1(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    place = tmp_path / "memory/docker/x"
    write(place, memory__limit_in_bytes=1000, memory__usage_in_bytes=600, memory__stat="total_inactive_file 100\n")
    write(tmp_path / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=10**9)
    assert list(memory._below_limits(tmp_path, own)) == [500]
    assert list(memory._below_limits(tmp_path, tmp_path / "none")) == []


def test_a_containers_limit_counts_as_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.write_text("0::/\n")
    write(tmp_path, memory__max=10**8, memory__current=10**7)
    monkeypatch.setattr(memory, "_MOUNT", tmp_path)
    monkeypatch.setattr(memory, "_OWN", own)
    assert memory.available_bytes() == 9 * 10**7
