"""Arguments that make llama.cpp's server render a chat template as transformers and other servers do."""

from typing import Any

from ..calibrate.chat_template import rendered
from ..core.errors import BadInput

_MESSAGES = [{"role": "user", "content": "a"}]
_SWITCHES = ("enable_thinking",)


def template_arguments(tokenizer: Any) -> dict[str, bool]:
    """The arguments {name: value} with which the tokenizer's chat template renders as it does without any; mostly none.

    llama.cpp's server always passes `enable_thinking`, and passes false where it does not recognise the thinking format
    in the template's text (server_context and common/chat.cpp). Other servers and transformers leave it undefined. A
    template that treats undefined as true then gives another prompt in llama.cpp: one with an empty thought.
    """
    if not getattr(tokenizer, "chat_template", None):
        return {}
    plain = _rendered(tokenizer, {})
    out = {}
    for name in _SWITCHES:
        on, off = (_rendered(tokenizer, {name: value}) for value in (True, False))
        if plain == on != off:
            out[name] = True
    return out


def _rendered(tokenizer: Any, arguments: dict[str, bool]) -> str | None:
    try:
        return rendered(tokenizer, _MESSAGES, prompt=True, arguments=arguments)
    except BadInput:
        return None
