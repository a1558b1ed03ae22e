"""fit: what it proposes fits, is taken by the server, and has the bytes that it says."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config

from quantpress import api
from quantpress.artifact.manifest import read_manifest
from quantpress.core.errors import BadInput
from quantpress.eval.release import fit as fitting
from quantpress.eval.release.fit import fit, run_in_turn, written
from quantpress.models import placed_model
from quantpress.recipe import Calibration, Rtn
from quantpress.recipe.loading import load, parse

from ... import fits
from ...forked import commands
from ...quantize.gguf.models import tokenizer

_KEPT = 1 << 30  # that a server keeps, and a tenth of all


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Qwen3, wide enough for groups of 64 and for every kernel: 4.2 MB of weights in 16 bit."""
    folder = tmp_path_factory.mktemp("fit") / "model"
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        **sizes, head_dim=64, num_hidden_layers=2, vocab_size=len(tokenizer()), max_position_embeddings=1024,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def memory(room: int, cache: int = 0) -> int:
    """The memory that leaves `room` for the weights."""
    return -(-(room + cache + _KEPT) * 10 // 9) + 9


@pytest.mark.parametrize("target", ["vllm", "sglang", "tensorrt-llm", "llama.cpp"])
def test_the_choice_fits_and_the_server_takes_it(model: str, target: str, tmp_path: Path) -> None:
    found = fit(model, target, memory=memory(2_600_000, 2 * 2 * 2 * 64 * 2 * 64), context=64)
    assert found.choice is not None
    assert found.room is not None
    recipe = load(str(written(found, found.choice, tmp_path / "fit.yaml")))
    assert recipe.targets[0].name == target
    planned = api.plan(recipe).plan  # raises BadInput where the target refuses it
    assert planned.artifact_bytes == found.choice.bytes
    assert planned.artifact_bytes <= found.room
    assert all(one.bytes is None or one.fits == (one.bytes <= found.room) for one in found.options)


@pytest.mark.slow
def test_artifacts_have_the_bytes_of_their_options(model: str, tmp_path: Path) -> None:
    """By rounding to nearest, which writes as many bytes as any other method."""
    integers, floats = fit(model, gpu="A10G", context=64), fit(model, gpu="B200", context=64)
    room = memory((floats.options[0].bytes or 0) + 1000, 1024 * 2 * 2 * 64 * 2)
    rounded = fit(model, gpu="L40S", memory=room, context=1024)
    assert rounded.unrounded is not None
    names, text = {one.name for one in integers.options}, tmp_path / "text.txt"
    text.write_text("What fits has to be what is written. " * 200)
    for found, one in [
        *((integers, one) for one in integers.options),
        *((floats, one) for one in floats.options if one.name not in names),
        (rounded, rounded.options[0]),
    ]:
        names.add(one.name)
        recipe = load(str(written(found, one, tmp_path / "fit.yaml")))
        calibration = Calibration(source=str(text), samples=2, seq_len=32)
        recipe = recipe.model_copy(update={"method": Rtn(), "calibration": calibration})
        folder = api.quantize(recipe, out=tmp_path / f"{one.name}-{recipe.kv_cache}")
        assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) >= (one.bytes or 0)
        assert read_manifest(folder / "manifest.json").artifact.bytes == one.bytes, one.name
    assert names == {"int8", "int6", "int5", "int4", "int3", "int2", "fp8", "nvfp4"}


def test_the_table_of_known_models_is_what_fit_proposes() -> None:
    kept = json.loads(fits.TABLE.read_text(encoding="utf-8"))
    assert (kept["context"], kept["concurrency"]) == (fits.CONTEXT, fits.CONCURRENCY)
    assert list(kept["rows"]) == list(fits.MODELS)
    model = "Llama-3.1-8B"
    card = "A100 80GB"
    assert fits.row(model, [card])[card] == kept["rows"][model][card]


def test_all_the_memory_is_used_where_8_bits_do_not_fit(model: str) -> None:
    whole = {one.name: one for one in fit(model, memory=memory(10**9), context=64).options}
    assert next(iter(whole)) == "int8"
    assert "mixed" not in whole
    sizes = {name: one.bytes or 0 for name, one in whole.items()}
    room = (sizes["int8"] + sizes["int4"]) // 2
    found = fit(model, memory=memory(room, found_cache := 2 * 2 * 2 * 64 * 2 * 64), context=64)
    assert found.cache_bytes == found_cache
    assert found.choice is not None
    assert found.choice.name == "mixed"
    assert found.room is not None
    assert 0 <= found.room - (found.choice.bytes or 0) <= 16
    refused = next(one for one in found.options if one.name == "int8")
    assert not refused.fits
    assert refused.why.startswith("does not fit")
    nothing = fit(model, memory=memory(sizes["int2"] // 2), context=64)
    assert nothing.choice is None


def test_2_bits_come_into_a_mixture_where_3_do_not_fit() -> None:
    room, cache = 95_000_000, 2 * 30 * 3 * 64 * 2 * 512
    found = fit("smollm2-135m", memory=memory(room, cache), context=512)
    assert found.choice is not None
    assert found.choice.name == "mixed-2-to-4"
    assert 0 <= room + 16 - (found.choice.bytes or 0) < 100
    assert {one.name for one in found.options if one.fits} == {"mixed-2-to-4", "int2"}
    assert next(one for one in found.options if one.name == "mixed").why.startswith("refused: budget: ")
    assert [grid["bits"] for grid in found.choice.document["budget"]["menu"]] == [4, 3, 2]


def test_the_cards_number_types_decide(model: str) -> None:
    names = {gpu: [one.name for one in fit(model, gpu=gpu, context=64).options] for gpu in ("A10G", "l40s", "B200")}
    assert [("fp8" in n, "nvfp4" in n) for n in names.values()] == [(False, False), (True, False), (True, True)]
    assert names["l40s"][0] == "fp8"


def test_the_cache_is_rounded_to_fp8_where_8_bits_do_not_fit_otherwise(model: str) -> None:
    """On cards that multiply FP8; a cache of 2 x 2 heads of 64 numbers in 2 layers."""
    cache = 1024 * 2 * 2 * 64 * 2 * 2
    eight = fit(model, gpu="L40S", context=64).choice
    assert eight is not None
    assert eight.bytes is not None
    short = memory(eight.bytes + 1000, cache // 2)
    found = fit(model, gpu="L40S", memory=short, context=1024)
    assert found.choice is not None
    assert (found.choice.name, found.choice.document["kv_cache"]) == ("fp8", "fp8")
    assert found.cache_bytes == cache // 2
    assert "too few for 8 bits" in found.why(found.choice)[1]
    assert "kv_cache" not in (fit(model, gpu="A10G", memory=short, context=1024).choice or eight).document
    assert "kv_cache" not in (fit(model, gpu="L40S", memory=short, context=64).choice or found.choice).document
    assert fit(model, gpu="L40S", memory=memory(eight.bytes // 3, cache // 2), context=1024).unrounded is None


def test_without_a_memory_the_smallest_is_first(model: str) -> None:
    found = fit(model, min_recovery=0.99, context=64)
    sizes = [one.bytes for one in found.options if one.fits]
    assert sizes == sorted(sizes, key=lambda size: size or 0)
    assert found.choice is found.options[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "fit needs a limit"),
        ({"gpu": "A100"}, "which of A100 40GB, A100 80GB"),
        ({"gpu": "H9"}, "not one of T4"),
        ({"gpu": "MI300X", "target": "tensorrt-llm"}, "--gpu MI300X: TensorRT-LLM runs on NVIDIA's GPUs alone"),
        ({"gpu": "MI300X", "target": "triton"}, "--gpu MI300X: Triton's vLLM runs on NVIDIA's GPUs alone"),
        ({"target": "torchserve", "memory": 10}, "known: vllm"),
        ({"memory": 0}, "--memory 0: give what the model may take"),
        ({"min_recovery": 1.2}, r"--min-recovery 1\.2: a share of the original's quality, from 0 to 100%"),
        ({"memory": 2**32, "context": 1025}, "--context 1025: the model has 1024 positions; lower it"),
        ({"memory": 2**30}, r"1\.07 GB of memory leave no room for weights: 1\.\d+ GB are kept for the server"),
    ],
)
def test_what_cannot_be_asked_is_refused(model: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        fit(model, **keys)


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "RTX-4090", "4090"])
def test_a_card_is_known_by_its_usual_spellings(name: str) -> None:
    assert fitting._card(name) == "RTX 4090"


def test_a_context_that_nobody_asked_for_is_no_longer_than_the_models(model: str) -> None:
    found = fit(model, memory=2**32)
    assert found.need.context == 1024
    assert found.choice is not None
    assert found.choice.document["targets"][0]["max_model_len"] == 1024
    assert fit("smollm2-135m", memory=2**32).need.context == 8192


def test_each_recipe_has_a_run_folder_of_its_own(model: str) -> None:
    """Else the second that `--run` makes finds a finished run of something else."""
    whole = fit(model, gpu="A10G", context=64)
    sizes = {one.name: one.bytes or 0 for one in whole.options}
    rooms = [(sizes["int8"] + several * sizes["int4"]) // (1 + several) for several in (1, 2)]
    found = [
        whole,
        *(fit(model, memory=memory(room, whole.cache_bytes), context=64) for room in rooms),
        *(fit(model, target, gpu="A10G", context=64) for target in ("sglang", "llama.cpp")),
    ]
    documents = {json.dumps(one.document): one.document for proposal in found for one in proposal.options}
    by_name: dict[str, Any] = {}
    for one in documents.values():
        assert by_name.setdefault(parse(one).name, one) == one
    assert {"fit-vllm-int8", "fit-sglang-int4", "fit-llama.cpp-q4_k_m"} <= set(by_name)
    assert sum(name.startswith("fit-vllm-mixed-") for name in by_name) >= 2


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_the_model_is_opened_once_for_all_options(model: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    build = placed_model.empty_model
    monkeypatch.setattr(placed_model, "empty_model", lambda *given: opened.append(given) or build(*given))
    assert len(fit(model, target, memory=memory(1_000_000), context=64).options) > 5
    assert len(opened) == 1


def test_of_a_quantized_original_nothing_is_promised(model: str, tmp_path: Path) -> None:
    plain = fit(model, memory=2**32, context=64)
    recipe = parse({"model": model, "weights": {"type": "fp8"}, "method": "rtn", "targets": ["vllm"]})
    made = api.quantize(recipe, out=tmp_path)
    found = fit(str(made), memory=2**32, context=64)
    assert plain.why(None)[1].endswith(": quantized it is faster")
    assert found.why(None)[1].endswith(": it is quantized already")


def test_texts_are_no_longer_than_the_model(model: str, tmp_path: Path) -> None:
    for positions, keys in (
        (256, {"calibration": {"seq_len": 256}, "evaluation": {"window": 256}}),
        (600, {"evaluation": {"window": 600}}),
        (1024, {}),
    ):
        config = json.loads((Path(model) / "config.json").read_text()) | {"max_position_embeddings": positions}
        (file := tmp_path / "config.json").write_text(json.dumps(config))
        choice = fit(str(file), memory=2**32, config_only=True).choice
        assert choice is not None
        assert {key: choice.document[key] for key in ("calibration", "evaluation") if key in choice.document} == keys


def test_kernels_of_cuda_are_not_proposed_for_another_card(model: str) -> None:
    names = [one.name for one in fit(model, gpu="MI300X", context=64).options if one.fits]
    assert names == ["int8", "int4"]
    assert "int6" in [one.name for one in fit(model, gpu="A10G", context=64).options]


def test_a_recovery_that_was_not_measured_is_said_to_be_unknown(model: str, tmp_path: Path) -> None:
    found = fit(model, min_recovery=0.985, context=64)
    assert found.choice is not None
    said = "whether it keeps 98.5% of the original's quality is not known before a run: add --run"
    assert found.why(found.choice)[-1] == said
    assert said not in found.why(found.choice, measured=True)
    assert said in written(found, found.choice, tmp_path / "fit.yaml").read_text()
    assert said not in written(found, found.choice, tmp_path / "fit.yaml", measured=True).read_text()
    assert said not in fit(model, memory=2**32, context=64).why(found.choice)


def test_the_next_is_tried_where_one_does_not_hold(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, made = fit(model, min_recovery=0.99, context=64), []

    def judged(folders: list[Path], wish: Any) -> Any:
        assert wish.min_recovery == 0.99
        return SimpleNamespace(choice=folders[0] if folders[0].name == "int4" else None)

    def make(option: Any) -> Path:
        made.append(option.name)
        return Path(option.name)

    monkeypatch.setattr(fitting, "recommend", judged)
    chosen = run_in_turn(found, make, lambda option, result: None)
    assert chosen is not None
    assert chosen.name == made[-1] == "int4"
    assert made == [one.name for one in found.options if one.fits][: len(made)]


def test_the_command_writes_a_recipe(model: str, tmp_path: Path) -> None:
    file = tmp_path / "fit.yaml"
    done, nothing, folder = commands(
        tmp_path,
        [
            ("", ["fit", model, "--memory", "2GiB", "--context", "64", "--write", str(file), "--json"]),
            ("", ["fit", model, "--memory", str(memory(200_000)), "--context", "64"]),
            ("", ["fit", model, "--memory", "2GiB", "--run", "--write", str(tmp_path)]),
        ],
    )
    answer = json.loads(done.stdout)
    assert answer["choice"] == "int8"
    assert yaml.safe_load(file.read_text())["weights"] == {"bits": 8, "group_size": -1}
    assert nothing.returncode == 1
    assert nothing.stdout.startswith("nothing fits")
    assert folder.returncode == 2
    assert folder.stderr == f"quantpress: --write {tmp_path}: a folder; give the file to write\n"
