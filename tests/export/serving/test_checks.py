"""Every check passes on a server that does what it should, and fails on one that does that thing wrong."""

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from quantpress.exports.serving.checks import CHECKS, CheckedServer, make
from quantpress.exports.serving.client import Client, ServerError, at_once
from quantpress.exports.serving.outcome import made
from quantpress.exports.serving.record import Check
from quantpress.exports.serving.starting import Running

from .fakes import Bytes, fake_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with fake_server(tmp_path_factory.mktemp("fake")) as found:
        yield found


def subject(server: Running, fault: str = "") -> CheckedServer:
    model = f"fake:{fault}" if fault else "fake"
    return CheckedServer(server, Client(server.url, model), Bytes(), 512, 4)


def check(name: str, on: CheckedServer) -> Check:
    return made(name, lambda: CHECKS[name](on), on.running.lacks)


def test_a_good_server_passes_every_check(server: Running) -> None:
    told: list[Check] = []
    found = make(subject(server), told.append)
    assert [(c.name, c.status) for c in found] == [(name, "pass") for name in CHECKS], found
    assert told == found


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        ("empty", "completion", "the answer to 'The capital of France is' is empty, as it is"),
        ("html", "completion", "not JSON: <html>Bad gateway"),
        ("ascii", "unicode", "the server counts"),
        ("other-template", "chat", "the artifact's template makes"),
        ("plain", "streaming", "not a stream of events"),
        ("at-once", "streaming", "chunks came at once"),
        ("wrong-text", "streaming", "streamed ' "),
        ("closes", "streaming", "broke off after 3 chunks"),
        ("breaks-midway", "streaming", "engine died"),
        ("no-done", "done", r"ends without \[DONE\]"),
        ("no-stop", "stop", "expected '"),
        ("any-length", "context", "is answered"),
        ("breaks", "context", "status 500"),
        ("mute", "context", "does not say so: status 400: internal"),
        ("crosstalk", "concurrent", "was answered as"),
        ("not-greedy", "greedy", "the same greedy request gives"),
        ("no-seed", "seed", "seed 1 gives"),
        ("always-greedy", "seed", "nothing is sampled"),
        ("ends-always", "completion", "is empty, as it is, with ignore_eos and in the chat template"),
        ("chat-wrong-text", "chat stream", "streamed ' "),
        ("one-is-empty", "n", "n=2 gives 2 answers: ' .*', ''"),
        ("not-likeliest", "logprobs", "has log-probability -2.000, the likeliest -0.100"),
        ("few-rows", "logprobs", "3 rows of log-probabilities for 24 tokens"),
        ("other-schema", "json", "not by the schema"),
        ("no-json", "json", "no JSON: 'Yes, it is.'"),
    ],
)
def test_a_planted_fault_fails_its_check(server: Running, fault: str, name: str, words: str) -> None:
    found = check(name, subject(server, fault))
    assert found.status == "fail"
    assert re.search(words, found.reason), found.reason


def test_a_model_that_ends_at_once_is_asked_to_go_on(server: Running) -> None:
    found = make(subject(server, "ends"))
    assert [(c.name, c.status) for c in found[1:]] == [(name, "pass") for name in list(CHECKS)[1:]], found
    assert "with ignore_eos)" in found[1].reason


def test_json_that_its_length_cuts_off_is_not_held_against_a_model(server: Running) -> None:
    """Small models fill the blanks that JSON allows, to the end."""
    found = check("json", subject(server, "blanks"))
    assert found.status == "pass"
    assert "the beginning of such an object, cut at" in found.reason


def test_nothing_passes_on_empty_answers(server: Running) -> None:
    passed = {c.name for c in make(subject(server, "ends-always")) if c.status == "pass"}
    assert passed <= {"models", "context", "json", "loopback"}


def test_a_server_that_answers_once_says_so(server: Running) -> None:
    found = check("n", subject(server, "once"))
    assert (found.status, found.reason) == ("skip", "the server answers once, whatever n says")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_ctrl_c_does_not_wait_for_a_server_that_hangs(tmp_path: Path) -> None:
    """Neither for its answers, asked for all at once, nor for the server."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with fake_server(tmp_path) as found:
                client = Client(found.url, "fake:hangs")
                (tmp_path / "asked").touch()
                at_once(lambda prompt: client.complete(prompt, 1), ["a", "b"])
        except KeyboardInterrupt:
            os._exit(130)
        finally:
            os._exit(1)
    end = time.monotonic() + 30
    while not (tmp_path / "asked").exists() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)
    server = psutil.Process(pid).children(recursive=True)
    assert len(server) == 2
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert not psutil.wait_procs(server, timeout=1)[1]


def test_a_server_that_hangs_is_waited_for_once(server: Running) -> None:
    on = replace(subject(server), client=Client(server.url, "fake:hangs", timeout_s=0.3))
    first, second, third = (check(name, on) for name in ("completion", "streaming", "done"))
    assert first.reason == "no answer within 0.3 s"
    assert second.reason.startswith("not asked: the server hangs")
    assert second.seconds + third.seconds < 0.3
    assert {first.status, second.status, third.status} == {"fail"}


def test_errors_of_requests_at_once_are_raised(server: Running) -> None:
    with pytest.raises(ServerError, match="not JSON"):
        at_once(lambda prompt: Client(server.url, "fake:html").complete(prompt, 1), ["a", "b"])


def test_what_a_server_lacks_is_skipped_with_the_reason(server: Running) -> None:
    lame = replace(server, lacks={"done": "it never says [DONE]"})
    assert check("done", subject(lame)).model_dump(exclude={"seconds"}) == {
        "name": "done", "status": "skip", "reason": "it never says [DONE]",
    }  # fmt: skip


def test_a_server_that_leaves_the_stop_sequence_in_must_still_stop(server: Running) -> None:
    lame = replace(server, lacks={"stop_left_out": "it leaves it in"})
    assert check("stop", subject(lame)).status == "pass"
    assert check("stop", subject(lame, "no-stop")).status == "fail"


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        ("lists-another", "models", "the list holds another, and not fake"),
        ("exposed", "loopback", "other machines can reach it: 0.0.0.0:"),
        ("dies-of-long-prompts", "context", "no answer"),
    ],
)
def test_a_planted_fault_of_the_process_fails_its_check(fault: str, name: str, words: str, tmp_path: Path) -> None:
    with fake_server(tmp_path, fault) as found:
        seen = check(name, subject(found))
    assert seen.status == "fail"
    assert words in seen.reason
