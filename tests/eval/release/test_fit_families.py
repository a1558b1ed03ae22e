"""The bytes that fit foretells are those that a run writes, over kinds of models and servers."""

import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress import api
from quantpress.core.errors import BadInput
from quantpress.eval.release.fit import Option, fit
from quantpress.recipe import Calibration, Rtn
from quantpress.recipe.loading import parse

from ... import families, multimodal
from ...quantize.gguf.models import tokenizer

_SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2,
    "vocab_size": len(tokenizer()), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
_TARGETS = ["vllm", "sglang", "tgi", "tensorrt-llm", "triton", "llama.cpp", "ollama"]
_KINDS: dict[str, dict[str, Any]] = {  # what each is there for
    "llama": {"tie_word_embeddings": True},
    "gpt2": {},  # weights the other way round, biases
    "phi3": {},  # projections joined on disk
    "gemma2": {},  # tied by its class
    "mistral": {"dtype": torch.float32},
    "qwen3_moe": {},
    "mixtral": {},  # rows of other names
    "gpt_oss": {},  # experts with biases
    "deepseek_v2": {"head_dim": 8},  # latents whose rows no group divides, one dense block, a shared expert
    # embeddings for each block, keys and values shared
    "gemma3n_text": {"num_hidden_layers": 6, "vocab_size_per_layer_input": len(tokenizer())},
    "qwen3_next": {"num_hidden_layers": 4},  # linear attention
    "falcon_h1": {},  # state spaces beside attention
    "jamba": {"num_hidden_layers": 4},
    "lfm2": {"num_hidden_layers": 4},  # convolutions
}
_MULTIMODAL = [kind for kind in multimodal.MULTIMODAL if kind != "step3p7"]  # too narrow for any recipe of fit


def _model(kind: str, folder: Path) -> str:
    if kind in multimodal.MULTIMODAL:
        multimodal.build(kind, folder)
        return str(folder)
    wanted = dict(_KINDS[kind])
    dtype = wanted.pop("dtype", torch.bfloat16)
    known = families.config_of(kind).to_dict()
    config = families.config_of(kind, **{key: value for key, value in _SIZES.items() if key in known} | wanted)
    families.save(config, folder, dtype)
    tokenizer().save_pretrained(folder)
    return str(folder)


def _options(model: str, target: str) -> list[Option]:
    """What fit considers for a card that multiplies every type, with a memory in which 8 bits do not fit."""
    try:
        known = fit(model, target, gpu="B200", context=64)
    except BadInput:  # the server reads none of this kind
        return []
    sizes = [one.bytes for one in known.options if one.bytes is not None]
    if not sizes:
        return []
    memory = (min(sizes) + 2 * max(sizes)) // 3 + known.cache_bytes + (1 << 30)
    found = fit(model, target, gpu="B200", memory=-(-memory * 10 // 9) + 9, context=64)
    return [one for one in found.options if one.bytes is not None]


def _stored(folder: Path) -> int:
    """Bytes of a GGUF file, or of all tensors of safetensors files, by their own headers' lengths."""
    if files := list(folder.glob("*.gguf")):
        return sum(file.stat().st_size for file in files)
    headers = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            headers += 8 + int.from_bytes(opened.read(8), "little")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) - headers


def _check(kind: str, targets: Iterable[str], work: Path, names: Container[str] | None = None) -> int:
    """How many artifacts were made, by rounding to nearest, which writes as many bytes as any other method."""
    model, text = _model(kind, work / "model"), work / "text.txt"
    text.write_text("What fits has to be what is written. " * 200)
    calibration = Calibration(source=str(text), samples=2, seq_len=32)
    made: dict[str, int] = {}
    wrong = []
    for target in targets:
        for one in _options(model, target):
            document = {key: value for key, value in one.document.items() if key != "targets"}
            if names is not None and one.name not in names:
                continue
            key = json.dumps([document, one.bytes], sort_keys=True)
            if key not in made:
                recipe = parse(dict(one.document)).model_copy(update={"method": Rtn(), "calibration": calibration})
                made[key] = _stored(api.quantize(recipe, out=work / str(len(made))))
            assert one.bytes is not None
            if not (made[key] <= one.bytes if one.name.startswith("mixed") else made[key] == one.bytes):
                wrong.append((target, one.name, one.bytes, made[key]))
    assert not wrong
    return len(made)


def test_a_run_writes_what_fit_foretells(tmp_path: Path) -> None:
    assert _check("llama", ["vllm", "llama.cpp"], tmp_path, ("int4", "mixed", "q4_k_m")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*_KINDS, *_MULTIMODAL])
def test_so_it_does_for_every_kind_and_server(kind: str, tmp_path: Path) -> None:
    assert _check(kind, _TARGETS, tmp_path) >= 3
