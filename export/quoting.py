"""Values of a user's or a model's as each language of the launch files takes them: nothing in one is ever run."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

_RUNS = re.compile(r'([\\$`"])')  # what a shell acts on between double quotes


def in_double_quotes(text: str) -> str:
    """Text as it is written between a shell's double quotes."""
    return _RUNS.sub(r"\\\1", text)


def variable(name: str, default: str) -> str:
    """An environment variable or its default, for between double quotes."""
    inner = in_double_quotes(default).replace("}", "\\}")  # which would end it
    return f"${{{name}:-{inner}}}"


def shell_word(text: str, blanks: Mapping[str, str]) -> str:
    """One word of a shell command. blanks: what fills each, in the shell's own terms for between double quotes."""
    pieces = re.split(f"({'|'.join(map(re.escape, blanks))})", text) if blanks else [text]
    if not blanks.keys() & set(pieces):
        return shlex.quote(text)
    return '"' + "".join(blanks[piece] if piece in blanks else in_double_quotes(piece) for piece in pieces) + '"'


def comment(text: str) -> str:
    """Text on the one line of a comment."""
    return " ".join(text.split())


def for_compose(value: Any) -> Any:
    """A document in which compose, which substitutes variables in every value, finds none."""
    return _strings(value, lambda text: text.replace("$", "$$"))


def for_kubernetes(value: Any) -> Any:
    """Commands, arguments and environment in which Kubernetes, which substitutes $(NAME), finds none."""
    return _strings(value, lambda text: text.replace("$(", "$$("))


def _strings(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strings(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value
