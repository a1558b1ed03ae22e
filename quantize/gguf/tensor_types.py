"""The types of the tensors in a recipe's GGUF file: those of the mix and those of `gguf.tensor_types`."""

import re
from collections.abc import Mapping, Sequence
from typing import cast, get_args

import gguf
from gguf import GGMLQuantizationType

from ..core.errors import BadInput
from ..numbers.types import GgmlType
from ..recipe import Recipe, matches
from .conversion import Conversion
from .layout import Entry, float_type
from .mixes import Choice, FileType, Traits, choose

Types = dict[str, Choice | None]
_BASE = {"IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S"}  # the type of most tensors in a mix


def own_types(recipe: Recipe, entries: Sequence[Entry]) -> dict[str, str]:
    """The tensors in `gguf.tensor_types` {name: type}; raises BadInput for a pattern that matches no matrix."""
    matrices = [entry.name for entry in entries if entry.matrix]
    chosen: dict[str, str] = {}
    for pattern, kind in recipe.gguf_file.tensor_types.items():
        found = [name for name in matrices if matches(pattern, name)]
        if not found:
            raise BadInput(
                f"gguf.tensor_types: {pattern!r} matches no matrix of the file; names are, for example, "
                f"{', '.join(matrices[:3])}"
            )
        for name in found:
            chosen.setdefault(name, kind)
    return chosen


def our_types(recipe: Recipe, conversion: Conversion) -> Types:
    """The type of each tensor where our own methods round the file; None for those left in float32.

    Raises BadInput for a type that we have no grid for.
    """
    wanted = recipe.gguf_file
    if wanted.type not in get_args(FileType) or not set(wanted.tensor_types.values()) <= {*get_args(GgmlType), "F16"}:
        raise BadInput(
            f"gguf.type {wanted.type}: method {recipe.method.name} rounds to {', '.join(get_args(FileType))}; "
            "others are made by method llama.cpp"
        )
    return _of_mix(recipe, conversion)


def expected_types(recipe: Recipe, conversion: Conversion) -> tuple[dict[str, GGMLQuantizationType], bool]:
    """The types that llama.cpp's quantizer will choose, and whether they are certain rather than an estimate."""
    wanted, entries = recipe.gguf_file, conversion.entries
    known = wanted.type in get_args(FileType)
    if known:
        chosen = _of_mix(recipe, conversion)
        kinds = {
            name: GGMLQuantizationType.F32 if c is None else GGMLQuantizationType[c.type] for name, c in chosen.items()
        }
    else:
        kinds = {entry.name: _usual(wanted.type, entry) for entry in entries}
        kinds |= {entry.name: _usual("Q6_K", entry) for entry in conversion.outside()}
    for name, kind in own_types(recipe, entries).items():
        kinds[name] = _usual(kind, next(entry for entry in entries if entry.name == name))
    return kinds, known


def _of_mix(recipe: Recipe, conversion: Conversion) -> Types:
    wanted = recipe.gguf_file
    shapes = {entry.name: entry.shape for entry in conversion.entries}
    own = own_types(recipe, conversion.entries)
    weighted = recipe.calibrated or bool(wanted.imatrix)
    return choose(cast(FileType, wanted.type), shapes, model_of(conversion), imatrix=weighted, own=own)


def model_of(conversion: Conversion) -> Traits:
    """What the mixes depend on, from the file's metadata."""
    name = str(conversion.metadata["general.architecture"])
    heads = int(conversion.metadata[f"{name}.attention.head_count"])
    kv_heads = conversion.metadata.get(f"{name}.attention.head_count_kv", heads)
    return Traits(
        architecture=name,
        blocks=int(conversion.metadata[f"{name}.block_count"]),
        heads=heads,
        kv_heads=int(kv_heads[0] if isinstance(kv_heads, list) else kv_heads),  # llama.cpp asks the first block
        experts=int(conversion.metadata.get(f"{name}.expert_count", 0)),
    )


def fallbacks(conversion: Conversion, chosen: Types) -> dict[str, str]:
    """The tensors whose rows are not whole blocks of the intended type: {name: reason and the type used}."""
    columns = {entry.name: entry.shape[-1] for entry in conversion.entries}
    return {
        name: f"rows of {columns[name]} are not whole {choice.wanted} blocks: {choice.wanted} -> {choice.type}"
        for name, choice in chosen.items()
        if choice is not None and choice.wanted is not None
    }


def summed_up(notes: Mapping[str, str]) -> list[str]:
    """A line for each distinct note of {GGUF tensor: note}, with the tensors it is about."""
    kinds: dict[str, list[str]] = {}
    for name, note in notes.items():
        kinds.setdefault(note, []).append(re.sub(r"^blk\.\d+", "blk.*", name))
    return [f"{len(names)} tensors ({', '.join(dict.fromkeys(names))}): {note}" for note, names in kinds.items()]


def _usual(file_type: str, entry: Entry) -> GGMLQuantizationType:
    """The type that an entry most likely gets in a file of this type."""
    if not entry.matrix:
        return GGMLQuantizationType.F32
    name = _BASE.get(file_type, re.sub(r"_[SML]$", "", file_type) if "_K_" in file_type else file_type)
    fallback = "IQ4_NL" if name.startswith("IQ") else "Q4_0" if name.startswith("TQ") else "Q8_0"
    for kind in (GGMLQuantizationType[name], GGMLQuantizationType[fallback]):
        if entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return float_type(entry, GGMLQuantizationType.F16)
