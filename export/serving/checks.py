"""The checks of a server. Each returns what it saw, or raises Failed or Skipped with the reason."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantpress.core.text import common_prefix

from .asking import Way, find_way, prompt_ids, template_ids
from .client import Answer, Client, Messages, Refused, Stream, at_once
from .outcome import Failed, Skipped, made, quoted
from .record import Check
from .starting import Running

_TOKENS = 24
_PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time there was a",
    "The three primary colours are",
    "In the beginning of spring the",
    "A good engineer always",
    "Music is",
    "The largest planet of the solar system",
)
_UNICODE = "Café naïve — Ω≈ç√ 東京 дом 😀👩‍🚀 \u05e9\u05dc\u05d5\u05dd:"
_MESSAGES: Messages = ({"role": "user", "content": "Name two colours. — 東京 😀"},)
_STREAM_TOKENS = (24, 96, 256, 256, 256)  # a busy machine may deliver several chunks of a fast server at once
_SCHEMA = {
    "type": "object", "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}}, "required": ["answer"],
    "additionalProperties": False,
}  # fmt: skip
_ALIKE = 5  # characters in which two greedy answers to one prompt agree
_TIE = 0.05  # log-probability: two tokens that a 16-bit sum may exchange
_PORTS = 3  # listed one by one in a message
_STREAMED_SHARE = 0.1  # of the answer's time that has to lie between its first and last chunk


@dataclass(frozen=True)
class CheckedServer:
    """The server under test. tokenizer: the artifact's own; max_model_len: tokens of prompt and answer."""

    running: Running
    client: Client
    tokenizer: Any
    max_model_len: int
    concurrency: int

    @cached_property
    def way(self) -> Way:
        """How prompts are asked: as they are, unless the model ends its answers at once."""
        return find_way(self.client, self.tokenizer, self.running.lacks, _PROMPTS[0], _TOKENS)

    def ask(self, text: str, tokens: int, **more: Any) -> Answer:
        """A completion that says something; raises Failed for an empty one."""
        answer = self.client.complete(self.way.prompt(text), tokens, **self.way.more, **more)
        if not answer.text.strip():
            raise Failed(f"the answer to {quoted(text)} is empty{self.way.tried}")
        return answer

    def stream(self, text: str, tokens: int) -> Stream:
        return self.client.stream(self.way.prompt(text), tokens, **self.way.more)


def make(subject: CheckedServer, tell: Callable[[Check], None] = lambda check: None) -> list[Check]:
    """Make every check, in order; those that the server lacks are skipped, with the reason."""
    found: list[Check] = []
    for name, check in CHECKS.items():
        found.append(made(name, lambda check=check: check(subject), subject.running.lacks))  # type: ignore[misc]
        tell(found[-1])
    return found


def _models(on: CheckedServer) -> str:
    names = [str(model["id"]) for model in on.client.models()]
    if on.client.model not in names:
        raise Failed(f"the list holds {', '.join(names) or 'nothing'}, and not {on.client.model}")
    return f"lists {on.client.model}"


def _completion(on: CheckedServer) -> str:
    answer = on.ask(_PROMPTS[0], _TOKENS)
    if answer.completion_tokens is not None and answer.completion_tokens > _TOKENS:
        raise Failed(f"{answer.completion_tokens} tokens, and max_tokens was {_TOKENS}")
    _counts_alike(on, _PROMPTS[0], on.client.complete(_PROMPTS[0], 1).prompt_tokens)
    return f"continues {quoted(_PROMPTS[0])} with {quoted(answer.text)}{on.way.words}"


def _chat(on: CheckedServer) -> str:
    """The chat endpoint completes what the artifact's own template makes of the messages."""
    if not getattr(on.tokenizer, "chat_template", None):
        raise Skipped("the artifact has no chat template")
    ids = template_ids(on.tokenizer, _MESSAGES)
    answer = _in_chat(on)
    if answer.prompt_tokens is not None and answer.prompt_tokens != len(ids):
        raise Failed(f"the server's prompt has {answer.prompt_tokens} tokens, the artifact's template makes {len(ids)}")
    if {"token_ids", "plain_prompts"} & on.running.lacks.keys():
        return f"as many prompt tokens as the artifact's template makes ({len(ids)}): {quoted(answer.text)}"
    plain = on.client.complete(ids, _TOKENS, **on.way.more)
    first, second = settled(plain.text).strip(), settled(answer.text).strip()
    # The same tokens, but one prompt may be read out of the server's cache: a near tie then falls the other way.
    if common_prefix(first, second) < min(_ALIKE, len(first), len(second)):
        raise Failed(f"{quoted(answer.text)}, and the artifact's template completed gives {quoted(plain.text)}")
    same = "as" if first == second else f"as, for {common_prefix(first, second)} characters,"
    return f"{same} the artifact's template completed: {quoted(answer.text)}"


def _in_chat(on: CheckedServer, tokens: int = _TOKENS, **more: Any) -> Answer:
    """A chat that is answered; raises Skipped without a template and Failed for an empty answer."""
    if not getattr(on.tokenizer, "chat_template", None):
        raise Skipped("the artifact has no chat template")
    answer = on.client.chat(_MESSAGES, tokens, **on.way.more, **more)
    if not answer.text.strip():
        raise Failed(f"the answer of the chat is empty{on.way.tried}")
    return answer


def _streaming(on: CheckedServer) -> str:
    """Chunks arrive while the answer is generated, and together they equal the unstreamed answer."""
    return _streams(on, lambda tokens: on.ask(_PROMPTS[2], tokens), lambda tokens: on.stream(_PROMPTS[2], tokens))


def _chat_streaming(on: CheckedServer) -> str:
    """The same of a chat."""
    return _streams(
        on, lambda tokens: _in_chat(on, tokens), lambda tokens: on.client.chat_stream(_MESSAGES, tokens, **on.way.more)
    )


def _streams(on: CheckedServer, asked: Callable[[int], Answer], streamed: Callable[[int], Stream]) -> str:
    for tokens in _STREAM_TOKENS:
        whole = asked(min(tokens, on.max_model_len // 2))
        stream = streamed(min(tokens, on.max_model_len // 2))
        if "text/event-stream" not in stream.content_type:
            raise Failed(f"content type {stream.content_type!r} in place of text/event-stream")
        if settled(stream.text) != settled(whole.text):
            raise Failed(f"streamed {quoted(stream.text)}, unstreamed {quoted(whole.text)}")
        if len(stream.times) < 2:
            raise Failed(f"{len(stream.times)} chunk for an answer of {tokens} tokens")
        spread = (stream.times[-1] - stream.times[0]) / stream.seconds
        if spread >= _STREAMED_SHARE:
            return f"{len(stream.times)} chunks over {spread:.0%} of the time, equal to the unstreamed answer"
    raise Failed(f"{len(stream.times)} chunks came at once, at the end: the answer is not streamed")


def _done(on: CheckedServer) -> str:
    stream = on.stream(_PROMPTS[2], _TOKENS)
    if not stream.text.strip():
        raise Failed(f"the streamed answer is empty{on.way.tried}")
    if not stream.done:
        raise Failed("the stream ends without [DONE]")
    return "the stream ends with [DONE]"


def _stop(on: CheckedServer) -> str:
    whole = on.ask(_PROMPTS[2], _TOKENS).text
    stops = [whole[i : i + 3] for i in range(len(whole) // 2, len(whole) - 2)]
    stop = next((s for s in stops if "\ufffd" not in s), None)  # a replacement character stands for a cut one
    if stop is None:
        raise Skipped(f"the answer {quoted(whole)} is too short to be stopped in the middle")
    expected = whole[: whole.index(stop)]
    answer = on.client.complete(on.way.prompt(_PROMPTS[2]), _TOKENS, **on.way.more, stop=[stop])
    left_in = whole.startswith(answer.text) and expected + stop in answer.text and len(answer.text) < len(whole)
    if left_in and "stop_left_out" in on.running.lacks:
        return f"ends at {quoted(stop)}; {on.running.lacks['stop_left_out']}"
    if answer.text != expected:
        raise Failed(f"with stop {quoted(stop)} {quoted(answer.text)}, expected {quoted(expected)}")
    if answer.finish_reason != "stop":
        raise Failed(f"finish_reason {answer.finish_reason!r} after a stop sequence")
    return f"ends before {quoted(stop)}"


def _context(on: CheckedServer) -> str:
    """A prompt that is too long is refused with the reason, and the server keeps running."""
    prompt = "word " * (2 * max(on.max_model_len, on.client.max_model_len() or 0))
    try:
        on.client.complete(prompt, _TOKENS)
    except Refused as refusal:
        if not 400 <= refusal.status < 500:
            raise Failed(f"a prompt over {on.max_model_len} tokens: {refusal}") from None
        if not any(
            word in refusal.said.lower() for word in ("context", "length", "too long", "max_model_len", "token")
        ):
            raise Failed(f"the refusal of a prompt that is too long does not say so: {refusal}") from None
        said = str(refusal)
    else:
        raise Failed(f"a prompt over {on.max_model_len} tokens is answered")
    if not on.client.alive():
        raise Failed(f"after a prompt over {on.max_model_len} tokens the server no longer answers")
    return f"{said}; and the server keeps running"


def _unicode(on: CheckedServer) -> str:
    _counts_alike(on, _UNICODE, on.client.complete(_UNICODE, 1).prompt_tokens)
    whole = on.ask(_UNICODE, _TOKENS)
    stream = on.stream(_UNICODE, _TOKENS)
    if settled(stream.text) != settled(whole.text):  # a prompt from the server's cache may be rounded otherwise
        whole = on.ask(_UNICODE, _TOKENS)
    if settled(stream.text) != settled(whole.text):
        raise Failed(f"streamed {quoted(stream.text)}, unstreamed {quoted(whole.text)}")
    return f"the prompt arrives whole, and is continued {quoted(whole.text)}"


def _concurrent(on: CheckedServer) -> str:
    """Concurrent answers reach the right requests; rounding may make them differ from answers made one by one."""
    prompts = [_PROMPTS[i % len(_PROMPTS)] + "," * (i // len(_PROMPTS)) for i in range(max(2, on.concurrency))]

    def answer(text: str) -> str:
        return on.client.complete(on.way.prompt(text), _TOKENS, **on.way.more).text

    alone = [answer(prompt) for prompt in prompts]
    if sum(bool(text.strip()) for text in alone) < len(alone) / 2:
        raise Failed(f"most of {len(alone)} answers are empty{on.way.tried}")
    together = at_once(answer, prompts)
    for i, text in enumerate(together):
        likeness = [common_prefix(text, other) for other in alone]
        if likeness[i] < max(likeness):
            other = prompts[likeness.index(max(likeness))]
            raise Failed(f"{quoted(prompts[i])} was answered as {quoted(other)}: {quoted(text)}")
        if alone[i] and not likeness[i]:
            raise Failed(f"{quoted(prompts[i])}: together {quoted(text)}, alone {quoted(alone[i])}")
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    return f"{len(prompts)} concurrent requests are answered, {same} exactly as when asked alone"


def _greedy(on: CheckedServer) -> str:
    first, second = (on.ask(_PROMPTS[1], _TOKENS).text for _ in range(2))
    if first != second:
        raise Failed(f"the same greedy request gives {quoted(first)} and {quoted(second)}")
    return "the same request, the same answer"


def _seed(on: CheckedServer) -> str:
    def sampled(seed: int) -> str:
        return on.ask(_PROMPTS[1], _TOKENS, temperature=1.0, seed=seed).text

    first, second = sampled(1), sampled(1)
    if first != second:
        raise Failed(f"seed 1 gives {quoted(first)} and {quoted(second)}")
    if all(sampled(seed) == first for seed in (2, 3, 4)):
        raise Failed(f"seeds 1 to 4 at temperature 1 all give {quoted(first)}: nothing is sampled")
    return "the same seed, the same answer; another seed, another answer"


def _several(on: CheckedServer) -> str:
    """n answers to one request."""
    try:
        answer = on.ask(_PROMPTS[1], _TOKENS, n=2, temperature=1.0, seed=1)
    except Refused as refusal:
        raise Skipped(f"the server refuses n=2: {refusal}") from None
    if len(answer.texts) == 1:
        raise Skipped("the server answers once, whatever n says")
    if len(answer.texts) != 2 or not all(text.strip() for text in answer.texts):
        raise Failed(f"n=2 gives {len(answer.texts)} answers: {', '.join(map(quoted, answer.texts))}")
    return f"{quoted(answer.texts[0])} and {quoted(answer.texts[1])}"


def _logprobs(on: CheckedServer) -> str:
    """What OpenAI's clients get with logprobs in a chat: a row for each token, the greedy token the likeliest."""
    try:
        answer = _in_chat(on, _TOKENS, logprobs=True, top_logprobs=3)
    except Refused as refusal:
        raise Skipped(f"the server refuses logprobs in chats: {refusal}") from None
    rows = (answer.choice.get("logprobs") or {}).get("content") or []
    if not rows:
        raise Skipped("the server gives none in chats")
    for row in rows:
        tops = [top["logprob"] for top in row.get("top_logprobs") or ()]
        if row["logprob"] > 0 or (tops and not on.way.more and row["logprob"] < max(tops) - _TIE):
            raise Failed(f"the greedy token {row['token']!r} has log-probability {row['logprob']:.3f}, the likeliest "
                         f"{max(tops, default=0):.3f}")  # fmt: skip
    # A row more for the end token; llama.cpp has one for tokens that make up a character together.
    counted = answer.completion_tokens
    if counted is not None and not counted / 2 <= len(rows) <= counted + 1:
        raise Failed(f"{len(rows)} rows of log-probabilities for {counted} tokens")
    return f"{len(rows)} rows, each greedy token the likeliest"


def _abort(on: CheckedServer) -> str:
    """A client that leaves in the middle of an answer leaves a server that still answers."""
    most = max(_TOKENS, on.max_model_len // 2)
    if not on.client.leave(on.way.prompt(_PROMPTS[2]), most, **on.way.more):
        raise Failed("the stream holds no chunk")
    started = time.perf_counter()
    on.ask(_PROMPTS[2], 2)
    took = time.perf_counter() - started
    return f"left an answer of {most} tokens after its first chunk; the next came after {took:.1f} s"


def _json(on: CheckedServer) -> str:
    """An answer held to a JSON schema."""
    if not getattr(on.tokenizer, "chat_template", None):
        raise Skipped("the artifact has no chat template")
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": _SCHEMA}}
    try:
        answer = on.client.chat(_MESSAGES, 2 * _TOKENS, response_format=form)
    except Refused as refusal:
        raise Skipped(f"the server refuses a JSON schema: {refusal}") from None
    try:
        found = json.loads(answer.text)
    except json.JSONDecodeError as error:
        # Small models fill the blanks that JSON allows until the answer's length ends it.
        if answer.text.lstrip().startswith("{") and error.pos >= len(answer.text.rstrip()) and answer.was_cut:
            return f"{quoted(answer.text)}, the beginning of such an object, cut at {2 * _TOKENS} tokens"
        raise Failed(f"no JSON: {quoted(answer.text)}") from None
    if not isinstance(found, dict) or found.get("answer") not in ("yes", "no"):
        raise Failed(f"not by the schema: {quoted(answer.text)}")
    return f"{quoted(answer.text)}, as its schema says"


def _loopback(on: CheckedServer) -> str:
    child = on.running.child
    if child is None:
        raise Skipped("this server was not started here")
    if exposed := child.exposed():
        raise Failed(f"listens where other machines can reach it: {', '.join(exposed)}")
    if not child.listening():
        raise Skipped("this system does not list listening sockets")
    found = sorted(child.listening())
    if len(found) > _PORTS:
        return f"listens on {len(found)} ports of {', '.join(sorted({ip for ip, _ in found}))}"
    return f"listens on {', '.join(f'{ip}:{port}' for ip, port in found)}"


CHECKS: dict[str, Callable[[CheckedServer], str]] = {
    "models": _models,
    "completion": _completion,
    "chat": _chat,
    "streaming": _streaming,
    "chat stream": _chat_streaming,
    "done": _done,
    "stop": _stop,
    "context": _context,
    "unicode": _unicode,
    "concurrent": _concurrent,
    "greedy": _greedy,
    "seed": _seed,
    "n": _several,
    "logprobs": _logprobs,
    "abort": _abort,
    "json": _json,
    "loopback": _loopback,
}


def settled(text: str) -> str:
    """`text` without a final character that max_tokens cut in two: some servers show a part of it, others nothing."""
    return text.rstrip("\ufffd")


def _counts_alike(on: CheckedServer, text: str, counted: int | None) -> None:
    ours = len(prompt_ids(on.tokenizer, text, on.running.lacks))
    if counted is not None and counted != ours:
        raise Failed(f"the server counts {counted} tokens in {quoted(text)}, the artifact's tokenizer {ours}")
