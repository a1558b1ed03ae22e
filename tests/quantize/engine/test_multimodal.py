"""Whole runs on multimodal models: what is written, how it loads, what the manifest says of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from quantpress.artifact.artifact import open_artifact
from quantpress.artifact.convert import convert
from quantpress.artifact.manifest import read_manifest
from quantpress.artifact.original import OriginalCheckpoint
from quantpress.core.errors import BadInput
from quantpress.engine import guard
from quantpress.exports import contracts
from quantpress.exports.verify import verify
from quantpress.models.config_forms import readable_by_all
from quantpress.models.skeleton import Skeleton, run_block

from ...multimodal import build
from .test_pipeline import make

CPU = torch.device("cpu")
SYMMETRIC = {"weights": {"bits": 4, "group_size": 32, "symmetric": True}, "formats": ["compressed-tensors"]}


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The artifact's, by way of this package."""
    _, ours = open_artifact(folder, CPU, torch.float32)
    ours.open_shell()
    hidden, arguments = ours.embed(ids), ours.block_arguments(ids)
    for k, block in ours.blocks():
        run_block(block, hidden, arguments[k], device=CPU, batch=len(ids))
    return ours.logits(hidden.flatten(0, 1)).unflatten(0, tuple(ids.shape))


def loaded(folder: Path) -> Any:
    """transformers' model of the artifact, every tensor of which it has a place for."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    ("family", "method"), [("qwen2_5_vl", "gptq"), ("llava", "rtn"), ("gemma3", "gptq"), ("qwen3_5_moe", "rtn")]
)
def test_transformers_loads_the_artifact_as_the_multimodal_model(family: str, method: str, tmp_path: Path) -> None:
    build(family, tmp_path / "model")
    make(tmp_path / "run", tmp_path / "model", SYMMETRIC | {"method": {"name": method}})
    folder = tmp_path / "run" / "quantized"
    model = loaded(folder)
    ids = torch.randint(6, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)  # only now are the weights dequantized
        expected = torch.nn.Module.float(model)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits(folder, ids), expected, atol=1e-4, rtol=1e-4)
    assert verify(tmp_path / "run").problems == ()


def test_everything_beside_the_decoder_comes_along_as_it_is(tmp_path: Path) -> None:
    build("qwen2_5_vl", tmp_path / "model")
    make(tmp_path / "run", tmp_path / "model", SYMMETRIC | {"method": {"name": "rtn"}})
    folder = tmp_path / "run" / "quantized"
    before, after = load_file(tmp_path / "model" / "model.safetensors"), load_file(folder / "model.safetensors")
    towers = [name for name in before if name.startswith("visual.")]
    assert len(towers) > 30
    for name in towers:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    beside = (tmp_path / "model" / "preprocessor_config.json").read_bytes()
    assert (folder / "preprocessor_config.json").read_bytes() == beside
    old, new = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "model", folder))
    assert new == readable_by_all(old) | {"quantization_config": new["quantization_config"]}
    fallbacks = read_manifest(tmp_path / "run").fallbacks
    assert any(line.startswith("visual: beside the text decoder, copied as it is (") for line in fallbacks)
    assert any("calibrated and evaluated on text alone" in line for line in fallbacks)


def test_layers_of_two_kinds_are_named_as_each_reader_names_them(tmp_path: Path) -> None:
    """A regular expression is compared with a reader's own names, which no reader maps."""
    build("qwen2_5_vl", tmp_path / "model")
    document: dict[str, Any] = {"overrides": [{"match": "*.down_proj", "bits": 8}], "ignore": ["*layers.1.mlp*"]}
    make(tmp_path / "run", tmp_path / "model", SYMMETRIC | {"method": {"name": "rtn"}} | document)
    folder = tmp_path / "run" / "quantized"
    loaded(folder)
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    vllm = "language_model.model.layers.0.mlp.down_proj"  # what its mapper makes of model.layers.…
    wanted = [group for group in stated["config_groups"].values() if any(map(_matches(vllm), group["targets"]))]
    assert [group["weights"]["num_bits"] for group in wanted] == [8]
    assert "model.layers.1.mlp.up_proj" in stated["ignore"]


def _matches(name: str) -> Any:
    import re

    return lambda target: target.startswith("re:") and re.match(target[3:], name)


def test_layers_beyond_the_model_are_left_out_by_name(tmp_path: Path) -> None:
    """A loader of multi-token prediction takes them in 16 bit only where the config says so."""
    build("qwen3_5_moe", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    more = {
        "mtp.fc.weight": torch.randn(64, 128).bfloat16(),
        "mtp.norm.weight": torch.randn(64).bfloat16(),
        "mtp.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 64, 64).bfloat16(),
    }
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    make(tmp_path / "run", tmp_path / "model", SYMMETRIC | {"method": {"name": "rtn"}})
    folder = tmp_path / "run" / "quantized"
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in more.items())
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert [name for name in ignored if name.startswith("mtp")] == [
        "mtp.fc",
        *(f"mtp.layers.0.mlp.experts.0.{projection}_proj" for projection in ("gate", "up", "down")),
    ]
    assert sorted(read_manifest(tmp_path / "run").kept) == sorted(more)
    assert verify(tmp_path / "run").problems == ()


def test_a_large_model_is_compared_without_its_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("qwen3_5_moe", tmp_path)
    monkeypatch.setattr(guard, "_WHOLE_BYTES", 0)
    checkpoint = OriginalCheckpoint(tmp_path)
    skeleton = Skeleton(checkpoint, device=torch.device("cpu"))
    check = guard.check_forward(tmp_path, skeleton, checkpoint, 1_000_000)
    assert check.compared == "a twin with 3 blocks"
    assert check.difference is not None
    assert check.difference < 1e-4


def test_the_whole_model_has_its_towers(tmp_path: Path) -> None:
    model = build("qwen3_vl", tmp_path)
    whole = Skeleton(OriginalCheckpoint(tmp_path), device=CPU).whole()
    for name, parameter in model.named_parameters():
        assert torch.equal(whole.get_parameter(name), parameter)


def test_an_artifact_converted_to_another_format_names_the_same(tmp_path: Path) -> None:
    build("qwen2_5_vl", tmp_path / "model")
    document = SYMMETRIC | {"method": {"name": "rtn"}, "formats": ["gptq"], "ignore": ["*layers.1.mlp*"]}
    make(tmp_path / "run", tmp_path / "model", document)
    convert(tmp_path / "run" / "quantized", tmp_path / "converted", "compressed-tensors")
    loaded(tmp_path / "converted")
    assert verify(tmp_path / "converted").problems == ()
    convert(tmp_path / "converted", tmp_path / "back", "gptq")
    first, last = (tmp_path / "run" / "quantized" / "config.json"), tmp_path / "back" / "config.json"
    left = [json.loads(file.read_text())["quantization_config"]["dynamic"] for file in (first, last)]
    assert set(left[0]) == set(left[1])


def test_what_cannot_be_done_to_a_multimodal_model_is_refused(tmp_path: Path) -> None:
    build("llava", tmp_path / "model")
    with pytest.raises(BadInput, match=r"cannot rotate multimodal models \(llava\): what their towers add"):
        make(tmp_path / "run", tmp_path / "model", {"transforms": [{"name": "hadamard"}], "method": {"name": "rtn"}})


def test_a_head_that_is_not_the_embedding_counts(tmp_path: Path) -> None:
    """Of a config that ties them, as its text part does."""
    build("gemma3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = {"language_model.lm_head.weight": torch.randn(256, 64).bfloat16()}
    save_file(tensors | head, file, metadata={"format": "pt"})
    ours = Skeleton(OriginalCheckpoint(tmp_path), device=CPU)
    assert ours.head_names() == ["language_model.lm_head"]
    assert not ours.tied
    assert not ours.config.tie_word_embeddings


def test_what_a_server_needs_is_read_off_the_text_part(tmp_path: Path) -> None:
    build("qwen2_5_vl", tmp_path / "model")
    make(tmp_path / "run", tmp_path / "model", SYMMETRIC | {"method": {"name": "rtn"}})
    served = contracts.of_folder(tmp_path / "run" / "quantized")
    assert (served.heads, served.kv_heads, served.positions) == (4, 2, 128)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_scales_move_within_a_text_decoder(family: str, tmp_path: Path) -> None:
    model = build(family, tmp_path / "model", torch.float32)
    document = SYMMETRIC | {"transforms": [{"name": "smoothquant"}], "weights": {"bits": 8, "group_size": -1}}
    manifest = make(tmp_path / "run", tmp_path / "model", document | {"method": {"name": "rtn"}})
    assert any(record.strength for record in manifest.transforms)
    ids = torch.randint(6, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    ours = logits(tmp_path / "run" / "quantized", ids)
    assert float((ours - expected).norm() / expected.norm()) < 0.05
