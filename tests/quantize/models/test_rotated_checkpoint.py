"""The transform `hadamard`: the rotated model is the original one, its weights are as the formulas say, and it runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.engine.pipeline import prepare
from quantpress.engine.sources import resolve
from quantpress.eval.measure.evaluate import evaluate
from quantpress.eval.measure.evaluate import prepare as prepare_evaluation
from quantpress.methods.hadamard import Rotation
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.families import FAMILIES
from quantpress.models.rotated_checkpoint import RotatedCheckpoint
from quantpress.models.shards import write_part
from quantpress.recipe import Evaluation, Gates
from quantpress.recipe.loading import parse

from ... import tiny
from ..engine.test_pipeline import Stop, files, make

HADAMARD: dict[str, Any] = {"transforms": [{"name": "hadamard"}]}


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families and settings that only the rotation tells apart from others."""
    llama, moe = tiny._LLAMA, tiny.FAMILIES["qwen3_moe"][1]
    more = {
        "llama-biases": ("LlamaConfig", llama | {"attention_bias": True, "mlp_bias": True}),
        "llama-100": ("LlamaConfig", llama | {"hidden_size": 100, "head_dim": 10}),  # no Hadamard matrices
        "qwen2_moe": ("Qwen2MoeConfig", moe | {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}),
    }
    for family, (config, settings) in more.items():
        monkeypatch.setitem(tiny.FAMILIES, family, (config, settings))


SUPPORTED = [*(kind for kind, family in FAMILIES.items() if family.no_hadamard is None), "llama-biases", "llama-100"]


# ---- the model --------------------------------------------------------------------------------------------------


def written(folder: Path, reader: RotatedCheckpoint) -> Any:
    """The rotated checkpoint as a folder, loaded by transformers."""
    folder.mkdir()
    write_part(folder / "model.safetensors", {name: reader.read(name) for name in reader.names()})
    write_json(folder / "config.json", reader.config)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_rotated_model_gives_the_original_logits(family: str, tmp_path: Path) -> None:
    tiny.build(family, tmp_path / "model")
    reader = RotatedCheckpoint(Checkpoint(tmp_path / "model"), seed=5)
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    rotated = written(tmp_path / "rotated", reader)
    tokens = torch.randint(tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = original(tokens).logits, rotated(tokens).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SUPPORTED)
def test_everything_that_meets_the_residual_or_the_values_is_rotated(family: str, tmp_path: Path) -> None:
    """Norms scale by one; of the rest only q and k biases, their norms and what is inside the MLP are as they were."""
    tiny.build(family, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    reader = RotatedCheckpoint(checkpoint, seed=0)
    for name in reader.names():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            assert reader.read(name).unique().tolist() == [0.0 if family == "gemma" else 1.0]
            continue
        kept = name.endswith(("q_norm.weight", "k_norm.weight"))
        kept |= name.endswith(".bias") and not any(n in name for n in ("v_proj", "o_proj", "down_proj"))
        source = name if name in checkpoint else "model.embed_tokens.weight"
        assert torch.equal(reader.read(name), checkpoint.read(source)) == kept, name
        assert (reader.shape(name), reader.dtype(name)) == (checkpoint.shape(source), checkpoint.dtype(source))
        assert reader.nbytes(name) == reader.read(name).nbytes


@pytest.mark.parametrize("family", ["llama-biases", "phi3"])
def test_tensors_are_as_the_formulas_say(family: str, tmp_path: Path) -> None:
    tiny.build(family, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    reader = RotatedCheckpoint(checkpoint, seed=7)
    R1 = Rotation(64, 7)(torch.eye(64, dtype=torch.float64))
    R2 = Rotation(16, 7 + 1 + 1)(torch.eye(16, dtype=torch.float64))  # block 1

    def before(name: str) -> Tensor:
        return checkpoint.read(f"model.layers.1.{name}").double()

    def check(name: str, expected: Tensor) -> None:
        torch.testing.assert_close(reader.read(f"model.layers.1.{name}").double(), expected, rtol=1e-5, atol=1e-7)

    attention, mlp = before("input_layernorm.weight"), before("post_attention_layernorm.weight")
    over_heads = torch.block_diag(*[R2] * 4)
    values = torch.block_diag(*[R2] * 2).T
    check("self_attn.o_proj.weight", R1.T @ before("self_attn.o_proj.weight") @ over_heads)
    check("mlp.down_proj.weight", R1.T @ before("mlp.down_proj.weight"))
    if family == "phi3":
        W = (before("self_attn.qkv_proj.weight") * attention) @ R1
        check("self_attn.qkv_proj.weight", torch.cat([W[:96], values @ W[96:]]))
        check("mlp.gate_up_proj.weight", (before("mlp.gate_up_proj.weight") * mlp) @ R1)
        return
    check("self_attn.q_proj.weight", (before("self_attn.q_proj.weight") * attention) @ R1)
    check("self_attn.v_proj.weight", values @ (before("self_attn.v_proj.weight") * attention) @ R1)
    check("self_attn.v_proj.bias", values @ before("self_attn.v_proj.bias"))
    check("self_attn.o_proj.bias", R1.T @ before("self_attn.o_proj.bias"))
    check("mlp.up_proj.weight", (before("mlp.up_proj.weight") * mlp) @ R1)
    check("mlp.down_proj.bias", R1.T @ before("mlp.down_proj.bias"))
    embedding, head = checkpoint.read("model.embed_tokens.weight"), checkpoint.read("lm_head.weight")
    torch.testing.assert_close(reader.read("model.embed_tokens.weight").double(), embedding.double() @ R1)
    final = (head * checkpoint.read("model.norm.weight")).double() @ R1
    torch.testing.assert_close(reader.read("lm_head.weight").double(), final, rtol=1e-5, atol=1e-6)


def test_a_tensor_of_many_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.build("llama-biases", tmp_path, torch.bfloat16)
    reader = RotatedCheckpoint(Checkpoint(tmp_path), seed=0)
    whole = {name: reader.read(name) for name in reader.names()}
    monkeypatch.setattr("quantpress.models.rotated_checkpoint._PIECE", 1000)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in whole.items())


def test_outliers_are_spread_over_all_channels(tmp_path: Path) -> None:
    def plant(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("q_proj.weight", "up_proj.weight", "embed_tokens.weight")):
                tensor[:, 3] *= 40

    tiny.build("llama", tmp_path)
    changed(tmp_path, plant)
    checkpoint = Checkpoint(tmp_path)
    reader = RotatedCheckpoint(checkpoint, seed=0)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        assert kurtosis(checkpoint.read(name)) > 20
        assert kurtosis(reader.read(name)) < 4  # 3 is a normal distribution's


def kurtosis(x: Tensor) -> float:
    return float((x - x.mean()).pow(4).mean() / x.var() ** 2)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a tiny checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_on_disk_counts_although_the_config_ties_it(tmp_path: Path) -> None:
    """As transformers loads it, 5.17 and 5.24 alike: tied only where the file holds no other head."""
    tiny.build("llama", tmp_path)
    alone = RotatedCheckpoint(Checkpoint(tmp_path), seed=0)
    head, names = alone.read("lm_head.weight"), alone.names()
    assert head.any()
    changed(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(tiny.VOCAB, 64)}))
    both = RotatedCheckpoint(Checkpoint(tmp_path), seed=0)
    assert sorted(both.names()) == sorted(names)
    assert not both.read("lm_head.weight").any()
    assert both.config["tie_word_embeddings"] is False


# ---- what it refuses --------------------------------------------------------------------------------------------


def prepared(model: Path, document: dict[str, Any]) -> Any:
    recipe = parse({"model": str(model), "weights": {"group_size": 32}} | HADAMARD | document)
    return prepare(recipe, resolve(recipe.model, cache=model.parent / "cache"))


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma2", "cannot rotate gemma2 models: norms after attention and MLP scale"),
        ("gemma3", "cannot rotate gemma3_text models: norms after attention and MLP scale"),
        ("olmo2", "cannot rotate olmo2 models: norms after attention and MLP scale"),
        ("glm4", "cannot rotate glm4 models: norms after attention and MLP scale"),
        ("gpt2", "cannot rotate gpt2 models: LayerNorm subtracts the mean"),
        ("gpt_neox", "cannot rotate gpt_neox models: LayerNorm subtracts the mean"),
    ],
)
def test_families_where_it_is_not_exact_are_refused(family: str, why: str, tmp_path: Path) -> None:
    tiny.build(family, tmp_path / "model")
    with pytest.raises(BadInput, match=why) as caught:
        prepared(tmp_path / "model", {})
    assert "\n" not in str(caught.value)


def test_a_family_without_a_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "stablelm", ("StableLmConfig", tiny._LLAMA))
    tiny.build("stablelm", tmp_path / "model")
    with pytest.raises(BadInput, match=r"cannot rotate stablelm models: where its blocks meet .* is not described"):
        prepared(tmp_path / "model", {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.self_attn.o_proj.weight", "lacks 1 tensors, the first model.layers.1.self_attn.o_proj.weight"),
        ("model.layers.0.input_layernorm.weight", "lacks 1 tensors, the first model.layers.0.input_layernorm.weight"),
        ("model.norm.weight", "has no tensor norm.weight, which must be rotated"),
        ("lm_head.weight", "has no tensor lm_head.weight, which must be rotated"),
    ],
)
def test_a_missing_tensor_is_refused(name: str, message: str, tmp_path: Path) -> None:
    tiny.build("mistral", tmp_path / "model")
    changed(tmp_path / "model", lambda tensors: tensors.pop(name))
    with pytest.raises(BadInput, match=message):
        prepared(tmp_path / "model", {})


def test_a_weight_that_no_row_accounts_for_is_refused(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    name = "model.layers.0.mlp.extra_proj.weight"
    changed(tmp_path / "model", lambda tensors: tensors.update({name: torch.zeros(64, 64)}))
    with pytest.raises(BadInput, match=f"does not know what {name} of a llama model reads and writes"):
        prepared(tmp_path / "model", {})


@pytest.mark.parametrize("transforms", [["awq", "hadamard"], ["hadamard", "hadamard"]])
def test_it_comes_first_and_once(transforms: list[str]) -> None:
    with pytest.raises(BadInput, match="hadamard comes first, and once"):
        parse({"transforms": [{"name": name} for name in transforms]})


def test_what_float16_cannot_hold_once_rotated_is_refused_before_the_work(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model", torch.float16)
    changed(tmp_path / "model", lambda tensors: tensors["model.embed_tokens.weight"][7].fill_(60000))
    with pytest.raises(BadInput, match=r"model.embed_tokens.weight holds inf in float16 once it is rotated"):
        make(tmp_path / "run", tmp_path / "model", HADAMARD)
    assert not (tmp_path / "run").exists()


# ---- a run ------------------------------------------------------------------------------------------------------


def test_a_run_resumes_to_the_same_bytes_and_is_measured_against_the_original(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.build("llama", model, torch.bfloat16)
    document = HADAMARD | {"weights": {"bits": 8, "group_size": 32}}
    manifest = make(tmp_path / "whole", model, document)

    def stop(progress: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "cut", model, document, on_block=stop)
    make(tmp_path / "cut", model, document)
    assert files(tmp_path / "cut" / "quantized") == files(tmp_path / "whole" / "quantized")

    original, artifact = Checkpoint(model), Checkpoint(tmp_path / "whole" / "quantized")
    assert artifact.config["tie_word_embeddings"] is False
    assert artifact.nbytes("lm_head.weight") == original.nbytes("model.embed_tokens.weight")
    assert manifest.model.files == original.file_hashes()
    assert manifest.artifact.original_bytes == original.total_bytes
    added = original.nbytes("model.embed_tokens.weight")
    assert manifest.fallbacks[0] == f"hadamard: the head is no longer tied to the embedding, which adds {added} bytes"

    (tmp_path / "text.txt").write_text(tiny.text())
    wanted = Evaluation(source=str(tmp_path / "text.txt"), windows=2, window=64)
    results = evaluate(model, tmp_path / "whole" / "quantized", prepare_evaluation(model, wanted, tmp_path), Gates())
    assert results.divergence is not None
    assert 0 < results.divergence.kl_mean < 1e-4
    assert json.loads((tmp_path / "whole" / "quantized" / "manifest.json").read_text())["recipe"]["transforms"] == [
        {"name": "hadamard", "seed": 0}
    ]


def test_the_plan_counts_the_head_and_says_why(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model", torch.bfloat16)
    plain, rotated = (prepared(tmp_path / "model", {"transforms": t}).plan for t in ([], HADAMARD["transforms"]))
    added = Checkpoint(tmp_path / "model").nbytes("model.embed_tokens.weight")
    assert rotated.artifact_bytes - plain.artifact_bytes == added
    assert rotated.original_bytes == plain.original_bytes
    assert f"adds {added} bytes" in rotated.notes[0]
    assert plain.notes == ()


def test_a_size_without_a_hadamard_matrix_is_noted(tmp_path: Path) -> None:
    tiny.build("llama-100", tmp_path)
    notes = RotatedCheckpoint(Checkpoint(tmp_path), seed=0).notes
    assert [note for note in notes if "order 100 (hidden size)" in note]
    assert [note for note in notes if "order 10 (head size)" in note]
