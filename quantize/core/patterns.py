"""Regular expressions of users and models, as Python's `re` reads them, at a bounded cost. No torch here."""

import re
from functools import lru_cache

import regex

from .errors import BadInput

_LENGTH = 2000
_SECONDS = 0.5  # for one name; an honest expression takes microseconds


def check_regex(expression: str) -> None:
    """Raise ValueError for what is no regular expression, or one that servers would read otherwise than we do."""
    if len(expression) > _LENGTH:
        raise ValueError(f"a regular expression of {len(expression)} characters; the limit is {_LENGTH}")
    if re.search(r"\{\s*[a-z]", expression):
        raise ValueError("not a regular expression: a letter after {, which is no number of repetitions")
    for compiler in (re, regex):  # servers read it with the first
        try:
            compiler.compile(expression)
        except Exception as error:  # also OverflowError, RecursionError
            raise ValueError(f"not a regular expression: {error}") from error


def regex_matches(expression: str, name: str) -> bool:
    """Whether `expression` matches `name` from the start. Raises BadInput where that takes too long, or it is none."""
    try:
        return _compiled(expression).match(name, timeout=_SECONDS) is not None
    except TimeoutError:
        raise BadInput(
            f"the regular expression {expression[:80]!r} takes more than {_SECONDS} s on {name[:80]!r}; repetitions "
            "inside repetitions do that"
        ) from None


@lru_cache(1000)
def _compiled(expression: str) -> regex.Pattern[str]:
    try:
        check_regex(expression)
    except ValueError as error:
        raise BadInput(f"{expression[:80]!r}: {error}") from None
    return regex.compile(expression)
