"""Serving speed: time to first token, time between tokens, tokens per second."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .client import Client, Stream, at_once
from .record import Percentiles

REQUESTS = 6
_FEWEST, _ENOUGH_S = 2, 30.0
_ROUNDS = 2
_TOKENS = 32
_WORDS = "the river carries water from the mountains to the sea and the towns on its banks live from it "


@dataclass(frozen=True)
class Figures:
    """The fields of `record.Serving` of the same names."""

    requests: int
    prompt_tokens: int | None
    ttft_ms: float | None
    itl_ms: Percentiles | None
    tokens_per_second: dict[int, float]


def measure(client: Client, concurrency: int) -> Figures:
    """One warm-up request, then REQUESTS one after another, then rounds of `concurrency` concurrent ones; fewer of both
    on a slow server."""
    prompts = map(prompt, itertools.count())
    client.stream(next(prompts), _TOKENS)
    alone: list[Stream] = []
    started = time.perf_counter()
    while len(alone) < REQUESTS and (len(alone) < _FEWEST or time.perf_counter() - started < _ENOUGH_S):
        alone.append(client.stream(next(prompts), _TOKENS))
    speeds = {1: _tokens(alone) / (time.perf_counter() - started)}
    if concurrency > 1:
        rounds = _ROUNDS if time.perf_counter() - started < _ENOUGH_S / 2 else 1
        each = [list(itertools.islice(prompts, rounds)) for _ in range(concurrency)]
        started = time.perf_counter()
        together = at_once(lambda mine: [client.stream(text, _TOKENS) for text in mine], each)
        speeds[concurrency] = _tokens(list(itertools.chain(*together))) / (time.perf_counter() - started)
    firsts = [stream.times[0] for stream in alone if stream.times]
    gaps = [gap for stream in alone for gap in np.diff(stream.times)]
    counts = [stream.prompt_tokens for stream in alone if stream.prompt_tokens is not None]
    return Figures(
        len(alone), round(sum(counts) / len(counts)) if counts else None,
        float(np.median(firsts)) * 1000 if firsts else None, percentiles(gaps), speeds,
    )  # fmt: skip


def prompt(number: int) -> str:
    """About 40 words, the first of them unique, so that no request finds another's prefix in the cache."""
    return f"{number}: {_WORDS * 2}"


def _tokens(streams: Sequence[Stream]) -> int:
    """Generated tokens; where the server does not count them, chunks: about one token each."""
    return sum(s.completion_tokens if s.completion_tokens is not None else len(s.times) for s in streams)


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """In milliseconds; None of nothing."""
    if not len(seconds):
        return None
    p50, p95, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 95, 99]).tolist()
    return Percentiles(p50=p50, p95=p95, p99=p99)
