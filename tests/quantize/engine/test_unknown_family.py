"""A family that transformers does not have is quantized by the names and shapes of its tensors, or refused truly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantpress import api
from quantpress.core.errors import BadInput
from quantpress.eval.release.callbacks import Callbacks
from quantpress.recipe.loading import parse

from ... import tiny

RECIPE: dict[str, Any] = {"method": "rtn", "weights": {"group_size": 32}, "evaluation": None}
B = "stack.blocks"
LINEARS = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out"}
LINEARS |= {f"moe.experts.{e}.{name}" for e in range(4) for name in ("w1", "w2", "w3")}


def novel(folder: Path, **more: Tensor) -> dict[str, Tensor]:
    """A checkpoint with code of its own, which must not run; returns its tensors."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(*shape) * 0.1).to(torch.bfloat16)

    tensors = {"tok.embed.weight": drawn(256, 64), "head.weight": drawn(256, 64), "last_norm.weight": drawn(64)}
    for k in range(3):
        p = f"{B}.{k}"
        tensors |= {f"{p}.attn.{name}.weight": drawn(out, 64) for name, out in (("q_proj", 64), ("k_proj", 32))}
        tensors |= {f"{p}.attn.v_proj.weight": drawn(32, 64), f"{p}.attn.out.weight": drawn(64, 64)}
        tensors |= {f"{p}.attn.q_proj.bias": drawn(64), f"{p}.norm1.weight": drawn(64), f"{p}.A_log": drawn(64, 16)}
        tensors |= {f"{p}.moe.router.weight": drawn(4, 64), f"{p}.conv1d.weight": drawn(64, 1, 4)}
        tensors |= {f"{p}.moe.gate.weight": drawn(64, 64), f"{p}.attn.low.weight": drawn(8, 64)}
        tensors |= {f"{p}.moe.experts.{e}.w{i}.weight": drawn(96, 64) for e in range(4) for i in (1, 3)}
        tensors |= {f"{p}.moe.experts.{e}.w2.weight": drawn(64, 96) for e in range(4)}
    tensors |= {f"vision.blocks.{k}.fc1.weight": drawn(64, 64) for k in range(2)} | more
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "novel_lm", "auto_map": {"AutoModelForCausalLM": "modeling_novel.Novel"}}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "vocab_size": 256}))
    (folder / "modeling_novel.py").write_text("raise AssertionError('code was run')\n")
    tiny.tokenizer().save_pretrained(folder)
    return tensors


def taken(model: Path, **keys: Any) -> set[str]:
    """The linears that a plan quantizes."""
    layers = api.plan(RECIPE | keys, str(model)).plan.layers
    return {name for name, scheme in layers.items() if scheme != "16 bit"}


def test_linears_are_found_by_name_and_shape(tmp_path: Path) -> None:
    novel(tmp_path / "model")
    assert taken(tmp_path / "model") == {f"{B}.{k}.{name}" for k in range(3) for name in LINEARS}
    notes = api.plan(RECIPE, str(tmp_path / "model")).plan.notes
    for pattern, why in (
        ("tok.embed.weight", "an embedding"),
        ("head.weight", "outside the blocks"),
        (f"{B}.*.moe.router.weight", "it chooses or weighs experts"),
        (f"{B}.*.moe.gate.weight", "it chooses or weighs experts"),
        (f"{B}.*.conv*d.weight", "a convolution"),
        (f"{B}.*.A_log", "no layer's weight"),
        (f"{B}.*.attn.low.weight", "fewer than 32 rows or columns"),
        ("vision.blocks.*.fc*.weight", "not in the decoder's blocks"),
    ):
        assert any(note.startswith(f"{pattern} stays as it is") and why in note for note in notes), pattern
    assert any("that a server has this family" in note and "is for you to know" in note for note in notes)


def test_patterns_decide_the_rest(tmp_path: Path) -> None:
    novel(tmp_path / "model")
    wanted = {"ignore": ["*.attn.*"], "overrides": [{"match": "vision.*", "bits": 8}]}
    found = taken(tmp_path / "model", **wanted)
    assert found == {f"{B}.{k}.{name}" for k in range(3) for name in LINEARS if "experts" in name} | {
        f"vision.blocks.{k}.fc1" for k in range(2)
    }


@pytest.mark.parametrize(
    "weights",
    [
        {"bits": 4, "group_size": 32, "symmetric": True},
        {"bits": 8, "group_size": -1, "symmetric": True},
        {"type": "fp8"},
        {"type": "nvfp4"},
    ],
    ids=["int4", "int8", "fp8", "nvfp4"],
)
def test_the_librarys_own_decompression_gives_the_weights(weights: dict[str, Any], tmp_path: Path) -> None:
    original = novel(tmp_path / "model")
    notes: list[str] = []
    recipe = RECIPE | {"weights": weights, "targets": ["vllm"]}
    api.run(recipe, str(tmp_path / "model"), tmp_path / "run", callbacks=Callbacks(on_note=notes.append))
    folder = tmp_path / "run" / "quantized"
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization = QuantizationConfig.model_validate(config)
    (group,) = quantization.config_groups.values()
    names = {f"{B}.{k}.{name}" for k in range(3) for name in LINEARS}
    for name in names:
        parts = {n.removeprefix(f"{name}."): t for n, t in stored.items() if n.startswith(f"{name}.weight")}
        compressor = BaseCompressor.get_value_from_registry(group.format or config["format"])
        weight = compressor.decompress(parts, group)["weight"]
        exact = original[f"{name}.weight"].float()
        error = (weight.float() - exact).norm() / exact.norm()
        assert error < {"int": 0.1, "fp8": 0.05, "nvfp4": 0.15}[weights.get("type", "int")], name
    kept = {name: t for name, t in original.items() if name.removesuffix(".weight") not in names}
    for name, tensor in kept.items():
        assert torch.equal(stored[name], tensor), name
    listed = set(config["ignore"])
    for name in ("head", f"{B}.0.moe.router", f"{B}.2.moe.gate", "vision.blocks.1.fc1"):
        assert name in listed
    assert any("48 matrices in 3 blocks" in note for note in notes)  # printed before the work
    assert len(notes) == len(set(notes))
    assert api.verify(tmp_path / "run").problems == ()


def test_one_global_scale_for_what_servers_join(tmp_path: Path) -> None:
    tensors = novel(tmp_path / "model")
    wider = {n: t * 64 if n.endswith(("k_proj.weight", "w3.weight")) else t for n, t in tensors.items()}
    save_file(wider, tmp_path / "model" / "model.safetensors")
    api.quantize(RECIPE | {"weights": {"type": "nvfp4"}}, str(tmp_path / "model"), tmp_path / "run")
    stored = load_file(tmp_path / "run" / "quantized" / "model.safetensors")
    for joined in (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("moe.experts.3.w1", "moe.experts.3.w3")):
        scales = [stored[f"{B}.1.{name}.weight_global_scale"] for name in joined]
        assert all(torch.equal(scales[0], scale) for scale in scales)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "gptq"}, "no text can be run through it, which this recipe needs.*`method: rtn`"),
        ({"transforms": ["awq"]}, "no text can be run through it, which this recipe needs"),
        ({"transforms": ["hadamard"]}, "no text can be run through it, which this recipe needs"),
        ({"kv_cache": "fp8"}, "no text can be run through it, which this recipe needs"),
        ({"smoke": {"server": "transformers"}}, "set `smoke: null`"),
        ({"formats": ["gguf"], "weights": None}, "make a 16-bit .gguf file with llama.cpp's converter"),
    ],
)
def test_what_has_to_run_the_model_is_refused_in_one_line(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    novel(tmp_path / "model")
    recipe = {key: value for key, value in (RECIPE | keys).items() if value is not None or key == "evaluation"}
    with pytest.raises(BadInput, match=said) as refused:
        api.quantize(parse(recipe), str(tmp_path / "model"), tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "quantized").exists()


def test_an_evaluation_is_refused_before_the_work(tmp_path: Path) -> None:
    novel(tmp_path / "model")
    with pytest.raises(BadInput, match="nothing can be measured of it here; set `evaluation: null`"):
        api.run(RECIPE | {"evaluation": {}}, str(tmp_path / "model"), tmp_path / "run")
    assert not (tmp_path / "run" / "quantized").exists()


def test_codes_are_not_taken_for_weights(tmp_path: Path) -> None:
    novel(tmp_path / "model", **{f"{B}.0.attn.extra.weight": torch.ones(64, 64, dtype=torch.int8)})
    with pytest.raises(BadInput, match=r"attn\.extra\.weight.*int8.*original checkpoint"):
        api.plan(RECIPE, str(tmp_path / "model"))


def test_a_model_without_numbered_blocks_is_refused(tmp_path: Path) -> None:
    novel(tmp_path / "model")
    save_file({"embed.weight": torch.ones(64, 64)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(BadInput, match="no matrix is in a numbered list of blocks"):
        api.plan(RECIPE, str(tmp_path / "model"))
