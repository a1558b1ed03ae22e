"""Artifacts that load and are wrong: each function spoils a copy of a compressed-tensors folder; rubbish_gguf: GGUF."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from .quantize.originals import trained


def spoiled(source: Path, out: Path, how: Callable[[Path], None]) -> Path:
    """A copy of the folder or file `source` at `out`, spoiled."""
    if source.is_dir():
        shutil.copytree(source, out, copy_function=shutil.copyfile)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, out)
    how(out)
    return out


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor], str], None], linear: str) -> None:
    """Change the tensors of the linear of the middle block whose name ends in `linear`, or where that is in 16 bit, as
    experts are, all that are quantized."""
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        blocks = sorted({int(name.split(".")[2]) for name in held if name.startswith("model.layers.")})
        if blocks:
            scaled = [name.removesuffix(".weight_scale") for name in held if name.endswith(".weight_scale")]
            whole = f"model.layers.{blocks[len(blocks) // 2]}.{linear}"
            for name in [whole] if any(one.startswith(whole) for one in scaled) else scaled:
                change(held, name)
            save_file({name: tensor.contiguous() for name, tensor in held.items()}, file, metadata={"format": "pt"})


def scales_doubled(folder: Path, linear: str = "mlp.down_proj") -> None:
    def change(held: dict[str, torch.Tensor], name: str) -> None:
        held[f"{name}.weight_scale"] *= 2

    _tensors(folder, change, linear)


def scales_scrambled(folder: Path, linear: str = "mlp.down_proj") -> None:
    def change(held: dict[str, torch.Tensor], name: str) -> None:
        scale = held[f"{name}.weight_scale"]
        order = torch.randperm(scale.numel(), generator=torch.Generator().manual_seed(0))
        held[f"{name}.weight_scale"] = scale.flatten()[order].view(scale.shape)

    _tensors(folder, change, linear)


def zeros_off_by_one(folder: Path, linear: str = "mlp.down_proj") -> None:
    """Each of the eight 4-bit zero points of an int32, one higher."""

    def change(held: dict[str, torch.Tensor], name: str) -> None:
        packed = held[f"{name}.weight_zero_point"].to(torch.int64) & 0xFFFFFFFF
        codes = [((packed >> (4 * i)) + 1).clamp_max(0xFFFFFFFF) & 15 for i in range(8)]
        again = sum(code << (4 * i) for i, code in enumerate(codes))
        assert isinstance(again, torch.Tensor)
        held[f"{name}.weight_zero_point"] = again.to(torch.int64).add(2**31).remainder(2**32).sub(2**31).to(torch.int32)

    _tensors(folder, change, linear)


def columns_permuted(folder: Path, linear: str = "self_attn.q_proj") -> None:
    """The columns in another order, in whole int32s where they are packed."""

    def change(held: dict[str, torch.Tensor], name: str) -> None:
        kind = "weight_packed" if f"{name}.weight_packed" in held else "weight"
        held[f"{name}.{kind}"] = held[f"{name}.{kind}"].flip(1)

    _tensors(folder, change, linear)


def block_zeroed(folder: Path) -> None:
    def change(held: dict[str, torch.Tensor], name: str) -> None:
        for other, tensor in held.items():
            if other.startswith(name) and other.endswith("weight_scale"):
                tensor.zero_()

    _tensors(folder, change, "mlp")


def _middle_block(folder: Path, change: Callable[[dict[str, torch.Tensor], str, str], None]) -> None:
    """Change the tensors of the middle block, given its prefix and that of the block before it."""
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        blocks = sorted({int(name.split(".")[2]) for name in held if name.startswith("model.layers.")})
        if len(blocks) > 1:
            number = len(blocks) // 2
            change(held, f"model.layers.{blocks[number]}", f"model.layers.{blocks[number - 1]}")
            save_file({name: tensor.contiguous() for name, tensor in held.items()}, file, metadata={"format": "pt"})


def _exchanged(held: dict[str, torch.Tensor], one: str, other: str) -> None:
    """Exchange the tensors whose names begin with `one` and with `other`, part by part."""
    for name in [name for name in held if name.startswith(one)]:
        twin = other + name.removeprefix(one)
        held[name], held[twin] = held[twin], held[name]


def scales_of_another_block(folder: Path) -> None:
    def change(held: dict[str, torch.Tensor], block: str, before: str) -> None:
        kinds = [name.removeprefix(block) for name in held if name.startswith(block) and name.endswith("weight_scale")]
        for kind in kinds:
            if "mlp" in kind or not any("mlp" in one for one in kinds):
                _exchanged(held, block + kind, before + kind)

    _middle_block(folder, change)


def norm_scaled(folder: Path) -> None:
    def change(held: dict[str, torch.Tensor], block: str, before: str) -> None:
        held[f"{block}.post_attention_layernorm.weight"] *= 1.3

    _middle_block(folder, change)


def keys_and_values_exchanged(folder: Path) -> None:
    _middle_block(
        folder, lambda held, block, _: _exchanged(held, f"{block}.self_attn.k_proj", f"{block}.self_attn.v_proj")
    )


def token_zeroed(folder: Path) -> None:
    """The embedding of one common token."""
    token = PreTrainedTokenizerFast.from_pretrained(folder)("the sky of the world")["input_ids"][2]
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        if "model.embed_tokens.weight" in held:
            held["model.embed_tokens.weight"][token] = 0
            save_file(held, file, metadata={"format": "pt"})


def tokens_exchanged(folder: Path) -> None:
    """The embeddings of the vocabulary's second half, two by two."""
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in held:
                half = len(held[name]) // 4 * 2
                part = held[name][half : half + half // 2 * 2]
                held[name][half : half + half // 2 * 2] = part.view(-1, 2, part.shape[1]).flip(1).reshape(part.shape)
        save_file(held, file, metadata={"format": "pt"})


def norm_epsilon(folder: Path) -> None:
    _config(folder, lambda config: config.update(rms_norm_eps=0.1))


def end_token_wrong(folder: Path) -> None:
    """Another token ends an answer."""
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    other = len(words) // 2
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            _config(folder, lambda config: config.update(eos_token_id=other), name)
    word = words.convert_ids_to_tokens(other)
    _config(folder, lambda config: config.update(eos_token=word), "tokenizer_config.json")


def _config(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "config.json") -> None:
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))


def rope_theta_wrong(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config.get("rope_parameters", config)["rope_theta"] = 1000.0
        config.pop("rope_theta", None)

    _config(folder, change)


def static_scales_wrong(folder: Path) -> None:
    """Of one block; some of its linears keep dynamic scales."""

    def change(held: dict[str, torch.Tensor], name: str) -> None:
        scales = [tensor for other, tensor in held.items() if other.startswith(name) and other.endswith("input_scale")]
        assert scales
        for scale in scales:
            scale /= 16

    _tensors(folder, change, "")


def tokenizer_permuted(folder: Path) -> None:
    """The ordinary tokens' ids in another order."""

    def change(document: dict[str, Any]) -> None:
        vocab = document["model"]["vocab"]
        fixed = {token["content"] for token in document.get("added_tokens", ())}
        words = [word for word in vocab if word not in fixed]
        ids = [vocab[word] for word in words]
        vocab.update(zip(words, [*ids[7:], *ids[:7]], strict=True))

    _config(folder, change, "tokenizer.json")


def tokenizer_of_another(folder: Path) -> None:
    """A tokenizer that was trained on another text, under the original's template."""
    words = PreTrainedTokenizerFast(tokenizer_object=trained(), bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    words.chat_template = PreTrainedTokenizerFast.from_pretrained(folder).chat_template
    words.save_pretrained(folder)


def template_removed(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _config(folder, lambda config: config.pop("chat_template", None), "tokenizer_config.json")


def template_edited(folder: Path) -> None:
    """The user's turns under another name."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        file.write_text("{{ 'Chat. ' }}" + file.read_text())
    else:
        _config(
            folder, lambda c: c.update(chat_template="{{ 'Chat. ' }}" + c["chat_template"]), "tokenizer_config.json"
        )


def bos_twice(folder: Path) -> None:
    """The tokenizer's post-processor puts a second BOS, or the first where there was none."""

    def change(document: dict[str, Any]) -> None:
        added = {token["content"]: token["id"] for token in document["added_tokens"]}
        bos = next(iter(added))
        front = [{"SpecialToken": {"id": bos, "type_id": 0}}] * 2
        document["post_processor"] = {
            "type": "TemplateProcessing", "single": [*front, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*front, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [added[bos]], "tokens": [bos]}},
        }  # fmt: skip

    _config(folder, change, "tokenizer.json")


FOLDERS: dict[str, Callable[[Path], None]] = {
    "scales doubled": scales_doubled, "scales scrambled": scales_scrambled, "zeros off by one": zeros_off_by_one,
    "columns permuted": columns_permuted, "a block zeroed": block_zeroed, "rope_theta": rope_theta_wrong,
    "tokenizer permuted": tokenizer_permuted, "another tokenizer": tokenizer_of_another,
    "template removed": template_removed, "template edited": template_edited, "BOS twice": bos_twice,
    "scales of another block": scales_of_another_block, "a norm scaled": norm_scaled,
    "keys and values exchanged": keys_and_values_exchanged, "tokens exchanged": tokens_exchanged,
    "a token zeroed": token_zeroed, "norm epsilon": norm_epsilon, "another end token": end_token_wrong,
}  # fmt: skip
STATIC: dict[str, Callable[[Path], None]] = {"static scales wrong": static_scales_wrong}  # of static int8 inputs
