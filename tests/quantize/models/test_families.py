"""The table of model families: a family that is added is a row, and what a row says holds of the model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming

from quantpress.artifact.artifact import open_artifact
from quantpress.artifact.gguf_floats import write_floats
from quantpress.core.errors import BadInput
from quantpress.gguf.reader import GgufCheckpoint
from quantpress.models.families import FAMILIES
from quantpress.models.family import Family, Feed

from ... import tiny
from ..engine.test_pipeline import make
from ..gguf.models import IDS, VOCAB, logits
from ..gguf.models import tokenizer as gguf_tokenizer

CPU = torch.device("cpu")
EIGHT_BITS: dict[str, Any] = {"weights": {"bits": 8, "group_size": 32}, "method": {"name": "rtn"}}


class ToyConfig(transformers.LlamaConfig):  # type: ignore[misc]
    model_type = "toy"


class Toy(transformers.LlamaForCausalLM):  # type: ignore[misc]
    config_class = ToyConfig


# All that is needed to quantize a new family by every method and write it for every server.
TOY = Family(
    feeds=(
        Feed("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Feed("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Feed("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Feed("mlp.up_proj", ("mlp.down_proj",)),
    ),
    no_hadamard=None,
    gguf=FAMILIES["llama"].gguf,
)


@pytest.fixture
def toy(tmp_path: Path) -> Any:
    """A tiny model of a family that transformers has been told of; in tmp_path/model, with names of its own on disk."""
    transformers.AutoConfig.register("toy", ToyConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(ToyConfig, Toy, exist_ok=True)
    torch.manual_seed(0)
    model = Toy(ToyConfig(**(tiny._LLAMA | {"vocab_size": VOCAB}))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model")
    gguf_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({name.replace(".mlp.", ".ffn."): t for name, t in load_file(file).items()}, file)
    return model


def artifact(run: Path, model: Path, transform: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of what a run with one transform makes of `model`, and the weight of a norm in it."""
    make(run, model, EIGHT_BITS | {"transforms": [transform]})
    reader, skeleton = open_artifact(run / "quantized", CPU)
    assert "model.layers.0.ffn.down_proj" in reader.linears
    return logits(skeleton.whole(), IDS), reader.read("model.layers.0.input_layernorm.weight")


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_a_new_family_is_a_row(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    from quantpress.gguf.llama_cpp_library import Loaded

    monkeypatch.setitem(FAMILIES, "toy", TOY)
    names_of_its_own(monkeypatch)
    model, want = tmp_path / "model", logits(toy, IDS)
    norm = load_file(model / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    got, scaled = artifact(tmp_path / "awq", model, {"name": "awq", "points": 4})
    assert difference(got, want) < 0.04
    assert not torch.equal(scaled, norm)
    got, rotated = artifact(tmp_path / "hadamard", model, {"name": "hadamard"})
    assert difference(got, want) < 0.04
    assert bool((rotated == 1).all())
    write_floats(model, tmp_path / "model.gguf", "F32")
    with Loaded(tmp_path / "model.gguf", 64, threads=1) as llama:
        assert difference(torch.from_numpy(llama.logits(IDS.tolist())), want) < 3e-3  # its cache is float16
    back = GgufCheckpoint(with_config(tmp_path))
    for name, tensor in load_file(model / "model.safetensors").items():
        torch.testing.assert_close(back.read(name), tensor, rtol=0, atol=0)


def names_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell transformers what the toy's tensors are called on disk, as a package with such a family does."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the table
    table = dict(conversion_mapping._checkpoint_conversion_mapping_cache or {})
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", table)
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    conversion_mapping.register_checkpoint_conversion_mapping("toy", [WeightRenaming(r"\.ffn\.", ".mlp.")])


def with_config(folder: Path) -> Path:
    """`folder`, in which the model's config.json lies beside model.gguf as in an artifact."""
    shutil.copy(folder / "model" / "config.json", folder)
    return folder


def test_without_a_row_it_is_refused(toy: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    with pytest.raises(BadInput, match=r"lacks 6 tensors, the first model\.layers\.0\.mlp\.gate_proj\.weight"):
        make(tmp_path / "run", model, EIGHT_BITS)
    file = model / "model.safetensors"
    save_file({name.replace(".ffn.", ".mlp."): t for name, t in load_file(file).items()}, file)
    with pytest.raises(BadInput, match=r"no row of models/families\.py"):
        make(tmp_path / "run", model, EIGHT_BITS | {"transforms": ["awq"]})
    with pytest.raises(BadInput, match="cannot rotate toy models: where its blocks meet the residual stream is not"):
        make(tmp_path / "run", model, EIGHT_BITS | {"transforms": ["hadamard"]})
    with pytest.raises(BadInput, match=r"architecture 'toy' cannot be written as GGUF; llama, mistral, .* can"):
        write_floats(model, tmp_path / "model.gguf", "F32")
    make(tmp_path / "run", model, EIGHT_BITS)  # a decoder stack like others


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_row_describes_a_model_type_of_transformers(model_type: str) -> None:
    assert model_type in transformers.models.auto.configuration_auto.CONFIG_MAPPING
