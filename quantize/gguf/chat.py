"""What a chat template has to be told so that llama.cpp's server renders it as everybody else does."""

from typing import Any

from jinja2.exceptions import TemplateError

_MESSAGES = [{"role": "user", "content": "a"}]
_SWITCHES = ("enable_thinking",)


def template_arguments(tokenizer: Any) -> dict[str, bool]:
    """The arguments {name: value} that leave the tokenizer's chat template as it is without any; mostly none.

    llama.cpp's server always gives a template `enable_thinking`, and false where it does not recognise from the
    template's text how the model thinks (server_context and common/chat.cpp). Other servers and transformers leave it
    undefined, so a template that treats undefined as true makes another prompt there: an answer after an empty thought.
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
        text: str = tokenizer.apply_chat_template(_MESSAGES, tokenize=False, add_generation_prompt=True, **arguments)
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    return text
