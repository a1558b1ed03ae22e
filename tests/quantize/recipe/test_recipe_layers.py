"""Which layers a recipe means: patterns, overrides, ignored ones, groups that fit."""

from typing import Any

import pytest

from quantpress.core.errors import BadInput
from quantpress.numbers.types import Grid
from quantpress.recipe import matches
from quantpress.recipe.loading import parse

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS = {f"model.layers.{i}.{name}": 576 for i in range(3) for name in (*PROJECTIONS, "mlp.gate_proj", "mlp.up_proj")}
LINEARS |= {f"model.layers.{i}.mlp.down_proj": 1536 for i in range(3)}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.down_proj", "model.layers.0.mlp.down_proj", True),
        ("down_proj", "model.layers.0.mlp.down_proj", False),
        ("model.layers.[01].*", "model.layers.1.mlp.up_proj", True),
        ("model.layers.[01].*", "model.layers.11.mlp.up_proj", False),
        ("*.DOWN_PROJ", "model.layers.0.mlp.down_proj", False),
        (r"re:.*\.layers\.\d\.mlp", "model.layers.1.mlp.up_proj", True),
        (r"re:layers\.\d", "model.layers.1.mlp.up_proj", False),
        (r"re:.*\.[qk]_proj$", "model.layers.1.self_attn.q_proj", True),
        (r"re:.*\.[qk]_proj$", "model.layers.1.self_attn.v_proj", False),
    ],
)
def test_globs_and_regular_expressions(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_the_last_override_decides_each_key() -> None:
    recipe = parse(
        {
            "weights": {"bits": 4, "group_size": 64, "symmetric": False},
            "overrides": [
                {"match": "*.down_proj", "bits": 8, "group_size": 32},
                {"match": r"re:.*\.layers\.0\.", "bits": 3},
                {"match": "model.layers.0.mlp.*", "symmetric": True},
            ],
        }
    )
    schemes = recipe.schemes(LINEARS)
    assert list(schemes) == list(LINEARS)
    assert schemes["model.layers.1.mlp.down_proj"] == Grid(bits=8, group_size=32, symmetric=False)
    assert schemes["model.layers.0.mlp.down_proj"] == Grid(bits=3, group_size=32, symmetric=True)
    assert schemes["model.layers.0.self_attn.q_proj"] == Grid(bits=3, group_size=64, symmetric=False)
    assert schemes["model.layers.2.self_attn.q_proj"] == recipe.weights


def test_ignore_wins_over_overrides_and_skips_the_group_check() -> None:
    recipe = parse(
        {
            "weights": {"group_size": 512},
            "ignore": ["re:.*(self_attn|gate|up)"],
            "overrides": [{"match": "*.q_proj", "bits": 8}],
        }
    )
    schemes = recipe.schemes(LINEARS)
    assert {name for name, grid in schemes.items() if grid is not None} == {n for n in LINEARS if "down" in n}


@pytest.mark.parametrize("key", ["ignore", "overrides"])
def test_a_pattern_without_a_match_names_the_nearest(key: str) -> None:
    pattern = "*.donw_proj"
    value = [pattern] if key == "ignore" else [{"match": pattern, "bits": 8}]
    with pytest.raises(BadInput, match=r"'\*\.donw_proj' matches no linear layer.*model\.layers\.\d\.mlp\.down_proj"):
        parse({key: value, "weights": {"group_size": 64}}).schemes(LINEARS)


def test_ignoring_everything_is_refused() -> None:
    with pytest.raises(BadInput, match="nothing is left to quantize"):
        parse({"ignore": ["*"]}).schemes(LINEARS)


def test_a_group_that_does_not_divide_names_the_layer_and_its_divisors() -> None:
    with pytest.raises(BadInput) as error:
        parse({"weights": {"group_size": 128}}).schemes(LINEARS)
    message = str(error.value)
    assert "model.layers.0.self_attn.q_proj: in_features 576 is not a multiple of group_size 128" in message
    offered = message.split("choose ")[1].split(", -1 (per channel)")[0].split(", ")
    assert {"32", "64", "96"} <= set(offered)
    assert all(576 % int(size) == 0 for size in offered)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (
            {"overrides": [{"match": "*", "type": "fp8"}, {"match": "*down_proj", "group_size": 64}]},
            "override for '*down_proj' of fp8 channel weights: type fp8 has bits 8, group_size -1 or 0",
        ),
        (
            {
                "overrides": [{"match": "*", "symmetric": False}, {"match": "*down_proj", "bits": 8}],
                "targets": ["sglang"],
            },
            "SGLang does not take compressed-tensors files of int8 g64 asym weights: set overrides.1.symmetric: true",
        ),
        (
            {"weights": {"type": "fp8"}, "activations": {"type": "fp8"}}
            | {"overrides": [{"match": "*", "type": "int", "group_size": 64}, {"match": "*down_proj", "bits": 8}]},
            "int8 g64 sym weights with fp8 activations: no server computes that pair",
        ),
    ],
)
def test_overrides_that_one_layer_cannot_have_together_name_it(document: dict[str, Any], words: str) -> None:
    recipe = parse({"weights": {"bits": 4, "group_size": 64}} | document)
    with pytest.raises(BadInput) as error:
        recipe.schemes(LINEARS)
    message = str(error.value)
    assert message.startswith("model.layers.0.mlp.down_proj, by all overrides that match it: ")
    assert words in message
    assert "\n" not in message


def test_a_row_without_a_usable_divisor_is_offered_per_channel() -> None:
    with pytest.raises(BadInput, match=r"choose -1 \(per channel\), or add the layer to `ignore`"):
        parse({"weights": {"group_size": 64}}).schemes({"odd": 100})
    assert parse({"weights": {"group_size": -1}}).schemes({"odd": 100})["odd"] is not None
