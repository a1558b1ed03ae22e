"""Load: requests that arrive at a fixed average rate, as `vllm bench serve --request-rate` sends and counts them.

vLLM's vllm/benchmarks/serve.py: gaps between arrivals are drawn from an exponential distribution (a Poisson process);
time to first token is from the request to the first chunk; inter-token latency from chunk to chunk; goodput, requests a
second that met every limit (there --goodput ttft:… tpot:…, tpot being the time after the first token over the tokens).
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .client import Client, Refused, ServerError, Stream
from .record import Load
from .timing import percentiles, prompt

_TOKENS = 32  # of an answer
_PATIENCE_S = 120.0  # beyond the last arrival


@dataclass(frozen=True)
class Wanted:
    """rate: requests a second; seconds: in which they arrive; ttft_ms, tpot_ms: the limits of goodput."""

    rate: float = 1.0
    seconds: float = 60.0
    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0


def arrivals(wanted: Wanted, seed: int = 0) -> list[float]:
    """Seconds from the start at which requests are sent: a Poisson process, the same for both models compared."""
    draw = random.Random(seed)
    found, at = [], draw.expovariate(wanted.rate)
    while at < wanted.seconds:
        found.append(at)
        at += draw.expovariate(wanted.rate)
    return found or [0.0]


def measure_load(client: Client, wanted: Wanted, tell: Callable[[str], None] = lambda line: None) -> Load:
    """Send requests for `wanted.seconds`, each when its time comes however many are under way, and count what came."""
    more: dict[str, Any] = {"ignore_eos": True}
    try:
        client.stream(prompt(-1), _TOKENS, **more)
    except Refused:
        more = {}
    times = arrivals(wanted)
    done: list[Stream] = []
    failed: list[str] = []

    def ask(number: int) -> None:
        try:
            done.append(client.stream(prompt(number), _TOKENS, **more))
        except ServerError as error:
            failed.append(str(error))

    started = time.perf_counter()
    threads = []
    for number, at in enumerate(times):
        time.sleep(max(0.0, started + at - time.perf_counter()))
        threads.append(threading.Thread(target=ask, args=(number,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(max(0.0, started + wanted.seconds + _PATIENCE_S - time.perf_counter()))
    took = time.perf_counter() - started
    tell(f"{len(done)} of {len(times)} requests answered in {took:.0f} s")
    return counted(list(done), len(times), took, wanted, failed[0] if failed else None)


def counted(done: list[Stream], sent: int, took: float, wanted: Wanted, error: str | None = None) -> Load:
    """What `done` streams of `sent` requests amount to in `took` seconds."""
    answered = [stream for stream in done if stream.times]
    good = sum(
        stream.times[0] * 1000 <= wanted.ttft_ms and time_per_token(stream) * 1000 <= wanted.tpot_ms
        for stream in answered
    )
    gaps = [float(gap) for stream in answered for gap in np.diff(stream.times)]
    tokens = sum(_tokens(stream) for stream in answered)
    return Load(
        rate=wanted.rate, seconds=took, requests=sent, completed=len(answered), error=error,
        ttft_ms=percentiles([stream.times[0] for stream in answered]),
        itl_ms=percentiles(gaps), tpot_ms=percentiles([time_per_token(stream) for stream in answered]),
        goodput=good / took, limit_ttft_ms=wanted.ttft_ms, limit_tpot_ms=wanted.tpot_ms,
        requests_per_second=len(answered) / took, tokens_per_second=tokens / took,
    )  # fmt: skip


def time_per_token(stream: Stream) -> float:
    """Seconds a token after the first: from the first chunk to the last, over the tokens but one."""
    return (stream.times[-1] - stream.times[0]) / max(1, _tokens(stream) - 1)


def _tokens(stream: Stream) -> int:
    """Generated tokens; chunks where the server does not count them."""
    return stream.completion_tokens if stream.completion_tokens is not None else len(stream.times)
