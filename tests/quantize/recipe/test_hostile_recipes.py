"""Whatever a recipe holds: it is read, or refused in one line of a screen at most, at once."""

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from quantpress.core.errors import BadInput
from quantpress.core.schema import matches
from quantpress.recipe.loading import load, parse, shipped, text_of

from ...hostile_recipes import TEXTS, mutated

_HARMLESS = {"a surrogate", "control characters", "an expression that repeats repeats"}


def outcome(file: Path, text: str) -> str:
    """What became of a recipe; whatever is no BadInput fails the test."""
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    started = time.process_time()
    try:
        load(str(file))
        return "read"
    except BadInput as error:
        said = str(error)
        assert said.isprintable()
        assert len(said) <= 1900
        return "refused"
    finally:
        assert time.process_time() - started < 5, text[:300]


@pytest.mark.parametrize("what", TEXTS)
def test_what_no_recipe_holds_is_refused(what: str, tmp_path: Path) -> None:
    assert outcome(tmp_path / "r.yaml", TEXTS[what]) == ("read" if what in _HARMLESS else "refused")


def fuzzed(file: Path, count: int) -> Counter[str]:
    documents = [yaml.safe_load(text_of(name)) for name in shipped()]
    return Counter(outcome(file, mutated(documents[seed % len(documents)], seed)) for seed in range(count))


def test_changed_recipes_are_read_or_refused(tmp_path: Path) -> None:
    assert fuzzed(tmp_path / "r.yaml", 200).keys() == {"read", "refused"}


@pytest.mark.slow
def test_many_changed_recipes(tmp_path: Path, tell: Callable[[str], None]) -> None:
    counts = fuzzed(tmp_path / "r.yaml", 5000)
    tell(f"changed recipes: {dict(counts)}")
    assert min(counts.values()) > 200


def test_an_override_is_bounded_as_the_file_is(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: rtn")
    overrides = ["weights.bits=[" + "[" * 100, "a." * 5000 + "b=1", "x" * 5000, "weights=&a [*a]", "weights.type={}"]
    overrides += ["description=2026-99-99", "name=" + "9" * 5000, "method.name=[gptq]"]
    for override in overrides:
        with pytest.raises(BadInput) as caught:
            load(str(tmp_path / "r.yaml"), [override])
        assert len(str(caught.value)) < 700


def test_a_file_too_large_for_a_recipe_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# x\n" * 60_000)
    with pytest.raises(BadInput, match="240000 bytes; a recipe has at most 200000"):
        load(str(tmp_path / "r.yaml"))


def test_patterns_match_as_python_does_and_end() -> None:
    for pattern, name in ((".*(gate|up)_proj", "a.gate_proj"), (r"^(?!lm_head).*\d+$", "layers.12"), ("a", "ba")):
        assert matches(f"re:{pattern}", name) == bool(re.match(pattern, name))
    with pytest.raises(BadInput, match=r"takes more than 0.5 s on 'aaaa.*repetitions inside repetitions"):
        matches("re:(a|aa)+$", "a" * 60 + "!")
    with pytest.raises(BadInput, match="not a regular expression"):
        parse({"name": "x", "ignore": ["re:("]})
