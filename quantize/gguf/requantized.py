"""A 16- or 32-bit GGUF file of any architecture, known or not, rounded to nearest without running the model."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from ..core.errors import BadInput
from ..formats import ggml_blocks as ggml
from ..methods import ROUNDERS
from ..numbers.types import BlockGrid
from ..recipe import Rtn
from ..recipe.gguf_file import FLOATS, NEED_IMATRIX
from . import imatrix
from . import llama_cpp_library as llama_cpp
from .converted import metadata_of
from .mixes import Choice, FileType, Traits, choose
from .reader import GgufTensors
from .writer import ARCHITECTURE, FileTensor, write

_ROWS = 4096  # rounded at a time
_PART = re.compile(r"-\d{5}-of-\d{5}$")


def requantize(
    source: Path,
    target: Path,
    file_type: str,
    importance: Path | None = None,
    split: int | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, all: None,
) -> list[Path]:
    """Write GGUF file `source` as `target`, its matrices of the types that llama.cpp's mix `file_type` gives them.

    importance: an importance matrix by llama-imatrix. Types that we have no grid for are left to llama.cpp's quantizer.
    Metadata and all other tensors stay as they are. split: most bytes of tensors in one file. Raises BadInput for a
    file that is quantized already, or a part of one, and for a matrix of another model.
    """
    tensors, metadata = GgufTensors([source]), metadata_of(source)
    if int(metadata.get("split.count", 1)) > 1 or _PART.search(source.stem):
        raise BadInput(f"{source}: a part of a GGUF file; merge the parts first (llama-gguf-split --merge)")
    packed = [n for n in tensors.names() if tensors.stored(n).tensor_type.name not in (*FLOATS, "F64", "I32")]
    if packed:
        kind = tensors.stored(packed[0]).tensor_type.name
        raise BadInput(f"{source}: {packed[0]} is {kind} already; give the 16- or 32-bit file it was made of")
    if importance is None and file_type in NEED_IMATRIX:
        raise BadInput(f"type {file_type} needs an importance matrix, as llama-imatrix makes it")
    means = {} if importance is None else _fitted(importance, tensors)
    if file_type not in get_args(FileType):
        asked = llama_cpp.QuantizeRequest(file_type, (), means or None)
        llama_cpp.quantize(source, target, asked, on_tensor)
        return [target]
    shapes = {name: tensors.shape(name) for name in tensors.names()}
    chosen = choose(cast(FileType, file_type), shapes, _traits(metadata), imatrix=bool(means))
    metadata |= {
        "general.file_type": int(LlamaFileType[f"MOSTLY_{file_type}"]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    out = [_tensor(tensors, name, chosen[name], means) for name in shapes]
    return write(target, metadata, out, split, lambda done: on_tensor(done, len(out)))


def _fitted(file: Path, tensors: GgufTensors) -> dict[str, imatrix.Array]:
    """Mean squares [experts, in] by tensor."""
    means = {name: found.mean for name, found in imatrix.load(file).items() if name in tensors}
    for name, mean in means.items():
        shape = tensors.shape(name)
        wanted = shape[-1] * (shape[0] if len(shape) == 3 else 1)
        if mean.size not in (shape[-1], wanted):
            raise BadInput(f"imatrix {file}: {name} has {mean.size} values and the model {wanted}: another model's")
    if not means:
        raise BadInput(f"imatrix {file}: none of its tensors is in the model")
    return means


def _traits(metadata: Mapping[str, Any]) -> Traits:
    name = str(metadata.get(ARCHITECTURE, ""))

    def first(key: str, default: int) -> int:
        value = metadata.get(f"{name}.{key}", default)
        return int(value[0] if isinstance(value, list) else value)

    heads = first("attention.head_count", 1)
    return Traits(
        architecture=name,
        blocks=first("block_count", 0),
        heads=heads,
        kv_heads=first("attention.head_count_kv", heads),
        experts=first("expert_count", 0),
    )


def _tensor(tensors: GgufTensors, name: str, choice: Choice | None, means: Mapping[str, imatrix.Array]) -> FileTensor:
    stored, shape = tensors.stored(name), tensors.shape(name)
    if choice is None or choice.type == "F16":
        return FileTensor(name, stored.tensor_type, shape, lambda: np.asarray(stored.data))
    kind, mean = choice.type, means.get(name)
    grid = BlockGrid(type=kind, scale_search="mse" if mean is None else "activation")

    def rounded() -> np.ndarray[Any, Any]:
        done = []
        for part in range(shape[0]) if len(shape) == 3 else (None,):
            weights = tensors.dequantized(name, part)
            columns = None if mean is None else torch.from_numpy(mean[(part or 0) % len(mean)])
            for w in torch.split(weights, _ROWS):
                done.append(ggml.pack(ROUNDERS["rtn"](w, grid, Rtn(), columns, None).linear))
        return torch.cat(done).numpy()

    return FileTensor(name, GGMLQuantizationType[kind], shape, rounded)
