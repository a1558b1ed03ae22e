"""What a run leaves for the one that resumes it: kept now and then, written by a thread, never used when damaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress.artifact.manifest import BlockRecord
from quantpress.engine import journal
from quantpress.engine.journal import Journal

from ...tiny import build
from .test_pipeline import Stop, files, make


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {  # file, what is done to it, what is said
    "a bit of a part": ("block-00001.safetensors", flipped, "is damaged: block 1 and those after it"),
    "a cut part": ("block-00000.safetensors", cut, "is damaged: block 0 and those after it"),
    "no part": ("block-00000.safetensors", Path.unlink, "is missing: block 0 and those after it"),
    "a bit of the states": ("hidden-00001.safetensors", flipped, "is damaged: the blocks before it"),
    "cut states": ("hidden-00001.safetensors", cut, "is damaged: the blocks before it"),
    "no states": ("hidden-00001.safetensors", Path.unlink, ""),
    "a line": ("journal.jsonl", lambda p: p.write_text(p.read_text().replace('"record"', '"rec', 1)), "in line 1"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build("gemma3", folder / "model", torch.bfloat16)
    make(folder / "run", folder / "model", {})
    return folder


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_named_and_made_again(what: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, damage, said = DAMAGE[what]
    monkeypatch.setattr(journal, "DUMP_SECONDS", 0)
    monkeypatch.setattr(journal, "DUMP_SHARE", 1e9)
    run = whole / what.replace(" ", "-")

    def stop(progress: Any) -> None:
        if progress.block == 2:
            raise Stop

    with pytest.raises(Stop):
        make(run, whole / "model", {}, on_block=stop)
    damage(run / ".work" / name)
    notes: list[str] = []
    seen: list[int] = []
    make(run, whole / "model", {}, on_block=lambda p: seen.append(p.block), on_note=notes.append)
    assert seen == [1, 2, 3]  # only the latest states are kept
    assert files(run / "quantized") == files(whole / "run" / "quantized")
    assert not said or any(said in line and name in line for line in notes)


def line(k: int) -> BlockRecord:
    return BlockRecord(block=k, seconds=0.1, layers=())


def test_a_block_is_written_while_the_next_one_runs(tmp_path: Path) -> None:
    """The commit returns before the tensors are asked for; the next one waits."""
    asked: list[int] = []
    go = [False]

    def tensors(k: int) -> dict[str, torch.Tensor]:
        while not go[0]:
            pass
        asked.append(k)
        return {"x": torch.full((2,), float(k))}

    with Journal(tmp_path / "work", {}) as opened:
        opened.commit(lambda: tensors(0), line(0), 4096)
        assert asked == []
        go[0] = True
        opened.commit(lambda: tensors(1), line(1), 4096)
        assert asked[0] == 0
    assert asked == [0, 1]
    again = Journal(tmp_path / "work", {})
    assert [record.block for record in again.done] == [0, 1]
    assert again.batch_tokens == 4096


def test_what_the_writing_raises_ends_the_run(tmp_path: Path) -> None:
    def full() -> dict[str, torch.Tensor]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), Journal(tmp_path / "work", {}) as opened:
        opened.commit(full, line(0), 4096)


def test_an_error_on_its_way_is_not_replaced_by_that_of_the_writing(tmp_path: Path) -> None:
    def late() -> dict[str, torch.Tensor]:
        raise OSError(28, "No space left on device")

    def stopped() -> None:
        with Journal(tmp_path / "work", {}) as opened:
            opened.commit(late, line(0), 4096)
            raise Stop

    with pytest.raises(Stop):
        stopped()


def test_hidden_states_are_kept_seldom_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a minute; where they take 6 s to write, every two minutes, which is 5 % of the time."""
    now = [1000.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    opened = Journal(tmp_path / "work", {})
    now[0] += 59
    assert not opened.keeps_hidden
    now[0] += 1
    assert opened.keeps_hidden

    def slow() -> dict[str, torch.Tensor]:
        now[0] += 6
        return {"hidden": torch.ones(2)}

    opened.commit(lambda: {"x": torch.ones(1)}, line(0), 4096, hidden=slow)
    opened.settle()
    now[0] += 119
    assert not opened.keeps_hidden
    now[0] += 1
    assert opened.keeps_hidden
    again = Journal(tmp_path / "work", {})
    assert torch.equal(again.hidden()["hidden"], torch.ones(2))
