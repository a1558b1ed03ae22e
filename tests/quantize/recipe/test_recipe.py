"""The recipe schema: what loads, what is refused, and whether the one line names the place and the remedy."""

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel

from quantpress.core.errors import BadInput
from quantpress.exports.servers.llama_cpp import LlamaCpp
from quantpress.exports.servers.ollama import Ollama
from quantpress.numbers.types import Grid
from quantpress.recipe import (
    AutoRound,
    Budget,
    EndToEnd,
    Gptq,
    Hadamard,
    LlamaCppQuantizer,
    Override,
    Qat,
    Recipe,
    Rtn,
    Task,
    Timing,
)
from quantpress.recipe.loading import _keys_at, _models, parse, parse_target

FP8_AND_BLOCKS = {"weights": {"type": "fp8"}, "overrides": [{"match": "*down_proj", "type": "fp8-block"}]}


def refused(document: dict[str, Any]) -> str:
    """The line a document is refused with."""
    with pytest.raises(BadInput) as error:
        parse(document)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_an_empty_document_is_the_default_recipe() -> None:
    recipe = parse({})
    assert recipe == Recipe()
    assert recipe.model == "smollm2-135m"
    assert isinstance(recipe.method, Gptq)


def test_a_recipe_survives_json() -> None:
    recipe = parse({"ignore": ["*.down_proj"], "overrides": [{"match": "*.q_proj", "bits": 8}], "formats": ["gptq"]})
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


def test_the_published_schema_knows_what_the_validator_knows() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Grid"]["properties"]["bits"]["enum"] == [2, 3, 4, 5, 6, 7, 8]


def test_a_name_alone_is_a_mapping_with_that_name() -> None:
    short = parse({"method": "rtn", "transforms": ["awq"], "targets": ["vllm"], "evaluation": {"tasks": ["arc_easy"]}})
    names = {"transforms": [{"name": "awq"}], "targets": [{"name": "vllm"}]}
    assert short == parse(names | {"method": {"name": "rtn"}, "evaluation": {"tasks": [{"name": "arc_easy"}]}})
    with pytest.raises(BadInput, match=r"method: unknown name 'gtpq', did you mean 'gptq'\? \(known: rtn, gptq"):
        parse({"method": "gtpq"})
    with pytest.raises(BadInput, match=r"targets.0: unknown name 'nosuch' \(known: vllm, "):
        parse({"targets": ["nosuch"]})


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = "import sys, quantpress.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("document", "place", "nearest"),
    [
        ({"wieghts": {}}, "wieghts", "weights"),
        ({"weights": {"groupsize": 64}}, "weights.groupsize", "group_size"),
        ({"method": {"name": "gptq", "dampp": 0.1}}, "method.gptq.dampp", "damp"),
        ({"calibration": {"sample": 3}}, "calibration.sample", "samples"),
        ({"evaluation": {"windo": 3}}, "evaluation.windo", "window"),
        ({"gates": {"max_kll": 3}}, "gates.max_kll", "max_kl"),
        ({"overrides": [{"match": "a"}, {"match": "b", "bitz": 3}]}, "overrides.1.bitz", "bits"),
        ({"activations": {"type": "int8", "dynamik": True}}, "activations.dynamik", "dynamic"),
        ({"evaluation": {"tasks": ["a", {"name": "b", "few_shots": 1}]}}, "evaluation.tasks.1.few_shots", "few_shot"),
        ({"evaluation": {"efficiency": {"timing": {"batch": [1]}}}}, "evaluation.efficiency.timing.batch", "batches"),
        ({"transforms": ["hadamard", {"name": "awq", "point": 3}]}, "transforms.1.awq.point", "points"),
        ({"transforms": [{"name": "hadamard", "seeds": 3}]}, "transforms.0.hadamard.seeds", "seed"),
        ({"method": {"name": "autoround", "ligth": True}}, "method.autoround.ligth", "light"),
        ({"method": {"name": "qat", "end_to_end": {"step": 2}}}, "method.qat.end_to_end.step", "steps"),
        ({"method": {"name": "llama.cpp", "thread": 2}}, "method.llama.cpp.thread", "threads"),
        ({"targets": [{"name": "llama.cpp", "devise": "cpu"}]}, "targets.0.llama.cpp.devise", "device"),
        ({"targets": ["tgi", {"name": "triton", "back_end": "vllm"}]}, "targets.1.triton.back_end", "backend"),
        ({"gguf": {"budget": {"byte": 3}}}, "gguf.budget.byte", "bytes"),
        ({"smoke": {"sever": "vllm"}}, "smoke.sever", "server"),
    ],
)
def test_a_typo_is_reported_with_its_place_and_the_nearest_key(
    document: dict[str, Any], place: str, nearest: str
) -> None:
    message = refused(document)
    assert f"{place}: unknown key, did you mean {nearest!r}?" in message


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    message = refused({"method": {"name": "rtn", "damp": 0.1}})
    assert "method.rtn.damp: unknown key (known: name)" in message
    target = refused({"targets": [{"name": "ollama", "xyz": 1}]})
    assert "targets.0.ollama.xyz: unknown key (known: " in target
    assert set(target.partition("known: ")[2].rstrip(")").split(", ")) == set(Ollama.model_fields)


def test_every_model_of_a_recipe_names_its_own_keys() -> None:
    """Each model that a recipe can hold, at any depth, with a key that it does not have."""
    seen: list[type[BaseModel]] = []

    def follow(model: type[BaseModel], place: tuple[str, ...]) -> None:
        seen.append(model)
        assert _keys_at(Recipe, place) == list(model.model_fields), place
        for key, field in model.model_fields.items():
            inner = _models(field.annotation)
            for one in inner:
                tag = one.model_fields["name"].default if len(inner) > 1 else None
                follow(one, (*place, key) if tag is None else (*place, key, tag))

    follow(Recipe, ())
    assert {Timing, EndToEnd, Budget, Task, LlamaCpp, LlamaCppQuantizer, Override, Hadamard} <= set(seen)


def test_a_target_by_itself_names_its_keys_too() -> None:
    with pytest.raises(BadInput, match=r"--target: vllm\.prot: unknown key, did you mean 'port'\?"):
        parse_target({"name": "vllm", "prot": 1}, "--target")


def test_a_list_with_a_wrong_item_is_not_also_too_short() -> None:
    message = refused({"formats": ["awk"]})
    assert "formats.0: " in message
    assert "at least 1" not in message
    assert "at least 1" in refused({"formats": []})


def test_every_mistake_is_reported_at_once() -> None:
    message = refused({"wieghts": {}, "calibration": {"samples": 0}})
    assert "wieghts" in message
    assert "calibration.samples" in message


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"weights": {"bits": 9}}, "weights.bits: Input should be 2, 3, 4, 5, 6, 7 or 8, not 9"),
        (
            {"weights": {"group_size": 100}},
            "weights.group_size: a multiple of 8, -1 for per channel or 0 for one scale a tensor, not 100",
        ),
        ({"weights": {"group_size": 0}}, "weights: group_size 0"),
        ({"weights": {"group_size": True}}, "weights.group_size"),
        ({"weights": {"symmetric": "maybe"}}, "weights.symmetric"),
        ({"weights": {"symmetric": 1}}, "weights.symmetric"),
        ({"weights": None}, "weights: has to be a mapping, not None"),
        ({"overrides": [{"match": "a", "group_size": 12}]}, "overrides.0.group_size: a multiple of 8"),
        ({"overrides": [{"match": "a"}]}, "changes nothing; to leave layers alone use `ignore`"),
        ({"overrides": [{"bits": 8}]}, "overrides.0.match"),
        ({"ignore": "*.down_proj"}, "ignore: has to be a list, not '*.down_proj'"),
        ({"ignore": ["re:["]}, "ignore.0: not a regular expression"),
        ({"ignore": [""]}, "ignore.0: an empty pattern"),
        ({"method": {"name": "gptqq"}}, "known: rtn, gptq"),
        ({"method": {"damp": 0}}, "method.gptq.damp"),
        ({"method": {"damp": float("nan")}}, "method.gptq.damp"),
        ({"calibration": {"samples": True}}, "calibration.samples"),
        ({"calibration": {"seq_len": 4}}, "calibration.seq_len"),
        (
            {"calibration": {"source": "a.txt", "config": "raw"}},
            "calibration: config 'raw' has no effect with source 'a.txt'",
        ),
        (
            {"evaluation": {"source": "a.jsonl", "split": "train"}},
            "split 'train' has no effect with source",
        ),
        ({"calibration": {"source": "a.txt", "column": "body"}}, "column 'body' has no effect with source 'a.txt'"),
        ({"calibration": {"revision": "main"}}, "revision 'main' has no effect with source 'default'"),
        (
            {"calibration": {"source": "self", "bos": "never"}},
            "calibration: bos: never has no effect with source 'self'",
        ),
        (
            {"calibration": {"source": "self", "chat_template": True}},
            "calibration: chat_template: true has no effect with source 'self'",
        ),
        ({"evaluation": {"source": "self"}}, "`self` is a calibration source"),
        ({"evaluation": {"window": 512, "stride": 513}}, "stride 513 is larger than window 512"),
        ({"transforms": [3]}, "transforms"),
        ({"formats": []}, "formats"),
        (
            {"formats": ["awk"]},
            "formats.0: unknown format, did you mean 'awq'? (known: compressed-tensors, gptq, awq, ",
        ),
        ({"formats": [3]}, "formats.0: Input should be a valid string, not 3"),
        ({"formats": ["gptq", "gptq"]}, "names one twice"),
        ({"name": "../up"}, "name"),
        ({"model": ""}, "model"),
    ],
)
def test_a_wrong_value_is_refused(document: dict[str, Any], expected: str) -> None:
    assert expected in refused(document)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"method": {"static_groups": False}}, "static_groups: false needs order: activation, not group_aware"),
        (
            {"method": {"order": "activation", "static_groups": False}, "weights": {"group_size": -1}},
            "static_groups: false has no effect per channel",
        ),
        (
            {
                "method": {"order": "activation", "static_groups": False},
                "overrides": [{"match": "a", "group_size": -1}],
            },
            "static_groups: false has no effect per channel",
        ),
        ({"evaluation": None, "gates": {"max_kl": 0.1}}, "gates on quality need an evaluation"),
        (
            FP8_AND_BLOCKS | {"activations": {"type": "fp8", "dynamic": False}},
            "fp8-block weights take dynamic activations: leave `dynamic` out",
        ),
        (
            {"weights": {"type": "fp8"}, "overrides": [{"match": "*.b", "group_size": 64}]},
            "override for '*.b' of fp8 channel weights: type fp8 has bits 8, group_size -1 or 0",
        ),
        (FP8_AND_BLOCKS | {"activations": {"type": "fp8"}}, "give every layer type fp8-block or none"),
    ],
)
def test_an_impossible_pair_is_refused(document: dict[str, Any], expected: str) -> None:
    assert expected in refused(document)


def test_fp8_beside_blocks_is_fine_where_inputs_stay_in_16_bit() -> None:
    assert parse(FP8_AND_BLOCKS).activations is None


def test_a_gate_on_size_needs_no_evaluation() -> None:
    assert parse({"evaluation": None, "gates": {"max_bytes": 10}}).gates.max_bytes == 10


@pytest.mark.parametrize(
    ("given", "fraction"), [("3%", 0.03), (" 0.5 % ", 0.005), ("0.03", 0.03), (0.03, 0.03), (1, 1)]
)
def test_percent_gates(given: str | float, fraction: float) -> None:
    assert parse({"gates": {"max_perplexity_increase": given}}).gates.max_perplexity_increase == pytest.approx(fraction)


@pytest.mark.parametrize("given", ["-1%", "three%", "%", "101%", [1]])
def test_gates_that_are_not_a_share(given: Any) -> None:
    assert "gates.min_top1_agreement" in refused({"gates": {"min_top1_agreement": given}})


def test_a_method_without_a_name_is_the_default_one() -> None:
    assert parse({"method": {"damp": 0.02}}).method == Gptq(damp=0.02)


# ---- files and --set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        (Grid(bits=4, group_size=64, symmetric=False), "int4 g64 asym"),
        (Grid(bits=8, group_size=-1), "int8 channel sym"),
    ],
)
def test_a_grid_reads_as_a_scheme(grid: Grid, text: str) -> None:
    assert str(grid) == text


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"weights": {"type": "nvfp4", "bits": 8}}, "type nvfp4 has bits 4, group_size 16 and is symmetric"),
        ({"weights": {"type": "fp8", "group_size": 64}}, "type fp8 has bits 8, group_size -1 or 0"),
        (
            {"weights": {"type": "mxfp4"}, "formats": ["gptq"]},
            "format gptq cannot hold mxfp4 weights; it takes type int",
        ),
        ({"weights": {"type": "fp8"}, "activations": {"type": "int8"}}, "activations of type fp8 go with them"),
        ({"weights": {"bits": 3}, "activations": {"type": "int8"}}, "leave activations out"),
        ({"weights": {"type": "mxfp8"}, "activations": {"type": "mxfp8", "dynamic": False}}, "leave `dynamic` out"),
        (
            {"weights": {"bits": 8}, "activations": {"type": "int8"}, "formats": ["awq"]},
            "format awq holds weights only, no activations; use compressed-tensors or modelopt",
        ),
        ({"kv_cache": "fp8", "formats": ["gptq"]}, "format gptq holds weights only, no kv_cache; use"),
        ({"kv_cache": "int8"}, "kv_cache: Input should be 'fp8'"),
        ({"transforms": [{"name": "awq", "pointz": 3}]}, "transforms.0.awq.pointz: unknown key, did you mean 'points'"),
    ],
)
def test_number_types_that_do_not_go_together_are_refused(document: dict[str, Any], words: str) -> None:
    assert words in refused(document)


def test_a_float_type_brings_its_layout_and_an_override_may_change_the_type() -> None:
    recipe = parse({"weights": {"type": "nvfp4"}, "overrides": [{"match": "*.b", "type": "fp8"}]})
    a, b = recipe.schemes({"x.a": 32, "x.b": 33}).values()
    assert a == Grid(type="nvfp4", bits=4, group_size=16)
    assert b == Grid(type="fp8", bits=8, group_size=-1)


def test_what_needs_calibration() -> None:
    rtn = {"method": {"name": "rtn"}}
    assert parse({}).calibrated
    assert not parse(rtn).calibrated
    assert not parse(rtn | {"transforms": [{"name": "hadamard"}]}).calibrated
    assert parse(rtn | {"transforms": [{"name": "awq"}]}).calibrated
    assert parse(rtn | {"weights": {"scale_search": "activation"}}).calibrated
    assert parse(rtn | {"kv_cache": "fp8"}).calibrated
    w8a8 = rtn | {"weights": {"bits": 8, "group_size": -1}}
    assert not parse(w8a8 | {"activations": {"type": "int8"}}).calibrated
    assert parse(w8a8 | {"activations": {"type": "int8", "dynamic": False}}).calibrated


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"light": True, "steps": 20}, "light means 50 steps and steps says 20"),
        ({"start": "awq"}, "'gptq' or 'rtn', not 'awq'"),
        ({"stepps": 20}, "did you mean 'steps'"),
    ],
)
def test_what_autoround_refuses(document: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse({"method": {"name": "autoround"} | document})


@pytest.mark.parametrize("name", ["autoround", "qat"])
def test_tuning_is_for_integer_weights_alone(name: str) -> None:
    with pytest.raises(BadInput, match=f"method {name} takes weights of type int, not mxfp4; use gptq or rtn"):
        parse({"method": {"name": name}, "weights": {"type": "mxfp4"}})
    for more in ({"activations": {"type": "int8"}, "weights": {"bits": 8}}, {"kv_cache": "fp8"}):
        with pytest.raises(BadInput, match=f"method {name} tunes weights for 16-bit inputs"):
            parse({"method": {"name": name}} | more)


def test_end_to_end_holds_a_sequence_out() -> None:
    document = {"method": {"name": "qat", "end_to_end": {"steps": 2}}, "calibration": {"samples": 1}}
    with pytest.raises(BadInput, match=r"holds out a sequence: calibration\.samples has to be 2 or more"):
        parse(document)
    with pytest.raises(BadInput, match="did you mean 'steps'"):
        parse({"method": {"name": "qat", "end_to_end": {"stepps": 2}}})


def test_rates_of_qat_follow_its_steps_unless_given() -> None:
    plain = parse({"method": {"name": "qat", "steps": 50}}).method
    given = parse({"method": {"name": "qat", "steps": 50, "weight_lr": "1e-2", "quant_lr": 0.5}}).method
    assert isinstance(plain, Qat)
    assert isinstance(given, Qat)
    assert plain.n_steps == 50
    assert (plain.weight_rate, plain.quant_rate) == pytest.approx((0.006, 0.002))
    assert (given.weight_rate, given.quant_rate) == (0.01, 0.5)


def test_what_a_tuned_block_starts_from() -> None:
    light = parse({"method": {"name": "autoround", "light": True, "error_correction": 0.25}})
    assert (light.tuned, light.paired, light.calibrated) == (True, True, True)
    assert isinstance(light.method, AutoRound)
    assert (light.method.n_steps, light.method.first_rate) == (50, 0.01)
    assert light.rounder == Gptq(error_correction=0.25)
    assert parse({"method": {"name": "autoround", "start": "rtn"}}).rounder == Rtn()
    plain = parse({"method": {"name": "gptq", "error_correction": 0}})
    assert (plain.rounder, plain.tuned, plain.paired) == (plain.method, False, False)


LLAMA_CPP = {"method": {"name": "llama.cpp"}, "formats": ["gguf"]}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            {"formats": ["gguf"], "method": {"name": "qat"}},
            "format gguf with method qat: it takes rtn, gptq, llama.cpp",
        ),
        ({"method": {"name": "llama.cpp"}}, "method llama.cpp is for GGUF files: set formats: [gguf]"),
        ({"gguf": {"type": "F16"}}, "the section gguf is for GGUF files"),
        (LLAMA_CPP | {"formats": ["gguf", "gptq"]}, "format gguf stands alone"),
        (LLAMA_CPP | {"weights": {"bits": 8}}, "weights has no effect on a GGUF file"),
        (LLAMA_CPP | {"transforms": [{"name": "awq"}]}, "transforms has no effect on a GGUF file"),
        (LLAMA_CPP | {"kv_cache": "fp8"}, "kv_cache has no effect on a GGUF file"),
        (LLAMA_CPP | {"gguf": {"type": "Q4_K_X"}}, "gguf.type: Input should be 'F32', 'F16'"),
        (LLAMA_CPP | {"gguf": {"typ": "F16"}}, "gguf.typ: unknown key, did you mean 'type'?"),
        (LLAMA_CPP | {"gguf": {"type": "F16", "imatrix": True}}, "type F16 is not quantized"),
        (LLAMA_CPP | {"gguf": {"type": "IQ2_XS"}}, "type IQ2_XS needs an importance matrix"),
        (LLAMA_CPP | {"gguf": {"tensor_types": {"output.weight": "IQ1_S"}}}, "type IQ1_S needs an importance"),
        (LLAMA_CPP | {"gguf": {"budget": {}}}, "give one of bytes and bits_per_weight"),
        (LLAMA_CPP | {"gguf": {"budget": {"bytes": "90M"}}}, "method llama.cpp chooses by gguf.type"),
        (LLAMA_CPP | {"gguf": {"split": "4 rods"}}, "gguf.split"),
    ],
)
def test_what_cannot_be_a_gguf_file_is_refused(document: dict[str, Any], expected: str) -> None:
    assert expected in refused(document)


def test_a_gguf_recipe() -> None:
    recipe = parse(LLAMA_CPP | {"gguf": {"split": "1.5G", "imatrix": True, "tensor_types": {"*attn_v*": "Q6_K"}}})
    assert recipe.gguf_file.type == "Q4_K_M"
    assert recipe.gguf_file.split == 1_500_000_000
    assert recipe.calibrated
    assert not parse(dict(LLAMA_CPP)).calibrated
