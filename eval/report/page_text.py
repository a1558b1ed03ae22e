"""Text of the page: names, shortened text, and text that is safe inside Markdown."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup, escape

from quantpress.exports.servers import SERVERS
from quantpress.recipe import Recipe

__all__ = ["cell", "first_word", "program", "sentence", "squeezed", "unbroken", "without_defaults"]


def sentence(text: str) -> str:
    """Capitalised; a name such as vLLM stays as it is."""
    return text if text[1:2].isupper() else text[:1].upper() + text[1:]


def program(name: str) -> str:
    """The name of a server, as users know it."""
    known = {"transformers": "transformers serve", "url": "a running server"}
    known |= {server.name: server.variants[0].loader.label for server in SERVERS.values() if server.variants}
    return known.get(name, name)


def without_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that differ from the defaults; parsed again, they give the same recipe."""
    out: dict[str, Any] = _beyond(dict(recipe), Recipe().model_dump(mode="json"))
    return out


def _beyond(value: Any, default: Any) -> Any:
    """`value` without the keys that equal those of `default`; another method stays whole."""
    if isinstance(value, list):
        return [_beyond(item, None) for item in value]
    if not isinstance(value, dict):
        return value
    known = default if isinstance(default, dict) else {}
    said = {k: v for k, v in value.items() if v != known.get(k) or (k == "name" and v is not None)}
    return {k: v if _is_another(v, known.get(k)) else _beyond(v, known.get(k)) for k, v in said.items()}


def _is_another(value: Any, default: Any) -> bool:
    """Whether `value` is another method than the default, whose keys cannot be compared."""
    both = isinstance(value, dict) and isinstance(default, dict) and "name" in default
    return both and value.get("name") != default["name"]


def cell(text: str) -> str:
    """Text escaped for one cell of a Markdown table."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def unbroken(text: str, names: Iterable[str]) -> Markup:
    """The text, escaped, in which no line ends inside one of `names`, such as w4a16-gptq, or inside an option."""
    known = [re.escape(str(escape(name))) for name in sorted(names, key=len, reverse=True)]
    each = "|".join(["(?P<option>--[a-z-]+)", *(rf"(?<![\w/-]){name}(?![\w/-])" for name in known)])
    escaped = str(escape(text))
    return Markup(re.sub(each, lambda m: f'<span class="{"option" if m["option"] else "name"}">{m[0]}</span>', escaped))


def first_word(text: str) -> str:
    """The first word of a text with the space before it; only the space where there is no word."""
    found = re.match(r"\s*\S+|\s+", text)
    return found.group() if found else ""


def squeezed(text: str) -> str:
    """Collapse blank lines to at most one in a row: a broken model writes hundreds."""
    return re.sub(r"\n[ \t]*(?:\n\s*)+\n", "\n\n", text)
