"""What lies beside the weights of an artifact, against the original: config field by field, tokenizer and template."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantpress.artifact.manifest import own_manifest
from quantpress.calibrate.tokens import open_tokenizer
from quantpress.core.errors import BadInput
from quantpress.core.files import file_sha256
from quantpress.core.text import shortened
from quantpress.core.untrusted import read_json
from quantpress.formats.statement import without_quantization
from quantpress.models.architecture import model_config
from quantpress.models.companions import companions
from quantpress.models.config_forms import readable_by_all

# Fields that say who wrote a config, or that readers compute.
_NO_MATTER = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "_attn_implementation_autoset", "use_cache",
    "quantization_config", "_from_model_config",
}  # fmt: skip
_MAY_LACK = (".py",)  # code of the original's own, which is only fetched where it is asked for
_MAY_LACK_NAMES = ("LICENSE", "NOTICE")


def beside_problems(folder: Path, original: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each field of config.json and each companion that is not the original's.

    config: the original's, as what transforms make of it. A folder that another program wrote is compared by what its
    files mean, one of this package byte for byte.
    """
    stored = without_quantization(read_json(folder / "config.json"))
    if own_manifest(folder) is not None:
        yield from _fields("config.json", readable_by_all(stored), readable_by_all(config))
        yield from _companions(folder, original)
    else:
        yield from _fields("config.json", _meaning(stored), _meaning(config), _NO_MATTER)
        yield from _tokenizers(folder, original)
        name = "generation_config.json"
        if (folder / name).is_file() and (original / name).is_file():
            yield from _fields(name, read_json(folder / name), read_json(original / name), _NO_MATTER)


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with every default that transformers knows."""
    meant: dict[str, Any] = model_config(dict(config)).to_dict()
    return meant


def _fields(
    file: str, found: Mapping[str, Any], wanted: Mapping[str, Any], but: Collection[str] = (), above: str = ""
) -> Iterator[str]:
    """A line for each field that differs, by its path."""
    for key in sorted({*found, *wanted} - set(but)):
        one, other = found.get(key), wanted.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _fields(file, one, other, but, f"{above}{key}.")
        elif one != other:
            yield f"{file}: {above}{key} is {_said(found, key)}, and the original's is {_said(wanted, key)}"


def _said(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    return shortened(json.dumps(values[key], ensure_ascii=False, default=str), 80)


def _companions(folder: Path, original: Path) -> Iterator[str]:
    """Each file beside the original's weights is there with the same bytes; of JSON the field that differs is named."""
    for file in companions(original):
        name = file.relative_to(original).as_posix()
        mine = folder / name
        if not mine.is_file():
            if not name.endswith(_MAY_LACK) and not name.startswith(_MAY_LACK_NAMES):
                yield f"{folder}: {name}, which the original has, is absent"
        elif file_sha256(mine) != file_sha256(file):
            lines = [] if file.suffix != ".json" else list(_differences(mine, file))
            yield lines[0] if lines else f"{folder}: {name} is not the original's"


def _differences(mine: Path, file: Path) -> Iterator[str]:
    try:
        yield from _fields(mine.name, read_json(mine), read_json(file))
    except BadInput as error:
        yield str(error)


def _tokenizers(folder: Path, original: Path) -> Iterator[str]:
    """The two tokenizers have the same tokens under the same ids, special tokens and chat template."""
    try:
        mine, theirs = open_tokenizer(folder), open_tokenizer(original)
    except BadInput as error:
        yield str(error)
        return
    one, other = mine.get_vocab(), theirs.get_vocab()
    if one != other:
        odd = sorted(token for token in {*one, *other} if one.get(token) != other.get(token))
        yield (
            f"{folder}: the tokenizer gives {len(odd)} tokens other ids than the original's, the first {odd[0]!r}: "
            f"{one.get(odd[0])} and {other.get(odd[0])}"
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(mine, key, None) != getattr(theirs, key, None):
            yield (
                f"{folder}: the tokenizer's {key} is {getattr(mine, key, None)}, and the original's "
                f"{getattr(theirs, key, None)}"
            )
    if getattr(mine, "chat_template", None) != getattr(theirs, "chat_template", None):
        yield f"{folder}: the chat template is not the original's"
