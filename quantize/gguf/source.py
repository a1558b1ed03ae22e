"""Converting a GGUF file to a Hugging Face folder of 16-bit weights, or of 32-bit ones where 16 do not hold them.

Tensor names come from the `gguf` package's map, looked up for every parameter of the transformers model that the file
describes. A tensor that is missing, left over or of another shape is an error.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import BadInput
from ..recipe.gguf_file import FLOATS
from .hyperparameters import form_of
from .reader import dequantized, open_gguf
from .source_config import Metadata, model_config
from .source_tokenizer import check_reads_back, save_tokenizer
from .tensor_map import EXPERT, Changes, from_gguf, names_of, places_of

SHARD_BYTES = 1_000_000_000
_VALUES = 1 << 22  # looked at together
_LEFT_OVER = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # derived from config.json


def write_checkpoint(source: Path, folder: Path) -> None:
    """Write the model in GGUF file `source` to the empty `folder` as a checkpoint with its tokenizer.

    Its type is bfloat16, or what a file of floats needs so that no matrix changes: float16 or float32.
    Raises BadInput for a file that is not a whole GGUF, an architecture, tensor type or tokenizer without support,
    and tensors that do not fit the model.
    """
    with _understood(source):
        meta = _read(source)
        config = model_config(meta, float_type(meta))
    plan = _plan(meta, config)
    with _understood(source):
        tokenizer = save_tokenizer(meta, source, folder, model_max_length=int(meta.hparam("context_length")))
        _save_config(meta, config, folder)
        check_reads_back(tokenizer, source, folder)
    _save_weights(meta, config, plan, folder)


@contextmanager
def _understood(source: Path) -> Iterator[None]:
    """Metadata may be of any type and value, and transformers and tokenizers refuse them each in a way of its own."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # tokenizers raises plain Exceptions
        said = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{source}: its metadata describe no model or tokenizer: {type(error).__name__}: {said}"
        ) from error


def _read(source: Path) -> Metadata:
    meta = Metadata(open_gguf(source), source)
    if meta.get("split.count", 1) > 1:
        raise BadInput(f"{source}: one part of a GGUF split in {meta['split.count']}; merge the parts first")
    return meta


def float_type(meta: Metadata) -> torch.dtype:
    """The type of the checkpoint: bfloat16 where it holds every matrix exactly, or where one is quantized."""
    matrices = [tensor for tensor in meta.tensors.values() if len(tensor.shape) > 1]
    kinds = {tensor.tensor_type.name for tensor in matrices}
    if not kinds <= set(FLOATS) or all(map(_fits_bfloat16, matrices)):
        return torch.bfloat16
    return torch.float16 if kinds <= {"F16"} else torch.float32


def _fits_bfloat16(tensor: Any) -> bool:
    """Whether the lower 16 bits of every value are zero in float32."""
    if tensor.tensor_type.name == "BF16":
        return True
    values = tensor.data.reshape(-1)
    parts = (values[start : start + _VALUES].astype(np.float32) for start in range(0, len(values), _VALUES))
    return not any((part.view(np.uint32) & 0xFFFF).any() for part in parts)


Place = tuple[str, int | None, Changes]  # a tensor of the file, the expert whose slice of it is meant, its changes


def _plan(meta: Metadata, config: Any) -> dict[str, Place]:
    """The place in the file of each parameter of the checkpoint, by its on-disk name."""
    from ..models.architecture import check_block_count, empty_model
    from ..models.names import saved_shapes

    check_block_count(config, len(meta.tensors))
    model = empty_model(config, config.dtype)
    config.architectures = [type(model).__name__]
    form = form_of(config)
    names = names_of(form, int(config.num_hidden_layers))
    plan: dict[str, Place] = {}
    for parameter, want in saved_shapes(model).items():
        if config.tie_word_embeddings and parameter in ("lm_head.weight", "embed_out.weight"):
            continue
        tensor, changes = next(iter(places_of(form, names, parameter)), ("", ()))
        if tensor not in meta.tensors:
            raise BadInput(f"{meta.path}: the GGUF file has no tensor for {parameter} ({tensor or 'no known name'})")
        expert = EXPERT.search(parameter)
        shape = meta.shape(tensor)[1:] if expert else meta.shape(tensor)
        if tuple(from_gguf(changes, [torch.empty(shape, device="meta")], config).shape) != want:
            raise BadInput(f"{meta.path}: tensor {tensor} has shape {list(shape)}, {parameter} needs {list(want)}")
        plan[parameter] = tensor, int(expert[1]) if expert else None, changes
    spare = set(meta.tensors) - {tensor for tensor, _, _ in plan.values()} - set(_LEFT_OVER)
    spare -= {"output.weight"} if config.tie_word_embeddings else set()
    if spare:
        few = ", ".join(sorted(spare)[:3])
        raise BadInput(f"{meta.path}: tensors that a {meta.architecture} model does not have: {few}")
    return plan


def _save_config(meta: Metadata, config: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(int(end) for end in ends if end is not None))
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)


def _save_weights(meta: Metadata, config: Any, plan: dict[str, Place], folder: Path) -> None:
    """Write shards of about SHARD_BYTES. Tensors are dequantized one at a time: the peak is a shard and a tensor."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for parameter, (tensor, expert, _) in plan.items():
        n_bytes = config.dtype.itemsize * math.prod(meta.shape(tensor)[0 if expert is None else 1 :])
        if shards[-1] and size + n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size, total = size + n_bytes, total + n_bytes
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {parameter: _weight(meta, config, plan[parameter]) for parameter in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _weight(meta: Metadata, config: Any, place: Place) -> Tensor:
    """A parameter in the checkpoint's type and transformers' layout."""
    tensor, expert, changes = place
    weight = dequantized(meta.tensors[tensor], expert, meta.path)
    return from_gguf(changes, [weight], config).to(config.dtype).contiguous()
