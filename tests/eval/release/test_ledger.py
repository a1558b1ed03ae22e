"""A second run does only what has changed, and says why."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quantpress.core.files import write_json
from quantpress.eval.release.ledger import Ledger, ReleaseStage


class Bench:
    """A run folder, the stages done in it, and what was said of them."""

    def __init__(self, out: Path) -> None:
        self.out, self.done, self.notes = out, 0, list[str]()
        write_json(out / "manifest.json", {"artifact": {"bytes": 1}})

    def run(self, inputs: Mapping[str, Any], fails: bool = False) -> Mapping[str, Any]:
        def work() -> Mapping[str, Any]:
            if fails:
                raise OSError("no")
            self.done += 1
            (self.out / "result.json").write_text("{}")
            return {"times": self.done}

        return Ledger(self.out, self.notes.append).run(ReleaseStage("eval", inputs, ("result.json",), work))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_what_is_done_is_not_done_again(bench: Bench) -> None:
    assert bench.run({"windows": 16, "text": (1, 2)}) == {"times": 1}
    assert bench.run({"windows": 16, "text": (1, 2)}) == {"times": 1}
    assert bench.notes == ["eval: as before, nothing it depends on has changed"]
    manifest = json.loads((bench.out / "manifest.json").read_text())
    assert manifest["artifact"] == {"bytes": 1}
    assert manifest["stages"]["eval"]["inputs"] == {"windows": 16, "text": [1, 2]}


def test_a_changed_input_is_named(bench: Bench) -> None:
    bench.run({"windows": 16, "text": "a"})
    assert bench.run({"windows": 32, "text": "b"}) == {"times": 2}
    assert bench.notes == ['eval: again, because text: "a" there, "b" now and 1 more']


def test_a_lost_output_is_made_again(bench: Bench) -> None:
    bench.run({})
    (bench.out / "result.json").unlink()
    assert bench.run({}) == {"times": 2}
    assert bench.notes == ["eval: again, because result.json no longer exists"]


def test_a_stage_that_fails_is_not_remembered_as_done(bench: Bench) -> None:
    bench.run({"windows": 16})
    with pytest.raises(OSError, match="no"):
        bench.run({"windows": 32}, fails=True)
    assert bench.run({"windows": 16}) == {"times": 2}


def test_an_outcome_that_failed_is_not_kept(bench: Bench) -> None:
    stage = ReleaseStage(
        "smoke", {}, (), lambda: {"verdict": "FAILED"}, failed=lambda said: said["verdict"] == "FAILED"
    )
    for _ in range(2):
        Ledger(bench.out, bench.notes.append).run(stage)
    assert bench.notes == ["smoke: again, because it failed"]
