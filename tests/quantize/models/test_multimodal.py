"""The text decoder of a multimodal model is found, run and named; the towers are left alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantpress.artifact.original import OriginalCheckpoint
from quantpress.core.errors import BadInput
from quantpress.models import architecture
from quantpress.models.building import build_model
from quantpress.models.placed_model import PlacedModel, _find_blocks
from quantpress.models.skeleton import Skeleton, run_block
from quantpress.models.towers import filled_where_called, text_model, tower_names, without_head

from ...multimodal import MULTIMODAL, build

CPU = torch.device("cpu")


def skeleton(folder: Path) -> Skeleton:
    return Skeleton(OriginalCheckpoint(folder), device=CPU)


def through_blocks(ours: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    """The states that leave the last block, block by block."""
    ours.open_shell()
    hidden, arguments = ours.embed(ids), ours.block_arguments(ids)
    for k, block in ours.blocks():
        run_block(block, hidden, arguments[k], device=CPU, batch=len(ids))
    return hidden


@pytest.mark.parametrize("family", MULTIMODAL)
def test_text_goes_through_the_blocks_as_through_the_whole_model(family: str, tmp_path: Path) -> None:
    model = build(family, tmp_path, torch.float32)
    ids = torch.randint(6, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    ours = skeleton(tmp_path)
    hidden = through_blocks(ours, ids)
    with torch.no_grad():
        expected = text_model(model)(input_ids=ids, use_cache=False).logits  # Llama 4's whole fails in 5.24
    torch.testing.assert_close(ours.logits(hidden.flatten(0, 1)), expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    read = [n for n, p in ours.model.named_parameters() if ("vision" in n or "visual" in n) and not p.is_meta]
    assert len(read) <= 1  # that whose device a model takes for its own


@pytest.mark.parametrize("family", MULTIMODAL)
def test_every_matrix_is_of_the_decoder_or_named_as_left_out(family: str, tmp_path: Path) -> None:
    model = build(family, tmp_path)
    ours = skeleton(tmp_path)
    text = {ours.disk_name(f"{ours.blocks_name}.{k}.{name}") for k in range(3) for name in ours.block_names(k)}
    quantized = {f"{x.name}.weight" for x in ours.linears()}
    assert quantized <= text
    towers = ours.tower_tensors()
    assert sum(towers.values()) == sum(p.numel() for n, p in model.named_parameters() if "language_model" not in n) - (
        0 if ours.tied or family == "llama4" else model.lm_head.weight.numel()
    )
    left = set(ours.unquantized_modules())
    for name, module in model.named_modules():  # transformers compares its own names
        if isinstance(module, torch.nn.Linear) and ours.blocks_name not in name:
            assert name in left
    for name, tensor in load_file(tmp_path / "model.safetensors").items():  # vLLM those on disk
        if tensor.dim() == 2 and name in towers and "embed" not in name and name.endswith(".weight"):
            assert name.removesuffix(".weight") in left


def test_a_checkpoint_without_its_tower_is_refused(tmp_path: Path) -> None:
    build("llava", tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.startswith("vision_tower.encoder.layers.1")}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"lacks 16 tensors outside the blocks, the first vision_tower\.encoder"):
        skeleton(tmp_path)


def test_names_of_older_files(tmp_path: Path) -> None:
    """transformers 4.52 put `model.` before everything; before, the text model's own prefix came second."""
    build("llava", tmp_path)
    file = tmp_path / "model.safetensors"
    before = [x.name for x in skeleton(tmp_path).linears()]
    assert before[0] == "language_model.model.layers.0.self_attn.q_proj"
    newer = {}
    for name, tensor in load_file(file).items():
        name = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        newer[name if name.startswith(("model.", "lm_head")) else f"model.{name}"] = tensor
    save_file(newer, file, metadata={"format": "pt"})
    ours = skeleton(tmp_path)
    assert ours.linears()[0].name == "model.language_model.layers.0.self_attn.q_proj"
    assert not ours.unused
    assert "model.vision_tower.encoder.layers.0.self_attn.q_proj" in ours.unquantized_modules()


def test_the_dtype_of_a_model_may_stand_with_its_text_part(tmp_path: Path) -> None:
    build("qwen3_vl", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    config["text_config"]["dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert skeleton(tmp_path).dtype == torch.bfloat16


def test_states_before_the_head_of_a_model_that_holds_a_language_model(tmp_path: Path) -> None:
    """Llama 4's class has no part without a head, but for the one in the language model that it holds."""
    model = build("llama4", tmp_path, torch.float32)
    ids = torch.randint(6, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    ours = skeleton(tmp_path)
    hidden = through_blocks(ours, ids)
    with torch.no_grad():
        expected = model.language_model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(ours.final_norm(hidden[0]), expected, atol=1e-5, rtol=1e-5)


def test_a_class_that_is_not_run_as_a_whole_is_run_in_part() -> None:
    """Qwen-Omni's has no forward; its thinker makes the text, its talker the sound."""
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 256, "rope_parameters": {"mrope_section": [2, 3, 3]}}
    config = transformers.Qwen2_5OmniConfig(thinker_config={"text_config": text})
    model = build_model(config, torch.bfloat16)
    assert text_model(model) is model.thinker
    assert without_head(model.thinker) is model.thinker.model
    placed = PlacedModel.__new__(PlacedModel)
    placed._text = text_model(model)
    assert placed.embeddings is model.thinker.get_input_embeddings()  # the class itself has none
    parts = {name.split(".")[0] for name in tower_names(model)}
    assert parts == {"thinker", "talker", "token2wav"}
    _check_towers(model)


def test_a_model_whose_towers_embed_no_tokens() -> None:
    """Of Qwen3-Omni's thinker transformers has no part by name that is without the head."""
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"vocab_size": 256, "num_experts": 4, "rope_parameters": {"mrope_section": [2, 3, 3]}}
    model = build_model(transformers.Qwen3OmniMoeThinkerConfig(text_config=text), torch.bfloat16)
    assert text_model(model) is model
    assert without_head(model) is model.model
    _check_towers(model)


def test_what_text_passes_through_of_a_tower_is_read_too() -> None:
    """Gemma 3n embeds all tokens as images and sound as well; that needs timm to be built."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, device="meta") for name in ("first", "second", "never")})
    given: list[set[str]] = []

    def fill(names: set[str]) -> None:
        given.append(set(names))
        values = {name: torch.ones(value.shape) for name, value in model.state_dict().items() if name in names}
        model.load_state_dict(values, assign=True, strict=False)

    def run() -> torch.Tensor:
        out = model["first"](torch.ones(1, 2))
        return model["second"](out)  # type: ignore[no-any-return]

    towers = [name for name, _ in model.named_parameters()]
    out = filled_where_called(model, towers, fill, run)
    assert given == [{"first.weight", "first.bias"}, {"second.weight", "second.bias"}]
    assert out.tolist() == [[7.0, 7.0]]
    assert model["never"].weight.is_meta
    with pytest.raises(ZeroDivisionError):
        filled_where_called(model, towers, fill, lambda: 1 / 0)


def _check_towers(model: Any) -> None:
    """They are all that the decoder and its head do not have, wherever a version of transformers puts them."""
    thinker, towers = text_model(model), tower_names(model)
    text = [*thinker.get_decoder().parameters(), *thinker.get_output_embeddings().parameters()]
    inside = {id(parameter) for parameter in text}
    assert all((id(p) in inside) is (n not in towers) for n, p in model.named_parameters())
    assert any("visual" in name for name in towers)
    assert any("audio_tower" in name for name in towers)


def test_a_package_that_transformers_wants_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wanting(*_: object) -> None:
        raise ImportError("TimmWrapperModel requires the timm library")

    monkeypatch.setattr(architecture, "build_model", wanting)
    with pytest.raises(BadInput, match="gemma3n: transformers needs another package for it: TimmWrapperModel requires"):
        architecture.empty_model(transformers.Gemma3nConfig(), torch.float32)


def test_a_tower_of_as_many_blocks_is_not_taken_for_the_decoder() -> None:
    """Git's class calls nothing its decoder, so that both are looked through."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.GitConfig(vision_config=small | {"image_size": 16, "patch_size": 8}, **small, vocab_size=64)
    name, blocks = _find_blocks(build_model(config), (2,))
    assert name == "git.encoder.layer"
    assert len(blocks) == 2
