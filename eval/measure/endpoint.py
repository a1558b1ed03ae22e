"""A model behind an OpenAI-compatible completions endpoint: log-probabilities of given tokens, and greedy text.

Prompts are sent as token ids, so that the server cannot add a BOS token or tokenize differently from the original. The
log-probabilities of a prompt's tokens come from `echo` with `logprobs`, which vLLM has; a server without is refused.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from quantpress.core.errors import BadInput

from .divergence import Windows
from .likelihood import Pair, Room
from .statistics import Array

_AT_ONCE = 4  # requests
_SECONDS = 600.0


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
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(_SECONDS, connect=10.0))
        served = {entry.get("id"): entry for entry in self._json("GET", "/models", None).get("data", [])}
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
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        choice = self._completion(body)
        given = choice.get("logprobs") or {}
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
            body = {"prompt": self.room.prompt(ids, new_tokens), "max_tokens": new_tokens, "temperature": 0}
            return str(self._completion(body | ({"stop": list(stop)[:4]} if stop else {})).get("text", ""))

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(one, prompts))

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = self._json("POST", "/completions", {"model": self.model} | body).get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise BadInput(f"{self.url}/completions: the answer has no choices; is this an OpenAI-compatible server?")
        choice: dict[str, Any] = choices[0]
        return choice

    def _json(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        where = self.url + path
        try:
            answer = self._client.request(method, where, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BadInput(
                f"{where}: no answer ({str(error) or type(error).__name__}); is the server running?"
            ) from None
        if answer.status_code != 200:
            said = " ".join(answer.text.split())[:200]
            raise BadInput(f"{where}: the server answers {answer.status_code}: {said}")
        try:
            document = answer.json()
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise BadInput(f"{where}: the answer is not a JSON object; does --url end in /v1?")
        return document


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
