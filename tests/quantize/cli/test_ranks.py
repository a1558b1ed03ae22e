"""Processes started for --gpus: how they end, and what of it the user sees."""

import sys

import pytest

from quantpress.cli.ranks import LOST, _command, joined, launch
from quantpress.core.errors import BadInput
from quantpress.eval.release.callbacks import Options


@pytest.mark.parametrize(
    ("leader", "other", "code", "said"),
    [
        ("print('done')", "import time; time.sleep(0.1)", 0, ""),
        ("sys.exit(2)", "import time; time.sleep(60)", 2, ""),
        (
            f"time.sleep(0.5); sys.exit({LOST})",
            "print('a'); sys.exit('quantpress: no room')",
            1,
            "quantpress: no room\n",
        ),
        (
            f"time.sleep(0.5); sys.exit({LOST})",
            "import os; os.kill(os.getpid(), 9)",
            1,
            "quantpress: process 1 of the run was ended by signal 9 (out of memory?); the same command continues from "
            "what is finished\n",
        ),
    ],
)
def test_why_processes_end_is_said_once(
    leader: str, other: str, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantpress.cli.ranks._GRACE", 0.5)
    program = f"import os, sys, time\nif os.environ['RANK'] == '0':\n    {leader}\nelse:\n    {other}"
    assert launch([sys.executable, "-c", program], 2) == code
    assert capsys.readouterr().err == said


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.cli.ranks._gpus", lambda: 1)
    with pytest.raises(BadInput, match=r"^--gpus 2: this machine has 1 GPU$"):
        joined(Options(), 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(BadInput, match=r"^--nproc-per-node 2: this machine has 1 GPU$"):
        joined(Options(), None)
    with pytest.raises(BadInput, match="leave it out under torchrun"):
        joined(Options(), 1)


def test_a_process_takes_a_gpu_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.cli.ranks._gpus", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    options = joined(Options(), None)
    assert (options.ranks.rank, options.ranks.size, options.ranks.leads) == (3, 4, False)
    import os

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_the_command_of_each_process() -> None:
    wanted = [sys.executable, "-m", "quantpress", "run", "r.yaml", "--out", "x"]
    assert _command(["run", "r.yaml", "--gpus", "4", "--out", "x"]) == wanted
    assert _command(["run", "r.yaml", "--gpus=4", "--out", "x"]) == wanted
