"""Artifacts that load and are wrong: each function spoils a copy of a compressed-tensors folder or a GGUF file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
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


def _config(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "config.json") -> None:
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))


def rope_theta_wrong(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config.get("rope_parameters", config)["rope_theta"] = 1000.0
        config.pop("rope_theta", None)

    _config(folder, change)


def static_scales_wrong(folder: Path, linear: str = "mlp.down_proj") -> None:
    def change(held: dict[str, torch.Tensor], name: str) -> None:
        held[f"{name}.input_scale"] /= 16

    _tensors(folder, change, linear)


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
}  # fmt: skip
STATIC: dict[str, Callable[[Path], None]] = {"static scales wrong": static_scales_wrong}  # of static int8 inputs


def _gguf(file: Path, change: Callable[[Any], None]) -> None:
    """Change a GGUF file in place: every part of it keeps its length."""
    reader = gguf.GGUFReader(file, "r+")
    change(reader)
    reader.data.flush()


def _middle(reader: Any, kind: str) -> Any:
    """The tensor of that kind in the middle block, or of all its experts."""
    kinds = f"{kind}.weight", f"{kind}_exps.weight"
    found = sorted((t for t in reader.tensors if t.name.endswith(kinds)), key=lambda t: int(t.name.split(".")[1]))
    return found[len(found) // 2]


def gguf_columns_permuted(file: Path) -> None:
    """The blocks of each row in another order."""

    def change(reader: Any) -> None:
        tensor = _middle(reader, "attn_q")
        size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
        data = tensor.data.view(np.uint8).reshape(tensor.data.shape[0], -1, size)
        data[:] = data[:, ::-1].copy()

    _gguf(file, change)


_SCALES = {"Q4_K": slice(0, 4), "Q5_K": slice(0, 4), "Q6_K": slice(-2, None)}  # of a block; of the others: the first 2
_MINIMUM = {"Q4_K": slice(2, 4), "Q5_K": slice(2, 4), "Q4_1": slice(2, 4), "Q5_1": slice(2, 4)}


def _multiplied(tensor: Any, where: slice, by: float) -> None:
    """Multiply the float16 numbers that stand at `where` in each block of a tensor."""
    size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    data = tensor.data.view(np.uint8).reshape(-1, size)
    data[:, where] = (data[:, where].copy().view(np.float16) * np.float16(by)).view(np.uint8)


def gguf_scales_doubled(file: Path) -> None:
    def change(reader: Any) -> None:
        tensor = _middle(reader, "ffn_down")
        _multiplied(tensor, _SCALES.get(tensor.tensor_type.name, slice(0, 2)), 2)

    _gguf(file, change)


def gguf_zeros_off(file: Path) -> None:
    """The minima of one block's matrices higher by an eighth: about one step of four bits."""

    def change(reader: Any) -> None:
        number = _middle(reader, "ffn_down").name.split(".")[1]
        able = [t for t in reader.tensors if t.name.startswith(f"blk.{number}.") and t.tensor_type.name in _MINIMUM]
        assert able
        for tensor in able:
            _multiplied(tensor, _MINIMUM[tensor.tensor_type.name], 1.125)

    _gguf(file, change)


def gguf_scales_scrambled(file: Path) -> None:
    """Rows in another order, each with its scales."""

    def change(reader: Any) -> None:
        data = _middle(reader, "ffn_down").data
        rows = data.reshape(-1, data.shape[-1])
        rows[:] = np.random.default_rng(0).permutation(rows)

    _gguf(file, change)


def gguf_block_zeroed(file: Path) -> None:
    def change(reader: Any) -> None:
        number = _middle(reader, "ffn_down").name.split(".")[1]
        for tensor in reader.tensors:
            if tensor.name.startswith(f"blk.{number}.") and "norm" not in tensor.name:
                tensor.data.view(np.uint8)[:] = 0

    _gguf(file, change)


def gguf_rope_wrong(file: Path) -> None:
    def change(reader: Any) -> None:
        field = next(field for name, field in reader.fields.items() if name.endswith("rope.freq_base"))
        field.parts[field.data[0]][:] = 1000.0

    _gguf(file, change)


def gguf_tokenizer_permuted(file: Path) -> None:
    """Pairs of tokens of one length exchanged."""

    def change(reader: Any) -> None:
        field = reader.fields["tokenizer.ggml.tokens"]
        by_length: dict[int, list[Any]] = {}
        for part in (field.parts[i] for i in field.data[min(300, len(field.data) // 4) :]):
            by_length.setdefault(len(part), []).append(part)
        for parts in by_length.values():
            for one, other in zip(parts[::2], parts[1::2], strict=False):
                one[:], other[:] = other.copy(), one.copy()

    _gguf(file, change)


def gguf_merges_permuted(file: Path) -> None:
    """Merges of one length exchanged: another tokenizer of the same tokens."""

    def change(reader: Any) -> None:
        field = reader.fields["tokenizer.ggml.merges"]
        by_length: dict[int, list[Any]] = {}
        for part in (field.parts[i] for i in field.data):
            by_length.setdefault(len(part), []).append(part)
        for parts in by_length.values():
            for one, other in zip(parts, reversed(parts[len(parts) // 2 :]), strict=False):
                one[:], other[:] = other.copy(), one.copy()

    _gguf(file, change)


def gguf_template_removed(file: Path) -> None:
    """Its key, under another name."""

    def change(reader: Any) -> None:
        key = reader.fields["tokenizer.chat_template"].parts[1]
        key[:] = np.frombuffer(bytes(key)[:-1] + b"_", np.uint8)

    _gguf(file, change)


def gguf_bos(file: Path) -> None:
    """A BOS more than the original's tokenizer puts, or one less."""

    def change(reader: Any) -> None:
        field = reader.fields["tokenizer.ggml.add_bos_token"]
        field.parts[field.data[0]][:] = 1 - field.parts[field.data[0]]

    _gguf(file, change)


def gguf_template_edited(file: Path) -> None:
    def change(reader: Any) -> None:
        field = reader.fields["tokenizer.chat_template"]
        text = field.parts[field.data[0]]
        edited = bytes(text).replace(b"assistant", b"Assistant").replace(b"system", b"System")
        text[:] = np.frombuffer(edited, np.uint8)

    _gguf(file, change)


GGUFS: dict[str, Callable[[Path], None]] = {
    "columns permuted": gguf_columns_permuted, "scales scrambled": gguf_scales_scrambled,
    "scales doubled": gguf_scales_doubled, "zeros off by one": gguf_zeros_off, "a block zeroed": gguf_block_zeroed,
    "rope_theta": gguf_rope_wrong, "tokenizer permuted": gguf_tokenizer_permuted,
    "another tokenizer": gguf_merges_permuted, "template removed": gguf_template_removed,
    "template edited": gguf_template_edited, "BOS": gguf_bos,
}  # fmt: skip
