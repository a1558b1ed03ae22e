"""Recipes that nobody means: each has to be refused in one short line, or be read, at once."""

import random
from copy import deepcopy
from typing import Any

import yaml

_NESTED = 3000
_WORDS = (
    "x",
    "rtn",
    "gptq",
    "re:(",
    "*",
    "",
    "é",
    "\u202e",
    "[bold]",
    "3%",
    "-5%",
    "inf%",
    "../x",
    "int4",
    "self",
    "x\ny",
)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 4, 10**30, -(10**18), 1.5, float("nan"), float("inf"), [], [[]], [1], ["rtn"], {},
    {"name": []}, {"name": "rtn", "x": 1}, {"x": {"y": 1}}, b"\xff", *_WORDS,
)  # fmt: skip
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 30))
TEXTS = {
    "an alias bomb": BOMB,
    "a bomb of merge keys": MERGED,
    "an alias inside itself": "weights: &a [*a]",
    "a mapping inside itself": "weights: &a {x: *a}",
    "a date that is none": "description: 2026-99-99",
    "a time that is none": "description: 2026-01-01 99:99:99",
    "a date": "description: 2026-01-01",
    "a huge integer": "calibration: {samples: " + "9" * 5000 + "}",
    "a huge number in sixties": "calibration: {samples: 1" + ":59" * 60000 + "}",
    "a huge exponent": "calibration: {samples: 1.0e+99999}",
    "nested lists": "weights: " + "[" * _NESTED + "]" * _NESTED,
    "nested lists that do not end": "weights: " + "[" * _NESTED,
    "nested mappings": "weights: " + "{a: " * _NESTED + "1" + "}" * _NESTED,
    "indented mappings": "".join(" " * i + "a:\n" for i in range(600)),
    "a list as key": "? [a]\n: 1",
    "a mapping as key": "? {a: 1}\n: 1",
    "a number as key": "1: 2",
    "null as key": "weights: {null: 2}",
    "an unhashable key within": "weights: {? [a] : 1}",
    "tags": "weights: !!python/object/apply:os.system ['true']",
    "binary": "description: !!binary gIGC",
    "binary that is none": "description: !!binary ***",
    "a set": "weights: !!set {a, b}",
    "an ordered mapping": "weights: !!omap [a: 1]",
    "pairs that are none": "weights: !!pairs [1, 2]",
    "an integer that is none": "calibration: {samples: !!int x}",
    "a float that is none": "calibration: {samples: !!float x}",
    "a timestamp that is none": "calibration: {samples: !!timestamp x}",
    "a surrogate": 'description: "\\ud800"',
    "control characters": 'description: "\\x1b[2J\\0"',
    "two documents": "a: 1\n---\nb: 2",
    "a directive": "%YAML 9.9\n---\na: 1",
    "a tab": "weights:\n\tbits: 4",
    "a long value": "method: " + "x" * 100_000,
    "a long key": "x" * 100_000 + ": 1",
    "a long pattern": "ignore: ['re:" + "x" * 100_000 + "']",
    "a list for a name": "method: {name: [gptq]}",
    "a mapping for a name": "method: {name: {gptq: 1}}",
    "a list for a transform's name": "transforms: [{name: [awq]}]",
    "a list for a target's name": "targets: [{name: [vllm]}]",
    "a list for a type": "weights: {type: [int4]}",
    "a mapping for a type": "activations: {type: {}}",
    "a list for a format": "formats: [[gptq]]",
    "a list of lists": "targets: [[vllm]]",
    "many problems": "overrides: [" + ", ".join("{x: 1}" for _ in range(2000)) + "]",
    "many unknown keys": "\n".join(f"k{i}: 1" for i in range(5000)),
    "an expression that overflows": "ignore: ['re:x{99999999999}']",
    "an expression that nests": "ignore: ['re:" + "(" * 500 + "x" + ")" * 500 + "']",
    "an expression that repeats repeats": "ignore: ['re:(((x{1,1000}){1,1000}){1,1000}){1,1000}']",
    "an open expression": "ignore: ['re:(']",
    "a fuzzy expression": "ignore: ['re:(?:proj){e<=3}']",
}  # fmt: skip


def mutated(document: dict[str, Any], seed: int) -> str:
    """The text of a recipe in which a few things, chosen by `seed`, are something else or gone."""
    chosen = random.Random(seed)
    changed = yaml.safe_load(yaml.safe_dump(document))
    for _ in range(chosen.randint(1, 3)):
        place, key = chosen.choice(_places(changed) or [({0: 0}, 0)])
        value = deepcopy(chosen.choice(_VALUES))
        if chosen.random() < 0.15:
            del place[key]
        elif isinstance(place, dict) and chosen.random() < 0.15:
            place[value if isinstance(value, str | int | float | bytes) else str(value)] = place.pop(key)
        else:
            place[key] = value
    text: str = yaml.dump(changed, allow_unicode=True)
    if chosen.random() < 0.2:
        at = chosen.randrange(len(text) + 1)
        text = text[:at] + chosen.choice("[]{}:&*!|>%@\"'\t\0#-,") + text[at + chosen.randint(0, 2) :]
    return text


def _places(node: Any) -> list[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in items for place in ((node, key), *_places(child))]
