"""A model behind an OpenAI-compatible completions endpoint: log-probabilities of given tokens, and greedy text.

Prompts are sent as token ids, so that the server cannot add a BOS token or tokenize differently from the original. The
log-probabilities of a prompt's tokens come from `echo` with `logprobs`, which vLLM has; a server without is refused.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
import numpy as np

from quantpress.core.errors import BadInput
from quantpress.exports.serving.client import Client, ServerError

from .divergence import Windows
from .likelihood import Pair, Room
from .statistics import Array

_AT_ONCE = 4  # requests
_SECONDS = 600.0  # for one answer
_Answered = TypeVar("_Answered")


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served: the address of an OpenAI-compatible server, up to /v1, and the model's name there.

    api_key: sent as a bearer token.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)


class ServedModel:
    """The model at an endpoint, asked for log-probabilities and text.

    positions: of the original, by its config. room: the smaller of that and what the server says it takes (vLLM's
    max_model_len), less the one token that a server generates for every request.
    Raises BadInput, one line, when nothing answers there or the model is not served.
    """

    def __init__(self, endpoint: Endpoint, positions: int) -> None:
        self.url, self.model = endpoint.url.rstrip("/"), endpoint.model
        base = self.url.removesuffix("/v1")
        try:
            self._client = Client(base, self.model, endpoint.api_key, loopback=False, timeout_s=_SECONDS)
        except httpx.InvalidURL as error:
            raise BadInput(f"{self.url}: {error}; write http://host:port/v1") from None
        served = {entry["id"]: entry for entry in self._asked(self._client.models)}
        if self.model not in served:
            there = ", ".join(map(str, served)) or "none"
            raise BadInput(f"{self.url}: no model {self.model!r} is served there; there are {there} (--model)")
        length = min(positions, served[self.model].get("max_model_len") or positions)
        self.room = Room(length - 1, length)

    def check_window(self, window: int) -> None:
        """Raise BadInput for evaluation windows that the server would refuse."""
        if window > self.room.scored:
            raise BadInput(
                f"evaluation.window {window}: {self.url} takes prompts of at most {self.room.scored} tokens, its "
                f"context less the token it generates; --set evaluation.window={self.room.scored} measures within them"
            )

    def token_log_probs(self, ids: Sequence[int]) -> tuple[Array, list[bool]]:
        """log p of each of `ids` but the first, given those before it, and whether it was the most likely token."""
        answer = self._asked(lambda: self._client.complete(ids, 1, echo=True, logprobs=1))
        given = answer.choice.get("logprobs") or {}
        values, tops = given.get("token_logprobs") or [], given.get("top_logprobs") or []
        if len(values) < len(ids) or any(value is None for value in values[1 : len(ids)]):
            raise BadInput(
                f"{self.url}: the server does not give the log-probabilities of a prompt's tokens (completions with "
                f"echo and logprobs: {len(values)} of {len(ids)} came back); perplexity and tasks need them"
            )
        likely = [
            not top or value >= max(top.values())
            for value, top in zip(values[1 : len(ids)], tops[1 : len(ids)] or [None] * (len(ids) - 1), strict=True)
        ]
        return np.array(values[1 : len(ids)], dtype=np.float64), likely

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy decoding would give exactly this continuation."""

        def one(pair: Pair) -> tuple[float, bool]:
            values, likely = self.token_log_probs(self.room.pair(pair))
            count = len(pair[1])
            return float(values[len(values) - count :].sum()), all(likely[len(likely) - count :])

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(one, pairs))

    def continue_text(self, prompts: Sequence[list[int]], new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """The greedy continuation of each prompt."""

        def one(ids: list[int]) -> str:
            prompt, more = self.room.prompt(ids, new_tokens), {"stop": list(stop)[:4]} if stop else {}
            return self._asked(lambda: self._client.complete(prompt, new_tokens, **more)).text

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(one, prompts))

    def _asked(self, ask: Callable[[], _Answered]) -> _Answered:
        """What `ask` returns; an answer that is none becomes a BadInput."""
        try:
            return ask()
        except ServerError as error:
            raise BadInput(f"{self.url}: {error}; is it the address of an OpenAI-compatible server?") from None


def served_nll(server: ServedModel, text: Windows, on_window: Callable[[int, int], None]) -> Array:
    """-log p of every scored token [tokens] in nats."""
    done = 0

    def one(window: int) -> Array:
        values, _ = server.token_log_probs(text.tokens.ids[window].tolist())
        return -values[len(values) - int(text.scored[window]) :]

    out = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for values in pool.map(one, range(len(text.scored))):
            done += 1
            on_window(done, len(text.scored))
            out.append(values)
    return np.concatenate(out)
