"""Recipe files: found by name or path, read strictly, changed by --set."""

from pathlib import Path

import pytest

from quantpress.core.errors import BadInput
from quantpress.numbers.types import Grid
from quantpress.recipe import Gptq, Rtn
from quantpress.recipe.loading import load, parse, shipped


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    assert load(written(tmp_path, "weights: {bits: 8}")).name == "mine"
    assert load(written(tmp_path, "weights: {bits: 8}", "my own (2).yml")).name == "my-own-2-"
    assert load(written(tmp_path, "name: other")).name == "other"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found an empty file"),
        ("- weights", "found list"),
        ("weights: [", "not YAML"),
        ("weights: {bits: 4, bits: 8}", "key 'bits' twice"),
        ("1: 2", "1: Keys should be strings"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(BadInput) as error:
        load(written(tmp_path, text))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="cannot be read"):
        load(str(path))
    with pytest.raises(BadInput, match="cannot be read"):
        load("x" * 5000)


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert "w4a16-gptq" in shipped()
    with pytest.raises(BadInput, match=r"no such file and no shipped recipe; did you mean .*w4a16-gptq[,?]"):
        load("w4a16-gtpq")


def test_an_unknown_recipe_like_no_other_is_told_where_they_are_listed() -> None:
    with pytest.raises(BadInput, match=r"no shipped recipe; `quantpress recipes` lists them$"):
        load("zzz")


def test_set_changes_the_document(tmp_path: Path) -> None:
    path = written(tmp_path, "weights: {bits: 8, group_size: 32}")
    recipe = load(
        path,
        [
            "weights.bits=3",
            "method.damp=2e-2",
            "ignore=['*.down_proj']",
            "gates.max_perplexity_increase=3%",
            "evaluation.windows=2",
            "weights.symmetric=false",
            "weights.bits=2",
        ],
    )
    assert recipe.weights == Grid(bits=2, group_size=32, symmetric=False)
    assert recipe.method == Gptq(damp=0.02)
    assert recipe.ignore == ("*.down_proj",)
    assert recipe.gates.max_perplexity_increase == pytest.approx(0.03)
    assert recipe.evaluation is not None
    assert recipe.evaluation.windows == 2
    assert load(path, ["method.name=rtn"]).method == Rtn()
    assert load(path, ["evaluation=null"]).evaluation is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("weights.bits=9", "weights.bits: Input should be 2, 3, 4, 5, 6, 7 or 8, not 9"),
        ("weights.bits=four", "weights.bits"),
        ("weights.bitz=4", "weights.bitz: unknown key, did you mean 'bits'?"),
        ("weights.bits.deep=4", "'bits' is not a mapping in this recipe"),
        ("overrides.0.bits=4", "'overrides' is not a mapping in this recipe"),
        ("weights=", "weights: has to be a mapping"),
        ("weights.bits", "write key.path=value"),
        ("=4", "write key.path=value"),
        ("weights.bits=[", "--set 'weights.bits=[': not YAML"),
        ("calibration.samples=1.5", "calibration.samples"),
    ],
)
def test_set_is_validated_like_the_file(tmp_path: Path, override: str, expected: str) -> None:
    path = written(tmp_path, "weights: {bits: 4}\noverrides: [{match: '*.q_proj', bits: 8}]")
    with pytest.raises(BadInput) as error:
        load(path, [override])
    assert expected in str(error.value)


# ---- patterns and schemes ---------------------------------------------------------------------------------------


def test_a_key_that_is_gone_says_what_to_write_now() -> None:
    with pytest.raises(BadInput, match=r"method\.gptq\.correction: GPTAQ was removed, .*; drop this key, error"):
        parse({"method": {"correction": "gptaq"}})
