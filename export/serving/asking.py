"""How a model is asked so that it answers at length: many chat models end plain prompts at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantpress.calibrate.chat_template import rendered
from quantpress.calibrate.tokens import encode

from .client import Client, Messages, Prompt, Refused

_ENOUGH = 8  # tokens of an answer, to check anything on it
_GOES_ON: dict[str, Any] = {"ignore_eos": True}  # vLLM, SGLang, llama.cpp


@dataclass(frozen=True)
class Way:
    """prompt: what is sent for a text; more: fields of the request; words: how, for the record; tried: what was tried
    in vain, for the message of a failure."""

    prompt: Callable[[str], Prompt]
    more: Mapping[str, Any]
    words: str = ""
    tried: str = ""


def find_way(client: Client, tokenizer: Any, lacks: Mapping[str, str], text: str, tokens: int) -> Way:
    """The plainest way in which `text` is answered with some tokens; the plain one where none is."""
    ways = [Way(str, {})]
    if getattr(tokenizer, "chat_template", None):

        def templated(text: str) -> Prompt:
            if {"token_ids", "plain_prompts"} & lacks.keys():
                return rendered(tokenizer, turn(text), prompt=True)
            return template_ids(tokenizer, turn(text))

        ways += [Way(templated, {}, " (in its chat template)"),
                 Way(templated, _GOES_ON, " (in its chat template, with ignore_eos)")]  # fmt: skip
    ways.append(Way(str, _GOES_ON, " (with ignore_eos)"))
    for way in ways:
        try:
            answer = client.complete(way.prompt(text), tokens, **way.more)
        except Refused:
            continue
        if answer.text.strip() and (answer.completion_tokens is None or answer.completion_tokens >= _ENOUGH):
            return way
    return Way(str, {}, tried=", as it is, with ignore_eos and in the chat template, if there is one")


def turn(text: str) -> Messages:
    """A chat of one turn."""
    return ({"role": "user", "content": text},)


def prompt_ids(tokenizer: Any, text: str, lacks: Mapping[str, str]) -> list[int]:
    """The tokens the server makes of a prompt; one that lacks plain prompts wraps them in the chat template."""
    if "plain_prompts" in lacks:
        return template_ids(tokenizer, turn(text))
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def template_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """The tokens of a chat by the artifact's own template."""
    return encode(tokenizer, rendered(tokenizer, messages, prompt=True))
