"""Times and rates are those of the stream, of requests one after another and of several at once."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from quantpress.exports.serving import timing as figures
from quantpress.exports.serving.client import Stream
from quantpress.exports.serving.load import Wanted, arrivals, counted, measure_load, time_per_token


class Timed:
    """A client whose answers take a known time: the first token after 20 ms, then one every 5 ms."""

    def __init__(self, tokens: int = 9, counted: bool = True) -> None:
        self.tokens, self.counted = tokens, counted
        self.prompts: list[str] = []
        self.most = self._now = 0
        self._lock = threading.Lock()

    def stream(self, prompt: str, max_tokens: int, **_: Any) -> Stream:
        with self._lock:
            self.prompts.append(prompt)
            self._now += 1
            self.most = max(self.most, self._now)
        times = tuple(0.02 + 0.005 * i for i in range(self.tokens))
        time.sleep(times[-1])
        with self._lock:
            self._now -= 1
        count = self.tokens if self.counted else None
        return Stream("x", times, times[-1], True, "text/event-stream", "length", 40, count)


@pytest.mark.parametrize("counted", [True, False])
def test_figures_of_a_known_server(counted: bool) -> None:
    client = Timed(counted=counted)
    found = figures.measure(client, 3)  # type: ignore[arg-type]
    assert (found.requests, found.prompt_tokens) == (figures.REQUESTS, 40)
    assert found.ttft_ms == pytest.approx(20)
    assert found.itl_ms is not None
    assert found.itl_ms.model_dump() == pytest.approx({"p50": 5, "p95": 5, "p99": 5})
    alone, together = found.tokens_per_second[1], found.tokens_per_second[3]
    assert 0 < alone <= 9 / 0.06  # 9 tokens in 60 ms, and what a busy machine adds
    assert 0 < together <= 3 * 9 / 0.06
    assert client.most == 3
    assert len(set(client.prompts)) == len(client.prompts) == 1 + figures.REQUESTS + 2 * 3  # none finds another's cache


def test_a_slow_server_is_asked_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_ENOUGH_S", 0.0)
    client = Timed()
    assert figures.measure(client, 2).requests == 2  # type: ignore[arg-type]
    assert len(client.prompts) == 1 + 2 + 2


def test_percentiles_are_of_all_gaps() -> None:
    seconds = np.random.default_rng(0).random(500)
    found = figures.percentiles(list(seconds))
    assert found is not None
    assert found.p95 == pytest.approx(1000 * sorted(seconds)[int(0.95 * 499)], rel=0.01)
    assert figures.percentiles([]) is None


def test_requests_arrive_as_a_poisson_process_the_same_each_time() -> None:
    wanted = Wanted(rate=5.0, seconds=400.0)
    times = arrivals(wanted)
    assert times == arrivals(wanted)
    assert len(times) == pytest.approx(2000, rel=0.1)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() == pytest.approx(0.2, rel=0.1)  # of an exponential distribution the mean is the deviation
    assert times[-1] < 400


def test_load_counts_as_vllm_bench_serve_does() -> None:
    """Of two streams one meets both limits: the other's first token came too late."""
    soon = Stream("x", (0.1, 0.15, 0.2), 0.2, True, "", "length", 40, 3)
    late = Stream("x", (2.0, 2.05, 2.1), 2.1, True, "", "length", 40, 3)
    assert time_per_token(soon) == pytest.approx(0.05)
    found = counted([soon, late], 3, 10.0, Wanted(ttft_ms=1000, tpot_ms=60), "status 500")
    assert (found.requests, found.completed, found.error) == (3, 2, "status 500")
    assert found.goodput == pytest.approx(0.1)
    assert found.requests_per_second == pytest.approx(0.2)
    assert found.tokens_per_second == pytest.approx(0.6)
    assert found.ttft_ms is not None
    assert found.ttft_ms.p50 == pytest.approx(1050)
    assert found.itl_ms is not None
    assert found.itl_ms.p50 == pytest.approx(50)
    assert counted([soon], 1, 10.0, Wanted(tpot_ms=40)).goodput == 0
    assert counted([], 1, 10.0, Wanted()).ttft_ms is None


def test_requests_are_sent_when_their_time_comes_whatever_is_under_way() -> None:
    client = Timed(tokens=60)  # an answer takes 0.3 s, and four are sent in that time
    found = measure_load(client, Wanted(rate=12.0, seconds=1.0))  # type: ignore[arg-type]
    assert found.completed == found.requests > 4
    assert client.most > 1
    assert found.seconds < 60
