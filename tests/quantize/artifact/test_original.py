"""Quantized originals: what is read is what the format's own reader makes of the codes, and codes are never weights."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantpress.artifact.artifact import Artifact, open_artifact, open_original
from quantpress.artifact.original import OriginalCheckpoint
from quantpress.core.errors import BadInput
from quantpress.models.checkpoint import Checkpoint
from quantpress.numbers.types import Grid

from ...tiny import build
from ..formats.artifacts import make, uniform
from ..published import E2M1, KINDS, gptq, write

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_the_formats_own_rule(kind: str, tmp_path: Path) -> None:
    wanted = write(tmp_path, kind)
    original = OriginalCheckpoint(tmp_path)
    assert set(original.names()) == set(wanted)
    for name, weight in wanted.items():
        assert name in original
        assert original.shape(name) == tuple(weight.shape)
        assert original.dtype(name) == torch.bfloat16
        assert original.nbytes(name) == 2 * weight.numel()
        assert torch.equal(original.read(name), weight), name
    assert "quantization_config" not in original.config
    assert original.quantization is not None
    assert original.total_bytes == Checkpoint(tmp_path).total_bytes < sum(map(original.nbytes, original.names()))
    beside = {name for name in ("hf_quant_config.json", "quantize_config.json") if (tmp_path / name).exists()}
    assert beside <= set(original.file_hashes())


@pytest.mark.parametrize("kind", ["fp8 block", "fp8 beside", "fp8 stripped", "nvfp4", "gptq old", "awq stripped"])
def test_an_original_and_an_artifact_compute_the_same(kind: str, tmp_path: Path) -> None:
    """Without rounded inputs; before, codes were read as weights where config.json did not state a format."""
    from transformers import AutoModelForCausalLM

    wanted = write(tmp_path / "quantized", kind)
    build("llama", tmp_path / "plain", torch.bfloat16)
    save_file(wanted, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(24)[None] * 7 % 256
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for opened in (open_original, open_artifact):
        reader, skeleton = opened(tmp_path / "quantized", CPU, torch.float32)
        if isinstance(reader, Artifact) and reader.activations is not None:
            continue  # a known format: the scales of its inputs are applied too
        with torch.no_grad():
            torch.testing.assert_close(skeleton.whole()(ids).logits, model(ids).logits)


def test_a_format_beside_the_config_is_that_of_the_artifact(tmp_path: Path) -> None:
    write(tmp_path, "fp8 beside")
    artifact = Artifact(tmp_path)
    assert artifact.format == "modelopt"
    assert len(artifact.linears) == 14
    assert artifact.activations is not None


@pytest.mark.parametrize("grid", [Grid(bits=4, group_size=32), Grid(bits=8, group_size=-1, symmetric=False),
                                  Grid(bits=3, group_size=32), Grid(type="fp8"), Grid(type="fp8", group_size=0),
                                  Grid(type="nvfp4"), Grid(type="mxfp4"), Grid(type="mxfp8")], ids=str)  # fmt: skip
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq", "modelopt"])
def test_our_own_artifacts_are_read_as_their_format_reads_them(format: str, grid: Grid, tmp_path: Path) -> None:
    try:
        make(tmp_path / "a", format, uniform(grid))
    except BadInput:
        pytest.skip("the format does not hold it")
    original, artifact = OriginalCheckpoint(tmp_path / "a"), Artifact(tmp_path / "a")
    assert len(artifact.linears) == 14
    for name in artifact.linears:
        assert torch.equal(original.read(f"{name}.weight"), artifact.read(f"{name}.weight")), name
    assert original.quantization is not None


def test_conv1d_weights_are_turned(tmp_path: Path) -> None:
    build("gpt2", tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.attn.c_proj"
    made, wanted = gptq(tensors.pop(f"{name}.weight").T)
    save_file(tensors | {f"{name}.{k}": v for k, v in made.items()}, tmp_path / "model.safetensors")
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    state(tmp_path, quantization_config=stated)
    assert torch.equal(OriginalCheckpoint(tmp_path).read(f"{name}.weight"), wanted.T.bfloat16())


def state(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def test_the_experts_of_gpt_oss(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    build("llama", tmp_path, torch.bfloat16)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 126, (3, 10, 2), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = load_file(tmp_path / "model.safetensors") | {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    state(tmp_path, quantization_config={"quant_method": "mxfp4"})
    original = OriginalCheckpoint(tmp_path)
    assert original.shape(name) == (3, 64, 10)
    assert torch.equal(original.read(name), convert_moe_packed_tensors(blocks, scales))
    first = blocks[1, 4, 1, 3].item()
    assert original.read(name)[1, 32 + 6, 4] == E2M1[first & 15] * 2.0 ** (scales[1, 4, 1].item() - 127)


def test_fused_experts_in_fp8_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    build("llama", tmp_path, torch.bfloat16)
    codes = torch.randn(3, 96, 64).to(torch.float8_e4m3fn)
    scales, name = torch.rand(3, 3, 2), "model.layers.0.mlp.experts.gate_up_proj"
    pairs, powers = torch.randint(-128, 128, (96, 32), dtype=torch.int8), torch.randint(120, 124, (96, 2)).byte()
    tensors = load_file(tmp_path / "model.safetensors") | {name: codes, f"{name}_scale_inv": scales}
    tensors |= {"model.layers.0.x.weight": pairs, "model.layers.0.x.scale": powers.view(torch.float8_e8m0fnu)}
    save_file(tensors, tmp_path / "model.safetensors")
    state(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    original, reader = OriginalCheckpoint(tmp_path), Fp8Dequantize(None)
    assert torch.equal(original.read(name), reader._dequantize_one(codes, scales, torch.bfloat16))
    # DeepSeek V4: two numbers of 4 bits an int8.
    assert torch.equal(original.read("model.layers.0.x.weight"), reader._dequantize_one(pairs, powers, torch.bfloat16))


def test_compressed_tensors_itself_agrees(tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    kinds = {"ct int4": "pack-quantized", "ct int3": "pack-quantized", "ct nvfp4": "nvfp4-pack-quantized",
             "ct mxfp4": "mxfp4-pack-quantized", "ct fp8": "float-quantized", "mxfp8": "mxfp8-quantized"}  # fmt: skip
    for kind, format in kinds.items():
        folder = tmp_path / kind
        write(folder, kind)
        linear, stated = "model.layers.0.mlp.up_proj", KINDS[kind][1]
        assert stated is not None
        scheme = QuantizationScheme.model_validate(stated["config_groups"]["group_0"] | {"format": format})
        tensors = load_file(folder / "model.safetensors")
        own = {n.removeprefix(f"{linear}."): t for n, t in tensors.items() if n.startswith(f"{linear}.")}
        theirs = BaseCompressor.get_value_from_registry(format).decompress(own, scheme)["weight"]
        ours = OriginalCheckpoint(folder).read(f"{linear}.weight")
        torch.testing.assert_close(ours, theirs.to(torch.bfloat16), rtol=2**-7, atol=0)


def change(folder: Path, how: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(how(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def without(ending: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


@pytest.mark.parametrize(
    ("kind", "how", "stated", "message"),
    [
        ("fp8 stripped", without("scale"), None, r"weight: float8_e4m3fn \[\d+, \d+\] are codes"),
        ("ct int8", without("scale"), None, r"weight: int8 \[\d+, \d+\] are codes"),
        ("nvfp4", without("scale_2"), None, r"weight: uint8 \[\d+, \d+\] are codes"),
        ("ct int4", without("weight_scale"), None, r"lacks .*weight_scale, which the codes beside it need"),
        ("fp8 block", None, {"quant_method": "aqlm"}, "quantized with 'aqlm', which cannot be dequantized here; known"),
        ("gptq", None, {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "marlin"),
        ("awq", None, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "gemv"),
        ("ct int4", None, {"quant_method": "compressed-tensors", "format": "marlin-24"}, "format 'marlin-24'"),
        ("ct int4", None, {"quant_method": "compressed-tensors", "format": "pack-quantized",
                           "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ],
)  # fmt: skip
def test_codes_are_never_taken_for_weights(
    kind: str, how: Any, stated: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path, kind)
    if how is not None:
        change(tmp_path, how)
    if stated is not None:
        state(tmp_path, quantization_config=stated)
    with pytest.raises(BadInput, match=message) as caught:
        OriginalCheckpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_zeros_whose_version_nothing_tells_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="no quantization_config says whether zeros are stored one lower"):
        OriginalCheckpoint(tmp_path).read("model.layers.0.mlp.up_proj.weight")


def test_a_parameter_of_integers_is_refused_when_a_model_is_opened(tmp_path: Path) -> None:
    build("llama", tmp_path, torch.bfloat16)
    change(tmp_path, lambda t: t | {"model.norm.weight": torch.ones(64, dtype=torch.uint8)})
    for opened in (open_original, open_artifact):
        with pytest.raises(BadInput, match=r"model.norm.weight is a weight of the model, and uint8 on disk"):
            opened(tmp_path, CPU)


def test_bitsandbytes_needs_its_library_and_is_read_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path, torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    settings = torch.tensor(list(json.dumps({"shape": [96, 64], "dtype": "bfloat16"}).encode()), dtype=torch.uint8)
    packed = {name: torch.zeros(3072, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(96),
              f"{name}.quant_map": torch.ones(16), f"{name}.quant_state.bitsandbytes__nf4": settings}  # fmt: skip
    change(tmp_path, lambda t: t | packed)
    state(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"quantized by bitsandbytes, .*: pip install bitsandbytes"):
        OriginalCheckpoint(tmp_path)
    monkeypatch.undo()
    library = types.ModuleType("bitsandbytes.functional")
    seen: list[Any] = []

    class QuantState:
        @staticmethod
        def from_dict(parts: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
            return parts

    def dequantize_4bit(codes: Tensor, found: dict[str, Tensor]) -> Tensor:
        seen.append((codes.shape, sorted(found)))
        return torch.full((96, 64), 0.5)

    library.QuantState, library.dequantize_4bit = QuantState, dequantize_4bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert torch.equal(OriginalCheckpoint(tmp_path).read(name), torch.full((96, 64), 0.5, dtype=torch.bfloat16))
    assert seen == [(torch.Size([3072, 1]), sorted(packed)[1:])]


def test_a_plain_checkpoint_is_read_as_it_is(tmp_path: Path) -> None:
    build("llama", tmp_path, torch.bfloat16)
    original, plain = OriginalCheckpoint(tmp_path), Checkpoint(tmp_path)
    assert original.names() == plain.names()
    assert original.quantization is None
    assert original.notes == ()
    assert original.file_hashes() == plain.file_hashes()
    assert all(torch.equal(original.read(name), plain.read(name)) for name in plain.names())
