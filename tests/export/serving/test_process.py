"""Servers end with us, however we end, and with all they have started; what keeps them from starting is quoted."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from quantpress.exports.serving.process import Child, ServerFailed, free_port, running, wait_until_healthy

FAKE = Path(__file__).with_name("fake_server.py")
GRACE_S = 0.2


def command(port: int, fault: str = "") -> list[str]:
    return [sys.executable, str(FAKE), str(port), fault]


def tree(child: Child, at_least: int) -> list[psutil.Process]:
    """The guard and all below it, once they are as many."""
    end = time.monotonic() + 20
    while len(below := child.processes()) < at_least and time.monotonic() < end:
        time.sleep(0.02)
    assert len(below) >= at_least
    guard = below[0].parent()
    assert guard is not None
    return [guard, *below]


def gone(processes: list[psutil.Process], within_s: float = 10) -> bool:
    return not psutil.wait_procs(processes, timeout=within_s)[1]


def test_a_server_is_up_and_then_gone(tmp_path: Path) -> None:
    port = free_port()
    told: list[str] = []
    with running(command(port), {"GREETING": "1"}, tmp_path / "log", GRACE_S) as child:
        wait_until_healthy("fake", child, f"http://127.0.0.1:{port}/health", 20, told.append)
        assert child.listening() == {("127.0.0.1", port)}
        assert child.exposed() == []
        processes = tree(child, 1)
    assert gone(processes, 5)  # killed, and perhaps not yet buried
    assert child.peak_rss_bytes > 1 << 20
    assert "starting" in (tmp_path / "log").read_text()


def test_one_that_never_becomes_healthy_is_quoted_and_ended(tmp_path: Path) -> None:
    port = free_port()
    with running(command(port, "never-healthy"), {}, tmp_path / "log", GRACE_S) as child:
        processes = tree(child, 1)
        with pytest.raises(ServerFailed, match=r"fake was not healthy within 1 s (?s:.*)fake server: starting"):
            wait_until_healthy("fake", child, f"http://127.0.0.1:{port}/health", 1)
    assert gone(processes, 5)  # killed, and perhaps not yet buried


def test_one_that_dies_at_start_is_quoted_at_once(tmp_path: Path) -> None:
    port, started = free_port(), time.monotonic()
    with (
        pytest.raises(ServerFailed, match=r"ended with status 3 (?s:.*)qweight of model.layers.0 has the wrong shape"),
        running(command(port, "dies"), {}, tmp_path / "log", GRACE_S) as child,
    ):
        wait_until_healthy("fake", child, f"http://127.0.0.1:{port}/health", 60)
    assert time.monotonic() - started < 30


def test_a_command_that_is_not_there_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailed, match=r"status 127(?s:.*)no/such/server: No such file"),
        running([str(tmp_path / "no/such/server")], {}, tmp_path / "log", GRACE_S) as child,
    ):
        wait_until_healthy("fake", child, "http://127.0.0.1:1/health", 20)


def test_what_does_not_want_to_end_is_made_to(tmp_path: Path) -> None:
    """Neither the server nor its engine, in a session of its own, listens to SIGTERM."""
    with running(command(free_port(), "stays"), {}, tmp_path / "log", GRACE_S) as child:
        processes = tree(child, 2)
    assert gone(processes, 5)  # killed, and perhaps not yet buried


def test_an_engine_left_behind_by_its_server_is_ended(tmp_path: Path) -> None:
    with running(command(free_port(), "stays"), {}, tmp_path / "log", GRACE_S) as child:
        processes = tree(child, 2)
        processes[1].kill()
        assert gone(processes[1:], 10)
        while child.status is None:
            time.sleep(0.02)
        assert child.status == 128 + signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "terminated", "killed"])
def test_nothing_outlives_us(end: signal.Signals, tmp_path: Path) -> None:
    """A process that holds a server ends in three ways; a deaf server and its engine end with it."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with running(command(free_port(), "stays"), {}, tmp_path / "log", GRACE_S) as child:
                tree(child, 2)
                (tmp_path / "ready").touch()
                time.sleep(60)
        finally:
            os._exit(0)
    us = psutil.Process(pid)
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    processes = us.children(recursive=True)
    assert len(processes) >= 3  # guard, server, engine
    os.kill(pid, end)
    os.waitpid(pid, 0)
    assert gone(processes)


def test_a_server_is_given_what_it_needs_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    secret = {
        "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x", "GITHUB_TOKEN": "x", "VLLM_API_KEY": "x", "MY_PASSWORD": "x",
        "DATABASE_URL": "postgres://a:b@c", "NPM_CONFIG__AUTH": "x", "LLAMA_ARG_API_KEY": "x",
        "DOCKER_AUTH_CONFIG": "x", "http_proxy": "http://me:pw@proxy",
    }  # fmt: skip
    for name, value in (kept | secret).items():
        monkeypatch.setenv(name, value)
    tell = "import json, os; print(json.dumps(dict(os.environ)))"
    with running([sys.executable, "-c", tell], {"ASKED": "1"}, tmp_path / "log", GRACE_S) as child:
        while child.status is None:
            time.sleep(0.02)
    seen = json.loads((tmp_path / "log").read_text())
    assert kept.items() <= seen.items()
    assert (seen["ASKED"], seen["PATH"]) == ("1", os.environ["PATH"])
    assert secret.keys() & seen.keys() == set()
