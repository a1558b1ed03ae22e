"""The checks of a server. Each returns what it saw, or raises Failed or Skipped with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantpress.core.text import common_prefix

from .agreement import prompt_ids, template_ids
from .client import Answer, Client, Messages, Refused, at_once
from .outcome import Failed, Skipped, made
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
_STREAM_TOKENS = (24, 96, 256)  # a busy machine may deliver several chunks of a fast server at once
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
    answer = on.client.complete(_PROMPTS[0], _TOKENS)
    _says_something(answer)
    if answer.completion_tokens is not None and answer.completion_tokens > _TOKENS:
        raise Failed(f"{answer.completion_tokens} tokens, and max_tokens was {_TOKENS}")
    _counts_alike(on, _PROMPTS[0], answer.prompt_tokens)
    return f"continues {_quoted(_PROMPTS[0])} with {_quoted(answer.text)}"


def _says_something(answer: Answer) -> None:
    """Raise for an answer without text: Skipped where the model itself generated its end token first."""
    if not answer.text and answer.finish_reason == "stop" and answer.completion_tokens == 1:
        raise Skipped("the model ends its answer at once, as chat models may; the agreement check asks it in a chat")
    if not answer.text:
        raise Failed("the answer is empty")


def _chat(on: CheckedServer) -> str:
    """The chat endpoint completes what the artifact's own template makes of the messages."""
    if not getattr(on.tokenizer, "chat_template", None):
        raise Skipped("the artifact has no chat template")
    ids = template_ids(on.tokenizer, _MESSAGES)
    answer = on.client.chat(_MESSAGES, _TOKENS)
    if not answer.text:
        raise Failed("the answer is empty")
    if answer.prompt_tokens is not None and answer.prompt_tokens != len(ids):
        raise Failed(f"the server's prompt has {answer.prompt_tokens} tokens, the artifact's template makes {len(ids)}")
    if {"token_ids", "plain_prompts"} & on.running.lacks.keys():
        return f"as many prompt tokens as the artifact's template makes ({len(ids)}): {_quoted(answer.text)}"
    plain = on.client.complete(ids, _TOKENS)
    if settled(plain.text).strip() != settled(answer.text).strip():
        raise Failed(f"{_quoted(answer.text)}, and the artifact's template completed gives {_quoted(plain.text)}")
    return f"as the artifact's template completed: {_quoted(answer.text)}"


def _streaming(on: CheckedServer) -> str:
    """Chunks arrive while the answer is generated, and together they equal the unstreamed answer."""
    for tokens in _STREAM_TOKENS:
        whole = on.client.complete(_PROMPTS[2], min(tokens, on.max_model_len // 2))
        _says_something(whole)
        stream = on.client.stream(_PROMPTS[2], min(tokens, on.max_model_len // 2))
        if "text/event-stream" not in stream.content_type:
            raise Failed(f"content type {stream.content_type!r} in place of text/event-stream")
        if settled(stream.text) != settled(whole.text):
            raise Failed(f"streamed {_quoted(stream.text)}, unstreamed {_quoted(whole.text)}")
        if len(stream.times) < 2:
            raise Failed(f"{len(stream.times)} chunk for an answer of {tokens} tokens")
        spread = (stream.times[-1] - stream.times[0]) / stream.seconds
        if spread >= _STREAMED_SHARE:
            return f"{len(stream.times)} chunks over {spread:.0%} of the time, equal to the unstreamed answer"
    raise Failed(f"{len(stream.times)} chunks came at once, at the end: the answer is not streamed")


def _done(on: CheckedServer) -> str:
    if not on.client.stream(_PROMPTS[2], 2).done:
        raise Failed("the stream ends without [DONE]")
    return "the stream ends with [DONE]"


def _stop(on: CheckedServer) -> str:
    whole = on.client.complete(_PROMPTS[2], _TOKENS).text
    stops = [whole[i : i + 3] for i in range(len(whole) // 2, len(whole) - 2)]
    stop = next((s for s in stops if "\ufffd" not in s), None)  # a replacement character stands for a cut one
    if stop is None:
        raise Skipped(f"the answer {_quoted(whole)} is too short to be stopped in the middle")
    expected = whole[: whole.index(stop)]
    answer = on.client.complete(_PROMPTS[2], _TOKENS, stop=[stop])
    left_in = whole.startswith(answer.text) and expected + stop in answer.text and len(answer.text) < len(whole)
    if left_in and "stop_left_out" in on.running.lacks:
        return f"ends at {_quoted(stop)}; {on.running.lacks['stop_left_out']}"
    if answer.text != expected:
        raise Failed(f"with stop {_quoted(stop)} {_quoted(answer.text)}, expected {_quoted(expected)}")
    if answer.finish_reason != "stop":
        raise Failed(f"finish_reason {answer.finish_reason!r} after a stop sequence")
    return f"ends before {_quoted(stop)}"


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
    whole = on.client.complete(_UNICODE, _TOKENS)
    _counts_alike(on, _UNICODE, whole.prompt_tokens)
    stream = on.client.stream(_UNICODE, _TOKENS)
    if settled(stream.text) != settled(whole.text):
        raise Failed(f"streamed {_quoted(stream.text)}, unstreamed {_quoted(whole.text)}")
    return f"the prompt arrives whole, and is continued {_quoted(whole.text)}"


def _concurrent(on: CheckedServer) -> str:
    """Concurrent answers reach the right requests; rounding may make them differ from answers made one by one."""
    prompts = [_PROMPTS[i % len(_PROMPTS)] + "," * (i // len(_PROMPTS)) for i in range(max(2, on.concurrency))]
    alone = [on.client.complete(prompt, _TOKENS).text for prompt in prompts]
    together = [answer.text for answer in at_once(lambda p: on.client.complete(p, _TOKENS), prompts)]
    for i, text in enumerate(together):
        likeness = [common_prefix(text, other) for other in alone]
        if likeness[i] < max(likeness):
            other = prompts[likeness.index(max(likeness))]
            raise Failed(f"{_quoted(prompts[i])} was answered as {_quoted(other)}: {_quoted(text)}")
        if alone[i] and not likeness[i]:
            raise Failed(f"{_quoted(prompts[i])}: together {_quoted(text)}, alone {_quoted(alone[i])}")
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    return f"{len(prompts)} concurrent requests are answered, {same} exactly as when asked alone"


def _greedy(on: CheckedServer) -> str:
    first, second = (on.client.complete(_PROMPTS[1], _TOKENS).text for _ in range(2))
    if first != second:
        raise Failed(f"the same greedy request gives {_quoted(first)} and {_quoted(second)}")
    return "the same request, the same answer"


def _seed(on: CheckedServer) -> str:
    def sampled(seed: int) -> str:
        answer = on.client.complete(_PROMPTS[1], _TOKENS, temperature=1.0, seed=seed)
        _says_something(answer)
        return answer.text

    first, second = sampled(1), sampled(1)
    if first != second:
        raise Failed(f"seed 1 gives {_quoted(first)} and {_quoted(second)}")
    if all(sampled(seed) == first for seed in (2, 3, 4)):
        raise Failed(f"seeds 1 to 4 at temperature 1 all give {_quoted(first)}: nothing is sampled")
    return "the same seed, the same answer; another seed, another answer"


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
    "done": _done,
    "stop": _stop,
    "context": _context,
    "unicode": _unicode,
    "concurrent": _concurrent,
    "greedy": _greedy,
    "seed": _seed,
    "loopback": _loopback,
}


def settled(text: str) -> str:
    """`text` without a final character that max_tokens cut in two: some servers show a part of it, others nothing."""
    return text.rstrip("\ufffd")


def _counts_alike(on: CheckedServer, text: str, counted: int | None) -> None:
    ours = len(prompt_ids(on.tokenizer, text, on.running.lacks))
    if counted is not None and counted != ours:
        raise Failed(f"the server counts {counted} tokens in {_quoted(text)}, the artifact's tokenizer {ours}")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
