"""Times and rates are those of the stream, of requests one after another and of several at once."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from quantpress.exports.serving import timing as figures
from quantpress.exports.serving.client import Stream


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
    found = figures._percentiles(list(seconds))
    assert found is not None
    assert found.p95 == pytest.approx(1000 * sorted(seconds)[int(0.95 * 499)], rel=0.01)
    assert figures._percentiles([]) is None
