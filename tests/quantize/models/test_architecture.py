"""What config.json says the model is, and what is refused for it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantpress.core.errors import BadInput
from quantpress.models.architecture import empty_model, text_config
from quantpress.models.checkpoint import _WRAPPERS, Checkpoint
from quantpress.models.skeleton import Skeleton

from ...tiny import build

CPU = torch.device("cpu")


def config(family: str, folder: Path) -> dict[str, Any]:
    build(family, folder)
    return Checkpoint(folder).config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": None}, "config.json has no model_type"),
        (
            {"model_type": "nonesuch"},
            r"unknown architecture: model_type 'nonesuch' is not one that transformers 5\.\d+",
        ),
        ({"model_type": "nonesuch", "auto_map": {}}, r"own code \(auto_map\) cannot be run block by block"),
        ({"model_type": "vit"}, "'vit' is not a causal language model"),
        ({"model_type": "bert"}, "'bert' is an encoder"),
        ({"model_type": "xlm-roberta"}, "'xlm-roberta' is an encoder"),
        ({"model_type": "bert-generation"}, "'bert-generation' reads text in both directions"),
        ({"model_type": "bart"}, "'bart' is an encoder with a decoder"),
        ({"model_type": "marian", "decoder_vocab_size": 256}, "'marian' is an encoder with a decoder"),
        ({"model_type": "whisper"}, "'whisper' is an encoder with a decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a classification or reward model"),
        ({"model_type": "mllama", "text_config": {"cross_attention_layers": [1, 3]}}, "blocks 1, 3 run on images only"),
        ({"text_config": {"model_type": "qwen2"}}, "a llama model has no text_config, and transformers does not load"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0; it has to be at least 1, or null"),
        ({"model_type": "cpmant"}, "puts tokens of its own before the text"),
        ({"model_type": "idefics"}, "run on images only"),
        ({"dtype": "auto"}, "dtype 'auto' is not bfloat16"),
        ({"num_attention_heads": "four"}, "does not describe a llama model"),
    ],
)
def test_what_is_no_decoder_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        text_config(config("llama", tmp_path) | change)
    assert "\n" not in str(caught.value)


SCALED = {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 2.0, "long_factor": [1.0] * 8}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 0}, "rope_theta of the rotary embedding is 0; it has to be a number above 0"),
        ({"rope_theta": -1e4}, "rope_theta of the rotary embedding is -10000.0; it"),
        ({"rope_theta": float("nan")}, "rope_theta of the rotary embedding is nan; it"),
        ({"rope_theta": {"__float__": "Infinity"}}, "rope_theta of the rotary embedding is inf; it"),
        ({"rope_theta": "10000"}, "rope_theta of the rotary embedding is '10000'; it"),
        ({"rope_theta": True}, "rope_theta of the rotary embedding is True; it"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor of the rotary embedding is 0; it"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": -2.0}}, "factor of the rotary embedding is -2.0; it"),
        ({"rope_scaling": SCALED | {"short_factor": [1.0] * 7 + [0]}}, "short_factor of the rotary embedding is 0; it"),
    ],
)
def test_rotary_embeddings_that_cannot_be(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    own = config("llama", tmp_path)
    own = {key: value for key, value in own.items() if key not in ("rope_parameters", "rope_theta")}
    checkpoint = Checkpoint(tmp_path)
    checkpoint.config = own | change
    with pytest.raises(BadInput, match=re.escape(f"config.json: {words}")):
        Skeleton(checkpoint, device=CPU)


def test_a_model_that_reads_both_ways_is_refused() -> None:
    with pytest.raises(BadInput, match="'xlnet' reads text in both directions"):
        text_config({"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"]})


def test_a_family_that_transformers_has_needs_no_code_of_its_own(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "_attn_implementation": "flash_attention_2"}
    assert type(text_config(config("llama", tmp_path) | own)) is transformers.LlamaConfig


def test_configs_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    written = transformers.Mamba2Config(num_heads=8, head_dim=32, hidden_size=128, time_step_limit=(0.0, float("inf")))
    written.save_pretrained(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert tuple(text_config(checkpoint.config).time_step_limit) == (0.0, float("inf"))
    assert checkpoint.config["time_step_limit"][1] == {"__float__": "Infinity"}  # as it goes into the artifact
    file = tmp_path / "config.json"
    file.write_text("\ufeff" + file.read_text(), encoding="utf-8")  # as some editors save it
    with pytest.raises(BadInput, match="begins with a byte order mark"):
        Checkpoint(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BadInput, match=r"config\.json: a Git LFS pointer"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["mrope", "nonesuch"])
def test_rope_of_another_model_is_refused(kind: str, tmp_path: Path) -> None:
    build("qwen2", tmp_path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.config.pop("rope_parameters")
    checkpoint.config["rope_scaling"] = {"type": kind, "mrope_section": [2, 3, 3]}
    with pytest.raises(BadInput, match=f"rope type '{kind}' is not one that transformers computes for qwen2"):
        Skeleton(checkpoint, device=CPU)


def test_a_missing_head_is_seen_before_the_work(tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    shard = tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(shard).items() if n != "lm_head.weight"}, shard)
    with pytest.raises(BadInput, match=r"lm_head\.weight is missing: the head is not tied"):
        Skeleton(Checkpoint(tmp_path), device=CPU)
    save_file({n: t for n, t in load_file(shard).items() if n != "model.norm.weight"}, shard)
    with pytest.raises(BadInput, match=r"lacks 2 tensors outside the blocks, the first model.norm.weight"):
        Skeleton(Checkpoint(tmp_path), device=CPU)


def test_another_head_than_the_embedding_is_the_one_that_counts(tmp_path: Path) -> None:
    """transformers does not tie two tensors that are both on disk and differ; nor do we, and config.json says so."""
    build("llama", tmp_path)  # tied
    shard = tmp_path / "model.safetensors"
    tensors = load_file(shard)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, shard, {"format": "pt"})
    assert Checkpoint(tmp_path).config["tie_word_embeddings"] is True
    torch.manual_seed(0)
    head = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, shard, {"format": "pt"})
    skeleton = Skeleton(checkpoint := Checkpoint(tmp_path), device=CPU)
    assert checkpoint.config["tie_word_embeddings"] is False
    skeleton.open_shell()
    assert torch.equal(skeleton.model.lm_head.weight, head)
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, head)


@pytest.mark.parametrize("prefix", [*_WRAPPERS, "_orig_mod.", "_orig_mod.module."])
def test_what_training_tools_put_before_all_names_is_taken_off(prefix: str, tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    shard = tmp_path / "model.safetensors"
    tensors = load_file(shard)
    save_file({prefix + n: t for n, t in tensors.items()}, shard)
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.wrapper, set(checkpoint.names())) == (prefix, set(tensors))
    assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())
    Skeleton(checkpoint, device=CPU)


@pytest.mark.parametrize("part", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_what_training_tools_put_into_some_names_is_taken_off(part: str, tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    shard = tmp_path / "model.safetensors"
    tensors = load_file(shard)
    save_file({n.replace("layers.1.", f"layers.1.{part}"): t for n, t in tensors.items()}, shard)
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.wrapper, set(checkpoint.names())) == (part, set(tensors))
    assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())


def test_adapters_inside_the_weights_are_to_be_merged_first(tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    shard = tmp_path / "model.safetensors"
    save_file(load_file(shard) | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 2)}, shard)
    with pytest.raises(BadInput, match="LoRA weights that are not merged"):
        Checkpoint(tmp_path)


def test_no_random_numbers_are_drawn_for_what_has_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes torch longer than all else of making a model, by whichever library's function."""
    build("qwen3_moe", tmp_path)
    filled: list[bool] = []
    for name in ("_no_grad_normal_", "_no_grad_uniform_"):
        fill = getattr(torch.nn.init, name)
        monkeypatch.setattr(
            torch.nn.init, name, lambda x, *rest, fill=fill, **more: filled.append(x.is_meta) or fill(x, *rest, **more)
        )
    model = empty_model(transformers.AutoConfig.from_pretrained(tmp_path), torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert True not in filled
