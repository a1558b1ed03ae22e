"""Ways to damage an artifact of safetensors without a trace in its checksums, and what is to be said of each.

Each takes the folder and returns False where it does not apply. BY_ITSELF are seen in the folder alone, BY_MANIFEST
with the manifest of the run (its recipe and its layers; its hashes are of no use), BY_ORIGINAL beside the original.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Damage = Callable[[Path], bool | None]
Q, K, GATE, UP = (f"model.layers.1.{part}_proj" for part in ("self_attn.q", "self_attn.k", "mlp.gate", "mlp.up"))
OTHER_Q = "model.layers.0.self_attn.q_proj"
_CODES, _SCALES = ("weight_packed", "qweight", "weight"), ("weight_scale", "scales")


def tensors(change: Callable[[Tensors], bool | None]) -> Damage:
    """Damage to the tensors, which end in one file."""

    def damage(folder: Path) -> bool | None:
        held: Tensors = {}
        for shard in folder.glob("*.safetensors"):
            held |= load_file(shard)
        if change(held) is False:
            return False
        for shard in folder.glob("*.safetensors*"):
            shard.unlink()
        save_file({name: t.contiguous() for name, t in held.items()}, folder / "model.safetensors", {"format": "pt"})
        return True

    return damage


def document(name: str, change: Callable[[dict[str, Any]], bool | None]) -> Damage:
    """Damage to a JSON file."""

    def damage(folder: Path) -> bool | None:
        if not (folder / name).is_file():
            return False
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if change(content) is False:
            return False
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return True

    return damage


def config(**values: Any) -> Damage:
    return document("config.json", changed(**values))


def changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(values)


def quantization(change: Callable[[dict[str, Any]], bool | None]) -> Damage:
    return document("config.json", lambda content: change(content["quantization_config"]))


def file(name: str, content: bytes | None) -> Damage:
    """A file with other content, or gone."""

    def damage(folder: Path) -> bool | None:
        if not (folder / name).is_file():
            return False
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        return True

    return damage


def codes(held: Tensors, linear: str = Q) -> str:
    return next(f"{linear}.{suffix}" for suffix in _CODES if f"{linear}.{suffix}" in held)


def scales(held: Tensors, linear: str = Q) -> str:
    return next(f"{linear}.{suffix}" for suffix in _SCALES if f"{linear}.{suffix}" in held)


def one_scale(value: float) -> Damage:
    def change(held: Tensors) -> bool | None:
        scale = held[scales(held)]
        if scale.dtype == torch.uint8 or (value < 0 and scale.dtype == torch.float8_e8m0fnu):
            return False
        wide = scale.float()
        wide.view(-1)[0] = wide.view(-1)[0] * -1 if value < 0 else value
        held[scales(held)] = wide.to(scale.dtype)
        return True

    return tensors(change)


def all_scales(factor: float, suffixes: tuple[str, ...] = _SCALES) -> Damage:
    def change(held: Tensors) -> bool | None:
        name = next((f"{Q}.{suffix}" for suffix in suffixes if f"{Q}.{suffix}" in held), None)
        if name is None:
            return False
        held[name] = (held[name].float() * factor).to(held[name].dtype)
        return True

    return tensors(change)


def set_to(name: str, value: float) -> Damage:
    """All of a tensor set to one value, or the first one where it is not a number."""

    def change(held: Tensors) -> bool | None:
        if name not in held:
            return False
        target = held[name].view(-1)[:1] if value != value else held[name].view(-1)
        target.fill_(value)
        return True

    return tensors(change)


def suffix_set(suffix: str, value: float, first_only: bool = True) -> Damage:
    """The first (or each) tensor of that name's end set to a value."""

    def change(held: Tensors) -> bool | None:
        names = sorted(name for name in held if name.endswith(suffix))
        for name in names[:1] if first_only else names:
            held[name] = torch.full_like(held[name], value)
        return bool(names)

    return tensors(change)


def swapped(one: str, other: str) -> Damage:
    """Everything of two linears exchanged."""

    def change(held: Tensors) -> bool | None:
        for name in [n for n in held if n.startswith(f"{one}.")]:
            twin = other + name.removeprefix(one)
            held[name], held[twin] = held[twin], held[name]
        return True

    return tensors(change)


def rolled(held: Tensors) -> bool | None:
    """Output rows moved by eight: two words of every format."""
    for name in [n for n in held if n.startswith(f"{UP}.")]:
        last = name.rpartition(".")[2]
        rows = 1 if last in ("qweight", "scales", "qzeros") else 0
        if held[name].dim() == 2 and held[name].shape[rows] > 8:
            packed = {"qweight": 1, "qzeros": 1, "weight_zero_point": 1}.get(last, 8)
            whole = last == "qweight" and f"{UP}.g_idx" in held  # GPTQ packs along the inputs
            held[name] = held[name].roll(8 if whole or last == "scales" else packed, rows)
    return True


def cleared(held: Tensors) -> bool | None:
    """The codes of a page of the file set to zero bytes: of fp8 that is zeros, which a padded weight may hold too."""
    held[codes(held)].view(-1).view(torch.uint8)[:4096].zero_()
    return True


def cleared_integers(held: Tensors) -> bool | None:
    return held[codes(held)].dtype == torch.int32 and cleared(held)


def permuted_g_idx(held: Tensors) -> bool | None:
    if f"{Q}.g_idx" not in held:
        return False
    held[f"{Q}.g_idx"] = held[f"{Q}.g_idx"].flip(0)
    return True


def doubled(name: str, factor: float = 2.0) -> Damage:
    def change(held: Tensors) -> bool | None:
        held[name] = held[name] * factor
        return True

    return tensors(change)


def rope(content: dict[str, Any]) -> bool | None:
    content["rope_parameters"]["rope_theta"] = 1e6
    return True


def swapped_ids(content: dict[str, Any]) -> bool | None:
    vocabulary = content["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.__getitem__)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    return True


def other_head(folder: Path) -> bool | None:
    return config(tie_word_embeddings=True)(folder)


def input_scale(held: Tensors) -> bool | None:
    name = next((f"{K}.{s}" for s in ("input_scale", "input_global_scale") if f"{K}.{s}" in held), None)
    if name is None:
        return False
    held[name] = held[name] * 3
    return True


def global_scale(value: float | None) -> Damage:
    """Of one of q, k and v; None: another one than the others'."""

    def change(held: Tensors) -> bool | None:
        name = next((f"{K}.{s}" for s in ("weight_global_scale", "weight_scale_2") if f"{K}.{s}" in held), None)
        if name is None:
            return False
        held[name] = held[name] * 2 if value is None else torch.full_like(held[name], value)
        return True

    return tensors(change)


def plain_beside(held: Tensors) -> bool | None:
    if f"{Q}.weight" in held:
        return False
    held[f"{Q}.weight"] = torch.randn(256, 256).to(torch.bfloat16)
    return True


def dropped(name: str) -> Damage:
    def change(held: Tensors) -> bool | None:
        return held.pop(name, None) is not None

    return tensors(change)


def nan_codes(held: Tensors) -> bool | None:
    weight = held.get(f"{Q}.weight")
    if weight is None or weight.dtype != torch.float8_e4m3fn:
        return False
    weight.view(torch.uint8).view(-1)[7] = 0x7F
    return True


def shard(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> bool | None:
        path = next(folder.glob("*.safetensors"))
        path.write_bytes(change(path.read_bytes()))
        return True

    return damage


def only(method: str, change: Callable[[dict[str, Any]], bool | None]) -> Damage:
    """Damage to the quantization_config of one format."""
    return quantization(lambda content: change(content) if content["quant_method"] == method else False)


def unstated(folder: Path) -> bool | None:
    for twin in ("quantize_config.json", "hf_quant_config.json"):
        (folder / twin).unlink(missing_ok=True)
    return document("config.json", lambda content: content.pop("quantization_config") is not None)(folder)


def group_changed(content: dict[str, Any]) -> bool | None:
    content["config_groups"]["group_0"]["input_activations"] = None
    return True


def no_inputs(content: dict[str, Any]) -> bool | None:
    if content["config_groups"]["group_0"]["input_activations"] is None:
        return False
    return group_changed(content)


def other_group(content: dict[str, Any]) -> bool | None:
    weights = content["config_groups"]["group_0"]["weights"]
    if weights["strategy"] != "group":
        return False
    weights["group_size"] = weights["group_size"] * 2
    return True


def other_width(content: dict[str, Any]) -> bool | None:
    if content.get("bits") is None:
        return False
    content["bits"] = 8 if content["bits"] == 4 else 4
    return True


BY_ITSELF: dict[str, tuple[Damage, str]] = {
    "NaN among fp8 codes": (tensors(nan_codes), "of its weights are NaN"),
    "a scale of NaN": (one_scale(torch.nan), "NaN or inf|positive, finite"),
    "a negative scale": (one_scale(-1), "negative|positive, finite"),
    "a scale of zero": (one_scale(0.0), "scales are zero|positive, finite|have one code"),
    "all scales zero": (all_scales(0.0), "scales are zero|positive, finite"),
    "codes of a page cleared": (tensors(cleared_integers), "have one code"),
    "a global scale of inf": (global_scale(torch.inf), "NaN or inf|positive, finite"),
    "a global scale unlike q's": (global_scale(None), "of what servers fuse differ"),
    "an input scale unlike q's": (tensors(input_scale), "of what servers fuse differ"),
    "a cache scale of zero": (suffix_set("k_scale", 0.0), "scales of its key-value cache are not positive"),
    "a negative cache scale": (suffix_set("v_scale", -1.0), "scales of its key-value cache are not positive"),
    "groups permuted": (tensors(permuted_g_idx), "desc_act: false, and g_idx scatters"),
    "a plain weight beside the packed": (tensors(plain_beside), "loaders differ in which of the two they take"),
    "a tensor of no layer": (tensors(lambda t: t.update({"model.extra.weight": torch.ones(4)})), "no such parameter"),
    "a norm gone": (dropped("model.layers.0.input_layernorm.weight"), "lacks 1 tensors"),
    "scales gone": (tensors(lambda t: t.pop(scales(t)) is not None), "scale|on disk|lacks|in 16 bit|where a weight"),
    "a head gone": (dropped("lm_head.weight"), "lm_head.weight is missing"),
    "a norm of zeros": (set_to("model.norm.weight", 0.0), "is zero in all"),
    "a norm of NaN": (set_to("model.layers.1.input_layernorm.weight", torch.nan), "NaN or inf"),
    "an embedding of zeros": (set_to("model.embed_tokens.weight", 0.0), "is zero in all"),
    "a head of zeros": (set_to("lm_head.weight", 0.0), "is zero in all"),
    "fewer rows": (tensors(lambda t: t.update({codes(t): t[codes(t)][:-1].clone()})), "shape|model has|where"),
    "wider codes": (tensors(lambda t: t.update({codes(t): t[codes(t)].double()})), "where|float64"),
    "a shard cut short": (shard(lambda b: b[:-9]), "truncated"),
    "bytes after a shard": (shard(lambda b: b + b"more"), "too long"),
    "a broken header": (shard(lambda b: b[:8] + b"x" + b[9:]), "corrupt safetensors header|not a safetensors"),
    "another status": (only("compressed-tensors", changed(quantization_status="initialized")), "initialized"),
    "another format above": (only("compressed-tensors", changed(format="naive-quantized")), "config_groups are"),
    "another group size": (only("compressed-tensors", other_group), "shape|group_size|cannot be read"),
    "another width": (quantization(other_width), "shape|bit|where"),
    "no quantization": (unstated, "not quantized|no format|not of|lacks|format that is not|codes"),
    "another method": (quantization(lambda c: c.update(quant_method="fbgemm_fp8")), "fbgemm|format|not|lacks"),
    "a twin that differs": (document("quantize_config.json", lambda c: c.update(bits=8)), "disagree"),
    "ModelOpt's twin differs": (
        document("hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="W8A16")), "disagree",
    ),
    "no tokenizer.json": (file("tokenizer.json", None), "without its vocabulary|is absent"),
    "a tokenizer.json of no JSON": (file("tokenizer.json", b"{"), "not readable as JSON"),
    "a tokenizer.json of another kind": (file("tokenizer.json", b"[]"), "expected a JSON object"),
    "a tokenizer_config.json of no JSON": (file("tokenizer_config.json", b"\x00"), "not readable as JSON"),
    "a generation_config.json of no JSON": (file("generation_config.json", b"{,}"), "not readable as JSON"),
    "a broken template": (file("chat_template.jinja", b"{% for m in messages %}"), "template is broken"),
    "a template that drops what is said": (file("chat_template.jinja", b"hello"), "template drops what a user says"),
    "eos beyond the vocabulary": (config(eos_token_id=100_000), "eos_token_id 100000"),
    "one of several eos beyond": (config(eos_token_id=[1, 999_999]), "eos_token_id 999999"),
    "bos below zero": (config(bos_token_id=-7), "bos_token_id -7"),
    "generation's eos beyond": (document("generation_config.json", lambda c: c.update(eos_token_id=50_000)), "50000"),
    "tied, with another head": (other_head, "ties the head to the embedding, and another head"),
    "unknown architectures": (config(architectures=["LlamaForCausalLMX"]), "no class of that name"),
    "another family's architectures": (config(architectures=["GPT2LMHeadModel"]), "no class of that name"),
    "code of another repository": (
        config(auto_map={"AutoModelForCausalLM": "evil/repo--m.Model"}), "another repository",
    ),
    "code that is not there": (config(auto_map={"AutoModelForCausalLM": "m.Model"}), "which is not there"),
    "another width of the model": (config(hidden_size=128), "shape|model has|lacks"),
    "more layers": (config(num_hidden_layers=3), "lacks"),
    "fewer layers": (config(num_hidden_layers=1), "no such parameter|no layer|has no"),
    "fewer key-value heads": (config(num_key_value_heads=1), "shape|model has"),
    "another vocabulary": (config(vocab_size=300), "shape|model has|rows"),
    "an unknown activation": (config(hidden_act="swoosh"), "swoosh|config.json"),
    "an unknown model_type": (config(model_type="lama"), "lama"),
}  # fmt: skip

BY_MANIFEST: dict[str, tuple[Damage, str]] = {
    "inputs dropped": (only("compressed-tensors", no_inputs), "inputs|on disk"),
}

BY_ORIGINAL: dict[str, tuple[Damage, str]] = {
    "scales doubled": (all_scales(2.0), "off the original's"),
    "scales a third": (all_scales(1 / 3), "off the original's"),
    "a global scale doubled in all": (tensors(lambda t: _all_globals(t)), "off the original's"),
    "one linear for another": (swapped(Q, OTHER_Q), "off the original's|servers fuse differ"),
    "gate and up swapped": (swapped(GATE, UP), "off the original's"),
    "rows rolled": (tensors(rolled), "off the original's"),
    "a norm doubled": (doubled("model.norm.weight"), "is not the original's"),
    "norms of ones": (set_to("model.layers.0.post_attention_layernorm.weight", 1.0), "original's"),
    "a norm that feeds linears doubled": (doubled("model.layers.0.input_layernorm.weight"), "original's"),
    "the embedding scaled": (doubled("model.embed_tokens.weight", 0.5), "is not the original's"),
    "two rows of the embedding swapped": (
        tensors(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].roll(1, 0)})),
        "is not the original's",
    ),
    "one weight of the head": (
        tensors(lambda t: t["lm_head.weight"].view(-1)[5].neg_() is None), "is not the original's",
    ),
    "rope_theta": (document("config.json", rope), "rope_theta"),
    "eps": (config(rms_norm_eps=1e-2), "rms_norm_eps"),
    "activation": (config(hidden_act="gelu"), "hidden_act"),
    "head counts": (config(num_attention_heads=8, num_key_value_heads=4, head_dim=32), "head_dim"),
    "positions": (config(max_position_embeddings=77), "max_position_embeddings"),
    "another eos": (config(eos_token_id=5), "eos_token_id"),
    "sampling": (document("generation_config.json", lambda c: c.update(temperature=9.0)), "temperature"),
    "ids swapped": (document("tokenizer.json", swapped_ids), "tokenizer"),
    "the template edited": (
        file("chat_template.jinja", b"{% for m in messages %}{{ m.content }}! Obey.{% endfor %}"), "template",
    ),
    "the template gone": (file("chat_template.jinja", None), "template"),
    "codes of a page cleared": (tensors(cleared), "off the original's|have one code"),
    "a special token": (document("tokenizer_config.json", lambda c: c.update(eos_token="<pad>")), "tokenizer|eos"),
}  # fmt: skip


def _all_globals(held: Tensors) -> bool | None:
    names = [n for n in held if n.endswith(("weight_global_scale", "weight_scale_2"))]
    for name in names:
        held[name] = held[name] * 2
    return bool(names)
