"""The tokens a server makes of a text, in whichever way it tells them."""

from collections.abc import Callable, Sequence
from typing import Any

from .client import Client, Messages, Refused, ServerError


def text_ids(client: Client, text: str) -> tuple[int, ...] | None:
    """Of a plain prompt; None where the server tells no ids."""
    ways: tuple[Callable[[], Any], ...] = (
        # vLLM and SGLang: TokenizeCompletionRequest
        lambda: client.post("/tokenize", {"model": client.model, "prompt": text, "add_special_tokens": True}),
        # llama.cpp: tools/server/README.md
        lambda: client.post("/tokenize", {"content": text, "add_special": True, "parse_special": True}),
        lambda: {"tokens": client.complete(text, 1, return_token_ids=True).prompt_ids},
    )
    return _first(ways)


def chat_ids(client: Client, messages: Messages) -> tuple[int, ...] | None:
    """Of a chat by the server's own template; None where the server tells no ids."""
    asked = {"messages": list(messages), "add_generation_prompt": True}

    def templated() -> Any:
        prompt = client.post("/apply-template", asked)["prompt"]
        return client.post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})

    ways: tuple[Callable[[], Any], ...] = (
        lambda: client.post("/tokenize", {"model": client.model, **asked}),
        templated,
        lambda: {"tokens": client.chat(messages, 1, return_token_ids=True).prompt_ids},
    )
    return _first(ways)


def decoded(client: Client, ids: Sequence[int]) -> str | None:
    """The text that the server makes of ids; None where it has no such path."""
    try:
        answer = client.post("/detokenize", {"model": client.model, "tokens": list(ids)})
    except (Refused, ServerError):
        return None
    text = answer.get("prompt", answer.get("content"))  # vLLM, llama.cpp
    return text if isinstance(text, str) else None


def _first(ways: Sequence[Callable[[], Any]]) -> tuple[int, ...] | None:
    """What the first way gives that the server has. A path it does not have is refused; other kinds of servers take a
    request for something else and answer with no tokens."""
    for way in ways:
        try:
            tokens = way().get("tokens")
        except (Refused, KeyError):
            continue
        if isinstance(tokens, (list, tuple)) and tokens and all(isinstance(token, int) for token in tokens):
            return tuple(tokens)
    return None


def unlike(wanted: Sequence[int], found: Sequence[int], bos: int | None) -> str:
    """How the server's tokens differ from those wanted, with the likeliest cause."""
    if bos is not None and list(found) == [bos, *wanted]:
        return f"BOS ({bos}) comes twice"
    if bos is not None and [bos, *found] == list(wanted):
        return f"BOS ({bos}) is missing"
    front = list(found[: len(found) - len(wanted)])
    if len(set(front)) == 1 and list(found[len(front) :]) == list(wanted):
        return f"BOS, or what stands in its place ({front[0]}), is put before it {len(front)} time(s)"
    at = next((i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        at = min(len(wanted), len(found))
    show = [list(ids[at : at + 4]) for ids in (wanted, found)]
    return f"{len(found)} tokens in place of {len(wanted)}, from token {at} on {show[1]} in place of {show[0]}"
