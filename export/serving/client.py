"""A client of OpenAI-compatible servers that records when each chunk of a stream arrives."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from httpx_sse import SSEError, connect_sse

_TIMEOUT_S = 300.0  # for one answer; a CPU is slow
_CONNECT_S = 10.0
_QUOTED = 300
# Servers close connections that are idle or have served many requests, and a request sent at that moment would fail as
# if the server were gone. So each request opens its own connection, and its time includes connecting.
_LIMITS = httpx.Limits(max_keepalive_connections=0)


class ServerError(Exception):
    """The server did not answer as it should; the message is one line."""


class Refused(ServerError):
    """An HTTP status other than 200, with the server's message."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"status {status}: {' '.join(_message(said).split())[:_QUOTED]}")
        self.status, self.said = status, said


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Prompt = str | Sequence[int]  # text or token ids
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Step:
    """One generated token: its log-probability, and those of the likeliest tokens by id."""

    token: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class Answer:
    """An unstreamed answer. Token counts are the server's; None where it gives none."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    choice: dict[str, Any] = field(repr=False)
    prompt_ids: tuple[int, ...] | None = None  # the server's own, where it was asked for them and gives them
    texts: tuple[str, ...] = ()  # of all choices

    @property
    def was_cut(self) -> bool:
        """Whether it ended at the length that was asked for."""
        return self.finish_reason == "length"

    def steps(self) -> list[Step]:
        """The generated tokens; empty when the server gives no log-probabilities or no token ids.

        Empty too where some are missing, and the places of the others not known: llama.cpp tells nothing of a token
        that ends inside a character. One that ends the answer need not be listed.
        """
        found = _steps(self.choice.get("logprobs") or {})
        missing = 0 if self.completion_tokens is None else self.completion_tokens - len(found)
        return found if missing <= (self.finish_reason == "stop") else []


@dataclass(frozen=True)
class Stream:
    """A streamed answer. times: arrival of each chunk with text, in seconds from the request; seconds: in total."""

    text: str
    times: tuple[float, ...]
    seconds: float
    done: bool  # [DONE] came, and came last
    content_type: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


def at_once(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`work` on all items concurrently; raises the first error.

    The threads are daemons, so that a server that hangs does not keep an interrupted process alive.
    """
    results: dict[int, _Result] = {}
    errors: list[Exception] = []

    def run(number: int) -> None:
        try:
            results[number] = work(items[number])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(items))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]


class Client:
    """Requests to one model of a server at `url` (without /v1). Every failure is a ServerError."""

    def __init__(
        self, url: str, model: str | None, api_key: str | None = None, *, loopback: bool = True,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:  # fmt: skip
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy set in the environment is not meant for a server on this machine.
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=timeout, trust_env=not loopback, limits=_LIMITS
        )
        self._model, self._timeout_s = model, timeout_s
        self._hangs = False

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    @property
    def model(self) -> str:
        """The model's name in requests: the given one, else the first that the server lists."""
        if self._model is None:
            listed = self.models()
            if not listed:
                raise ServerError("the server lists no model")
            self._model = str(listed[0]["id"])
        return self._model

    def models(self) -> list[dict[str, Any]]:
        """The models listed by GET /v1/models."""
        listed = self._checked(lambda: self._http.get("/v1/models")).get("data")
        if not isinstance(listed, list) or not all(isinstance(m, dict) and "id" in m for m in listed):
            raise ServerError(f"/v1/models: no list of models with ids in `data`: {str(listed)[:_QUOTED]}")
        return listed

    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer that the server takes, as vLLM lists them; None where it lists nothing."""
        told = [model.get("max_model_len") for model in self.models() if model["id"] == self.model]
        return told[0] if told and isinstance(told[0], int) else None

    def end_text(self) -> str | None:
        """The end token's text, as llama.cpp's server tells it at GET /props; None where there is no such path."""
        try:
            told = self._checked(lambda: self._http.get("/props")).get("eos_token")
        except (Refused, ServerError):
            return None
        return told if isinstance(told, str) and told else None

    def alive(self) -> bool:
        """Whether the server still answers a short request."""
        try:
            self.complete("Hello", 1)
        except ServerError:
            return False
        return True

    def complete(self, prompt: Prompt, max_tokens: int, **more: Any) -> Answer:
        """POST /v1/completions; greedy unless `more` overrides the temperature."""
        body = self._body(max_tokens, more) | {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
        return _answer(self._checked(lambda: self._http.post("/v1/completions", json=body)))

    def chat(self, messages: Messages, max_tokens: int, **more: Any) -> Answer:
        """POST /v1/chat/completions; greedy unless `more` overrides the temperature."""
        body = self._body(max_tokens, more) | {"messages": list(messages)}
        return _answer(self._checked(lambda: self._http.post("/v1/chat/completions", json=body)))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST of a server's own; Refused where it has no such path."""
        return self._checked(lambda: self._http.post(path, json=body))

    def stream(self, prompt: Prompt, max_tokens: int, **more: Any) -> Stream:
        """POST /v1/completions with `stream`; raises ServerError when the stream breaks off or is not one."""
        body = self._body(max_tokens, more) | {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
        return self._streamed("/v1/completions", body)

    def chat_stream(self, messages: Messages, max_tokens: int, **more: Any) -> Stream:
        """POST /v1/chat/completions with `stream`, as `stream`."""
        return self._streamed("/v1/chat/completions", self._body(max_tokens, more) | {"messages": list(messages)})

    def leave(self, prompt: Prompt, max_tokens: int, **more: Any) -> bool:
        """Start a streamed answer and close the connection after its first chunk; whether there was one."""
        body = self._body(max_tokens, more) | {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
        self._check_patience()
        try:
            with connect_sse(self._http, "POST", "/v1/completions", json=body | {"stream": True}) as events:
                if events.response.status_code != httpx.codes.OK:
                    raise Refused(events.response.status_code, events.response.read().decode(errors="replace"))
                return next(events.iter_sse(), None) is not None
        except SSEError as error:
            raise ServerError(f"not a stream of events: {error}") from error
        except httpx.TransportError as error:
            raise self._failure(error, "no first chunk") from error

    def _streamed(self, path: str, body: dict[str, Any]) -> Stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        texts: list[str] = []
        times: list[float] = []
        done, finish = False, None
        usage: dict[str, Any] = {}
        self._check_patience()
        started = time.perf_counter()
        try:
            with connect_sse(self._http, "POST", path, json=body) as events:
                response = events.response
                if response.status_code != httpx.codes.OK:
                    raise Refused(response.status_code, response.read().decode(errors="replace"))
                for event in events.iter_sse():
                    now = time.perf_counter() - started
                    if done:
                        raise ServerError(f"the stream goes on after [DONE]: {event.data[:_QUOTED]}")
                    if event.data == "[DONE]":
                        done = True
                        continue
                    chunk = _parsed(event.data)
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices", []):
                        finish = choice.get("finish_reason") or finish
                        if piece := choice.get("text") or (choice.get("delta") or {}).get("content"):
                            texts.append(piece)
                            times.append(now)
        except SSEError as error:
            raise ServerError(f"not a stream of events: {error}") from error
        except httpx.TransportError as error:
            raise self._failure(error, f"the stream broke off after {len(times)} chunks") from error
        return Stream(
            "".join(texts), tuple(times), time.perf_counter() - started, done,
            response.headers.get("content-type", ""), finish,
            usage.get("prompt_tokens"), usage.get("completion_tokens"),
        )  # fmt: skip

    def _body(self, max_tokens: int, more: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "max_tokens": max_tokens, "temperature": 0} | more

    def _check_patience(self) -> None:
        """Raise ServerError after a request has timed out: a server that hangs is waited for once only."""
        if self._hangs:
            raise ServerError(
                f"not asked: the server hangs, an answer did not come within {self._timeout_s:g} s before"
            )

    def _failure(self, error: httpx.TransportError, what: str) -> ServerError:
        if isinstance(error, httpx.TimeoutException):
            self._hangs = True
            return ServerError(f"{what} within {self._timeout_s:g} s")
        return ServerError(f"{what}: {type(error).__name__} {error}".strip())

    def _checked(self, send: Any) -> dict[str, Any]:
        self._check_patience()
        try:
            response: httpx.Response = send()
        except httpx.TransportError as error:
            raise self._failure(error, "no answer") from error
        if response.status_code != httpx.codes.OK:
            raise Refused(response.status_code, response.text)
        return _parsed(response.text)


def _message(said: str) -> str:
    """The text of an error: {"error": {"message": …}}, {"message": …}, {"detail": …} or plain text."""
    try:
        document = json.loads(said)
    except ValueError:
        return said
    inner = document.get("error", document) if isinstance(document, dict) else document
    words = inner.get("message", inner.get("detail")) if isinstance(inner, dict) else inner
    return words if isinstance(words, str) else said


def _parsed(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        raise ServerError(f"not JSON: {text[:_QUOTED]}") from None
    if not isinstance(document, dict):
        raise ServerError(f"not a JSON object: {text[:_QUOTED]}")
    if document.get("error"):
        raise ServerError(f"an error in place of an answer: {str(document['error'])[:_QUOTED]}")
    return document


def _answer(document: dict[str, Any]) -> Answer:
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ServerError(f"no `choices` in the answer: {str(document)[:_QUOTED]}")
    choice, usage = choices[0], document.get("usage") or {}
    texts = [one["message"].get("content") if "message" in one else one.get("text") for one in choices]
    ids = choice.get("prompt_token_ids") or document.get("prompt_token_ids")
    return Answer(
        texts[0] or "", choice.get("finish_reason"), usage.get("prompt_tokens"), usage.get("completion_tokens"), choice,
        tuple(ids) if isinstance(ids, list) else None,
        tuple(text or "" for text in texts),
    )  # fmt: skip


def _steps(found: dict[str, Any]) -> list[Step]:
    """llama.cpp lists `content` with ids, vLLM in chats with tokens as `token_id:7` on request, in completions too, but
    in parallel lists."""
    if "content" in found:
        rows = found["content"] or []
        if not all("id" in row or str(row.get("token")).startswith("token_id:") for row in rows):
            return []
        return [
            Step(_number(r), r["logprob"], {_number(t): t["logprob"] for t in r.get("top_logprobs") or []})
            for r in rows
        ]
    tokens = found.get("tokens") or []
    if not tokens or not all(str(token).startswith("token_id:") for token in tokens):
        return []
    tops = found.get("top_logprobs") or [{}] * len(tokens)
    return [
        Step(_id(token), logprob, {_id(name): value for name, value in (top or {}).items()})
        for token, logprob, top in zip(tokens, found["token_logprobs"], tops, strict=True)
    ]


def _number(row: dict[str, Any]) -> int:
    return int(row["id"]) if "id" in row else _id(row["token"])


def _id(name: str) -> int:
    return int(name.removeprefix("token_id:"))
