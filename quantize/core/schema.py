"""Building blocks of documents: strict models for recipes, lenient ones for records; fractions, name patterns."""

import fnmatch
import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from .patterns import check_regex, regex_matches

_UNITS = {"": 1} | {unit: 1000**k for k, unit in enumerate("KMGTP", 1)}
_UNITS |= {f"{unit}I": 1024**k for k, unit in enumerate("KMGTP", 1)}
_SIZE = re.compile(r"(\d*\.?\d+)\s*([KMGTP]I?)?B?", re.IGNORECASE)


class Strict(BaseModel):
    """A model that rejects unknown keys and values of another type, such as `true` for a number.

    Fields may opt out with strict=False: lists for tuples, and floats, since YAML reads 1e-2 as text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Section(BaseModel):
    """A part of a JSON document that a run wrote; unknown keys are ignored."""

    model_config = ConfigDict(frozen=True)


def first_problem(error: ValidationError) -> str:
    """The place and the reason of the first problem, in one line."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _fraction(value: Any) -> Any:
    """'3%' is 0.03; a bare number is the fraction itself, and above 1 is taken for a forgotten sign."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    if isinstance(value, int | float | str) and not isinstance(value, bool) and _number(value) > 1:
        raise ValueError(
            f"{value} is {_number(value):.0%}; write {value}% for {value} percent, or {_number(value):.0%}"
        )
    return value


def _number(value: float | str) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0


def _bytes(value: Any) -> Any:
    """'4GB' and '4G' are 4 * 10**9, '24GiB' and '24Gi' are 24 * 2**30; a number is bytes."""
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found:
        return int(float(found[1]) * _UNITS[(found[2] or "").upper()])
    if isinstance(value, str | bool):
        raise ValueError(f"{value!r} is no size; write 6000000000, 4GB or 24GiB")
    return value


def _above_one(value: float) -> float | str:
    """As it can be read again."""
    return f"{100 * value:.12g}%" if value > 1 else value


def named(value: Any) -> Any:
    """`awq` is `{name: awq}`."""
    return {"name": value} if isinstance(value, str) else value


def _pattern(value: str) -> str:
    if not value:
        raise ValueError("an empty pattern matches nothing")
    if value.startswith("re:"):
        check_regex(value[3:])
    return value


Lax = Field(strict=False)
Fraction = Annotated[
    float,
    Lax,
    BeforeValidator(_fraction, json_schema_input_type=float | str),
    PlainSerializer(_above_one, when_used="json"),
]
Bytes = Annotated[int, Lax, BeforeValidator(_bytes, json_schema_input_type=int | str)]
Pattern = Annotated[str, AfterValidator(_pattern)]


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern`, a glob or `re:` and a regular expression that matches from the start, matches `name`."""
    if pattern.startswith("re:"):
        return regex_matches(pattern[3:], name)
    return fnmatch.fnmatchcase(name, pattern)
