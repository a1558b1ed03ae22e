"""What a GGUF file says of the model besides its numbers: origin, license, size, recommended sampling.

By the `gguf` package's own rules, as llama.cpp's converter writes it: the model card, generation_config.json, and what
the name says.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import yaml

from .writer import FileTensor, parameter_counts

_KINDS = {gguf.GGUFValueType.INT32: np.int32, gguf.GGUFValueType.UINT32: np.uint32}
# Ollama's parameters by llama.cpp's keys.
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
}


def general_metadata(
    folder: Path, config: Mapping[str, Any], name: str, tensors: Sequence[FileTensor]
) -> dict[str, Any]:
    """The `general.*` keys of a model called `name`, mostly `organization/model`, that lies in `folder`."""
    total, shared, experts, count = parameter_counts(tensors)
    found = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), _card(folder), dict(config) | {"_name_or_path": name}, None, total
    )
    found.name = found.name or name
    for key, ours in _SAMPLING_FIELDS.items():
        value = next((v for k in ours if (v := generation_config(folder).get(k)) is not None), None)
        setattr(found, key, value)
    found.size_label = found.size_label or gguf.size_label(total, shared, experts, count)
    writer = gguf.GGUFWriter(None, "")
    found.set_gguf_meta_model(writer)
    values = {key: _plain(value) for part in writer.kv_data for key, value in part.items()}
    return {key: value for key, value in values.items() if key not in ("general.architecture", "general.name")}


def sampling(metadata: Mapping[str, Any]) -> dict[str, float | int]:
    """The recommended sampling in a file's metadata, by Ollama's names."""
    keys = {f"general.sampling.{key}": name for key, name in SAMPLING.items()}
    return {name: metadata[key].item() if isinstance(metadata[key], np.generic) else metadata[key]
            for key, name in keys.items() if key in metadata}  # fmt: skip


_SAMPLING_FIELDS = {
    "sampling_top_k": ("top_k",),
    "sampling_top_p": ("top_p",),
    "sampling_min_p": ("min_p",),
    "sampling_temp": ("temperature",),
    "sampling_penalty_repeat": ("penalty_repeat", "repetition_penalty"),
}


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json; empty where there is none that can be read."""
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _card(folder: Path) -> dict[str, Any]:
    """The metadata of the model card, empty where there is none that can be read."""
    try:
        card = gguf.Metadata.load_model_card(folder)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(card)


def _plain(value: gguf.gguf_writer.GGUFValue) -> Any:
    kind = _KINDS.get(value.type)
    return value.value if kind is None else kind(value.value)
