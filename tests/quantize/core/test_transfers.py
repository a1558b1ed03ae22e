"""The order that copies beside a GPU's work keep, on streams that only write down what is asked of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from quantpress.core import transfers
from quantpress.core.transfers import Transfers, host_empty

CPU = torch.device("cpu")


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"{self.name} marks")
        return f"mark of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


class There(torch.Tensor):
    """A tensor that says it is a GPU's; notes who uses it."""

    log: list[str]

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.log.append(f"kept for {stream.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    work = Stream("work", said)

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield
        said.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: said.append(f"thread on {stream.name}"))
    return said


def overlapping(log: list[str]) -> Transfers:
    made: Any = Transfers(CPU)
    made._stream = Stream("copies", log)
    return made


def test_what_is_fetched_is_waited_for_where_it_is_used_and_not_freed_before(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Source:
        def to(self, device: torch.device, non_blocking: bool) -> There:
            log.append(f"copy, non_blocking {non_blocking}")
            there = torch.ones(2).as_subclass(There)
            there.log = log
            return there

    monkeypatch.setattr(transfers, "_pinned", lambda tensor: tensor)
    source: Any = Source()
    get = overlapping(log).fetch({"x": source})
    assert log == ["on copies", "copy, non_blocking True", "copies marks", "off copies"]
    log.clear()
    assert torch.equal(get()["x"], torch.ones(2))
    assert log == ["work waits for mark of copies", "kept for work"]


def test_what_is_stored_is_copied_once_it_is_computed(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = overlapping(log)
    monkeypatch.setattr(made, "has", lambda tensor: isinstance(tensor, There))
    values, into = torch.ones(2).as_subclass(There), torch.zeros(2)
    values.log = log
    made.store(values, into)
    assert log == ["copies waits for work", "on copies", "off copies", "kept for copies"]
    assert torch.equal(into, torch.ones(2))
    log.clear()
    made.settle()
    assert log == ["host waits for copies"]
    log.clear()
    beside = torch.zeros(2).as_subclass(There)
    made.store(values, beside)  # on the device itself, by the work's own stream
    assert torch.equal(beside, torch.ones(2))
    assert log == []


def test_what_is_handed_over_is_read_on_the_stream_of_the_copies(log: list[str]) -> None:
    get = overlapping(log).hand_over({"x": torch.ones(2)})
    assert log == ["work marks"]
    log.clear()
    assert torch.equal(get()["x"], torch.ones(2))
    assert log == ["thread on copies", "copies waits for mark of work"]


def test_elsewhere_copies_are_plain() -> None:
    plain, into = Transfers(CPU), torch.zeros(2)
    assert torch.equal(plain.fetch({"x": torch.ones(2)})()["x"], torch.ones(2))
    assert torch.equal(plain.hand_over({"x": torch.ones(2)})()["x"], torch.ones(2))
    plain.store(torch.ones(2), into)
    plain.settle()
    assert torch.equal(into, torch.ones(2))


def test_memory_that_cannot_be_pinned_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container allows little of it; here there is no GPU to pin it for."""
    assert host_empty((2, 3), torch.bfloat16, torch.device("cuda")).shape == (2, 3)
    x = torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (_ for _ in ()).throw(RuntimeError("no more")))
    assert transfers._pinned(x) is x
