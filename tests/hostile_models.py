"""Ways in which the files of a model may be wrong: each is done to a folder, which is then read or refused.

`tries(model)` is the table, by names; `random_try` makes more of them.
"""

import json
import os
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

Try = Callable[[Path], object]

CONFIG, TOKENIZER, SETTINGS, SHARD = "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"
INDEX, GENERATION = "model.safetensors.index.json", "generation_config.json"
_WEIGHT = "model.layers.0.mlp.up_proj.weight"
_VALUES: tuple[Any, ...] = (
    None, -1, 0, 1, 10**6, 10**30, 1.5, float("nan"), "x", "", [], [1], {}, {"a": 1}, True, False,
)  # fmt: skip
_NAMES = (
    CONFIG, GENERATION, SETTINGS, TOKENIZER, INDEX, SHARD, "chat_template.jinja", "chat_template.json",
    "special_tokens_map.json", "added_tokens.json", "adapter_config.json", "hf_quant_config.json",
    "quantize_config.json", "preprocessor_config.json", "LICENSE", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
_CONTENTS = {
    "nothing": b"", "a list": b"[]", "an empty object": b"{}", "null": b"null", "garbage": b"\x80\xff\x00abc",
    "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 50_000, "closed lists": b"[" * 20_000 + b"]" * 20_000,
    "a huge integer": b'{"a": ' + b"9" * 5000 + b"}", "a long string": b'"' + b"x" * 10**6 + b'"',
    "a byte order mark": b"\xef\xbb\xbf{}", "UTF-16": '{"a": 1}'.encode("utf-16"), "NaN": b'{"a": NaN}',
    "a surrogate": b'{"a": "\\ud800"}', "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}  # fmt: skip
_NOT_IN_CONFIG = (
    "sliding_window", "layer_types", "rope_theta", "rope_scaling", "partial_rotary_factor", "quantization_config",
    "text_config", "auto_map", "torch_dtype", "id2label", "num_labels", "is_decoder", "attn_implementation",
)  # fmt: skip
_OTHERS = (
    "gpt2", "mamba", "mixtral", "qwen2_moe", "bert", "whisper", "t5", "llava", "gemma3", "deepseek_v3", "gpt_oss",
    "falcon", "jamba", "phi3", "clip", "llama4", "dbrx", "mistral3", "qwen2_vl", "opt",
)  # fmt: skip
_OF_GENERATION = ("eos_token_id", "pad_token_id", "temperature", "top_k", "do_sample", "cache_implementation")
_OF_TOKENIZER = (
    "tokenizer_class", "model_max_length", "bos_token", "eos_token", "chat_template", "added_tokens_decoder",
    "extra_special_tokens", "auto_map", "add_bos_token", "padding_side", "model_input_names",
)  # fmt: skip
TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "loops": "{% for i in range(10**12) %}x{% endfor %}",
    "loops in a loop": "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
    "takes memory": "{{ 'x' * 10**11 }}",
    "makes a long text": "{{ 'x' * 10**8 }}",
    "nests": "{{" + "(" * 2000 + "1" + ")" * 2000 + "}}",
    "is not defined": "{{ a.b.c }}",
    "is no template": "{% if %}",
    "divides by zero": "{{ 1 / 0 }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "looks around": "{{ ''.__class__.__mro__ }}",
    "adds what cannot be": "{{ messages + 1 }}",
    "imports": "{% import 'x' as y %}",
    "makes a number": "{{ 9 ** (9 ** 9) }}",
}
QUICK = (  # of each kind a few, for the suite that runs at every change
    "config pad_token_id = 256", "config hidden_act = 'x'", "config num_hidden_layers = 1000000",
    "config num_hidden_layers = 0", "config hidden_size = -1", "config num_attention_heads = 3",
    "config head_dim = 2**31",
    "config rope_parameters = []", "config rope type []", "config rope type 'x'", "config num_labels = 1000000",
    "config dtype = 1", "config model_type = []", "config text_config = 'x'", "config quantization_config = 'x'",
    "tokenizer.json is a list", "tokenizer.json is garbage", "tokenizer.json is closed lists",
    "tokenizer_config.json is deep lists", "config.json is deep objects", "config.json is a huge integer",
    "model.safetensors.index.json is closed lists", "model.safetensors is a pipe", "config.json is a pipe",
    "model.safetensors.index.json is a device", "model.safetensors is a link to nothing", "LICENSE is a link out",
    "chat_template.jinja is a folder", "model.safetensors is a folder", "template raises", "template loops in a loop",
    "template adds what cannot be", "template = 1",
    "shard is float8 without scales", "shard shape = [1.5, 2.5]", "shard length 2**60", "shard name with a line break",
    "index shard = 'a\\x00b'", "generation eos_token_id = 'x'", "vocabulary with an id of 2**31",
)  # fmt: skip


def tries(model: Path) -> dict[str, Try]:
    """What may be done to a copy of `model`, a tiny llama with a tokenizer, by what it is."""
    made: dict[str, Try] = {}
    config = json.loads((model / CONFIG).read_text())
    for key in (*config, *_NOT_IN_CONFIG):
        made |= {f"config {key} = {value!r}": _json(CONFIG, key, value) for value in _VALUES}
        made[f"config without {key}"] = _without(CONFIG, key)
    for kind in ("linear", "dynamic", "yarn", "longrope", "llama3", "mrope", "x", 3, None, []):
        made[f"config rope type {kind!r}"] = _json(CONFIG, "rope_parameters", {"rope_type": kind})
        made[f"config rope_scaling type {kind!r}"] = _json(CONFIG, "rope_scaling", {"type": kind})
        for factor in (0, -1, "x", None, float("inf")):
            settings = {"rope_type": kind, "factor": factor, "rope_theta": factor}
            made[f"config rope type {kind!r}, factor {factor}"] = _json(CONFIG, "rope_parameters", settings)
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size"):
        made |= {f"config {key} = {value}": _json(CONFIG, key, value) for value in (3, 5, 63)}
        made |= {f"config {key} = 2**{power}": _json(CONFIG, key, 2**power) for power in (31, 63)}
    made |= {f"config pad_token_id = {n}": _json(CONFIG, "pad_token_id", n) for n in (256, -5)}
    for kind in _OTHERS:
        made[f"config of a {kind}"] = _json(CONFIG, "model_type", kind)
    for key in _OF_GENERATION:
        made |= {f"generation {key} = {value!r}": _json(GENERATION, key, value) for value in _VALUES}
    for key in _OF_TOKENIZER:
        values = (*_VALUES, "LlamaTokenizer", "Nope")
        made |= {f"tokenizer {key} = {value!r}": _json(SETTINGS, key, value) for value in values}
    made |= {f"template {kind}": _json(SETTINGS, "chat_template", text) for kind, text in TEMPLATES.items()}
    made |= {
        f"template file {kind}": _written("chat_template.jinja", text.encode()) for kind, text in TEMPLATES.items()
    }
    made["template = 1"] = _json(SETTINGS, "chat_template", 1)
    for key, value in json.loads((model / TOKENIZER).read_text()).items():
        made |= {f"vocabulary {key} = {new!r}": _json(TOKENIZER, key, new) for new in _VALUES}
        for inner in value if isinstance(value, dict) else ():
            made |= {f"vocabulary {key}.{inner} = {new!r}": _json(TOKENIZER, key, new, inner) for new in _VALUES}
    made["vocabulary with an id of 300"] = _added_token(300)
    made["vocabulary with an id of 2**31"] = _added_token(2**31)
    made["vocabulary with an id of 2**32 - 1"] = _added_token(2**32 - 1)
    for name in _NAMES:
        made |= {f"{name} is {kind}": _written(name, content) for kind, content in _CONTENTS.items()}
        made |= {f"{name} is {kind}": _replaced(name, make) for kind, make in _FOREIGN.items()}
    return made | _of_shards() | _of_index()


def random_try(seed: int) -> Try:
    """Something is changed, somewhere in the files of a folder, as `seed` chooses."""

    def change(folder: Path) -> None:
        chosen = random.Random(seed)
        for _ in range(chosen.randint(1, 3)):
            name = chosen.choice((CONFIG, CONFIG, CONFIG, GENERATION, SETTINGS, TOKENIZER, SHARD))
            if name == SHARD:
                _header(lambda header: _changed(header, chosen))(folder)
            elif chosen.random() < 0.2:
                content = bytearray((folder / name).read_bytes())
                for _ in range(chosen.randint(1, 4)):
                    content[chosen.randrange(len(content))] = chosen.randrange(256)
                (folder / name).write_bytes(content[: chosen.choice((len(content), chosen.randrange(len(content))))])
            else:
                try:
                    document = json.loads((folder / name).read_bytes())
                except ValueError:  # changed already
                    continue
                (folder / name).write_text(json.dumps(_changed(document, chosen)))

    return change


def _changed(document: Any, chosen: random.Random) -> Any:
    places = _places(document)
    if not places:
        return deepcopy(chosen.choice(_VALUES))
    inside, key = chosen.choice(places[:2000])
    if chosen.random() < 0.15:
        del inside[key]
    else:
        inside[key] = deepcopy(chosen.choice((*_VALUES, 3, 7, 64, 255, 2**31, 2**63, "rope", "silu", [64, 64])))
    return document


def _places(node: Any) -> list[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in items for place in ((node, key), *_places(child))]


def _json(name: str, key: str, value: Any, inner: str | None = None) -> Try:
    def change(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        place = document if inner is None else document[key]
        place[key if inner is None else inner] = value
        (folder / name).write_text(json.dumps(document))

    return change


def _without(name: str, key: str) -> Try:
    def change(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        document.pop(key, None)
        (folder / name).write_text(json.dumps(document))

    return change


def _added_token(number: int) -> Try:
    def change(folder: Path) -> None:
        document = json.loads((folder / TOKENIZER).read_text())
        document["model"]["vocab"]["zzz"] = number
        (folder / TOKENIZER).write_text(json.dumps(document))

    return change


def _written(name: str, content: bytes) -> Try:
    return lambda folder: (folder / name).write_bytes(content)


def _replaced(name: str, make: Callable[[Path], object]) -> Try:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def _link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


_FOREIGN: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a link to a pipe": _link_to_pipe,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link out": lambda path: path.symlink_to("/etc/hostname"),
    "a relative link out": lambda path: path.symlink_to("../../../../../../../../etc/hostname"),
}


def _header(change: Callable[[dict[str, Any]], object]) -> Try:
    """`change` is made to the header of the shard, the tensors staying where they are."""

    def changed(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return changed


def _of_shards() -> dict[str, Try]:
    made: dict[str, Try] = {}
    odd = ([-1, 5], [64, 96], ["a", "b"], [2**62, 2**62, 4], [1.5, 2.5], "F4", "F8_E4M3", "I32")
    for key in ("dtype", "shape", "data_offsets"):
        for value in (*_VALUES, *odd):
            made[f"shard {key} = {value!r}"] = _header(lambda h, key=key, value=value: h[_WEIGHT].update({key: value}))
    for value in _VALUES:
        made[f"shard tensor = {value!r}"] = _header(lambda h, value=value: h.update({_WEIGHT: value}))
        made[f"shard metadata = {value!r}"] = _header(lambda h, value=value: h.update(__metadata__=value))

    def halved(header: dict[str, Any]) -> None:
        for name, entry in header.items():
            if name != "__metadata__" and len(entry["shape"]) == 2:
                entry.update(dtype="F8_E4M3", shape=[entry["shape"][0], 2 * entry["shape"][1]])

    made["shard is float8 without scales"] = _header(halved)
    made["shard name with a line break"] = _header(lambda h: h.update({"\n[bold]../x\0(": h.pop(_WEIGHT)}))
    made["shard length 2**64 - 1"] = _written(SHARD, b"\xff" * 8 + b"{}")
    made["shard length 2**60"] = _written(SHARD, struct.pack("<Q", 2**60) + b"{}")
    return made


def _of_index() -> dict[str, Try]:
    def index(document: Any) -> Try:
        return _written(INDEX, json.dumps(document).encode())

    made = {f"index map = {value!r}": index({"weight_map": value}) for value in _VALUES}
    for shard in (*_VALUES, "../x", "/etc/passwd", "model.safetensors", "a\0b", "x" * 5000, ".", ".."):
        made[f"index shard = {str(shard)[:20]!r}"] = index({"weight_map": {_WEIGHT: shard}})
    return made
