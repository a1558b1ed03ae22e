"""A model about to become a GGUF file: its metadata, its tensors, and each of them as floats."""

import re
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from ..core.errors import BadInput
from ..models.checkpoint import Checkpoint
from ..models.model_tensors import TensorReader
from ..models.skeleton import Skeleton
from .converted import matched, metadata_of
from .general import general_metadata
from .hyperparameters import form_of, hyperparameters, notes, rope_tensors
from .layout import Entry, float_type, layout
from .reader import GgufTensors
from .tokenizer import tokenizer_metadata
from .writer import ARCHITECTURE, FileTensor

FloatType = Literal["F32", "F16", "BF16"]
_FILE_TYPES = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16}
_FILE_TYPES |= {"BF16": gguf.LlamaFileType.MOSTLY_BF16}


class Conversion:
    """What the GGUF file of a model says and holds, known before any weight is read.

    reader: the model's tensors by their on-disk HF names. folder: where its tokenizer is. name: the model's, such as
    `organization/model`, by default the folder's name. converted: the file that llama.cpp's converter made of the
    model, whose metadata and tensors then count instead of our own table of families. lost: parameters that are not
    found in it. tokenizer: without, only the tensors are known. skeleton: of `reader`, where it is open already.
    entries: the file's tensors and what each is made of. notes: what the file cannot hold. Raises BadInput for a model
    or a tokenizer that cannot be written, and for tensors of a checkpoint that have no place in the file.
    """

    def __init__(
        self,
        reader: TensorReader,
        folder: Path,
        name: str | None = None,
        converted: Path | None = None,
        *,
        tokenizer: bool = True,
        skeleton: Skeleton | None = None,
    ) -> None:
        self.reader = reader
        self.skeleton = skeleton or Skeleton(reader, device=torch.device("cpu"))
        self.config: Any = self.skeleton.config
        self.converted = None if converted is None else GgufTensors([converted])
        self.notes: tuple[str, ...] = ()
        self.lost: list[str] = []
        if converted is None:
            self._by_our_rows(reader, folder, name, tokenizer)
            return
        assert self.converted is not None
        said = metadata_of(converted)
        self.metadata: dict[str, Any] = {key: said[key] for key in said if key != "general.file_type"}
        self.entries = matched(self.converted, self.skeleton)
        held = {name for entry in self.entries for name in entry.parameters}
        self.lost = [name for name in self.skeleton.parameters_on_disk() if name not in held]
        unknown = [entry.name for entry in self.entries if entry.matrix and not entry.parameters]
        if unknown:
            self.notes = (
                f"{len(unknown)} tensors of the converter's file ({unknown[0]}) are no parameters of transformers' "
                "model as they are: they are rounded to nearest, whatever the method",
            )

    def _by_our_rows(self, reader: TensorReader, folder: Path, name: str | None, with_tokenizer: bool) -> None:
        self.form = form_of(self.config)
        self.entries = layout(self.skeleton)
        origin, name = name or folder.resolve().name, (name or folder.resolve().name).rpartition("/")[2]
        tokenizer, lost = tokenizer_metadata(folder, self.config) if with_tokenizer else ({}, [])
        self.notes = (*notes(self.config, self.form), *lost)
        self.metadata = {
            ARCHITECTURE: self.form.architecture,
            "general.type": "model",
            "general.name": name,
            **general_metadata(folder, reader.config, origin, self.tensors()),
            **hyperparameters(self.config, self.form),
            **tokenizer,
        }
        if isinstance(reader, Checkpoint):
            self.notes = (*self.notes, *self._left_over(reader))

    def tensors(self, kind: FloatType = "F16") -> list[FileTensor]:
        """The tensors of a file of this float type; vectors and norms are float32, as llama.cpp requires."""
        chosen = GGMLQuantizationType[kind]
        return [*self.constants(), *(self.tensor(entry, float_type(entry, chosen)) for entry in self.entries)]

    def constants(self) -> list[FileTensor]:
        """Tensors that are computed from the config: RoPE's factors."""
        if self.converted is not None:
            return []
        return [
            FileTensor(name, GGMLQuantizationType.F32, tuple(t.shape), t.numpy)
            for name, t in rope_tensors(self.config, self.form).items()
        ]

    def tensor(self, entry: Entry, kind: GGMLQuantizationType) -> FileTensor:
        """An entry as floats of this type, read when it is written."""
        return FileTensor(entry.name, kind, entry.shape, lambda: as_floats(self.read(entry), kind, entry.name))

    def read(self, entry: Entry) -> torch.Tensor:
        """The weight of an entry, in its shape and the checkpoint's dtype. Raises BadInput for another shape."""
        if self.converted is not None and not entry.parameters:
            return self.converted.dequantized(entry.name)
        weight = entry.read(self.skeleton.reader.read, self.config)
        if tuple(weight.shape) != entry.shape:
            raise BadInput(
                f"{entry.parameters[0]} gives {entry.name} the shape {list(weight.shape)} and config.json says "
                f"{list(entry.shape)}; is it the one that belongs to these weights?"
            )
        return weight

    def outside(self) -> list[Entry]:
        """The matrices outside the blocks: the embedding, and the head if it is not tied to it."""
        return [entry for entry in self.entries if entry.matrix and not entry.name.startswith("blk.")]

    def file_type(self, kind: FloatType) -> dict[str, Any]:
        """The metadata of a file of this float type."""
        version = gguf.GGML_QUANT_VERSION
        return self.metadata | {"general.file_type": int(_FILE_TYPES[kind]), "general.quantization_version": version}

    def _left_over(self, checkpoint: Checkpoint) -> list[str]:
        """Notes on the tensors that are not written; raises BadInput for one that is not known to be dispensable."""
        on_disk = self.skeleton.reader.on_disk
        used = {disk for entry in self.entries for name in entry.parameters for disk in on_disk(name)}
        heads = {f"{head}.weight" for head in self.skeleton.head_names()} if self.config.tie_word_embeddings else set()
        nothing = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".inv_freq")
        towers = self.skeleton.tower_tensors()
        placed = used | heads | towers.keys()
        spare = [name for name in checkpoint.names() if name not in placed and not name.endswith(nothing)]
        ahead = dict.fromkeys(name for name in spare if predicts_ahead(name, int(self.config.num_hidden_layers)))
        if spare := [name for name in spare if name not in ahead]:
            more = f" and {len(spare) - 1} more" if spare[1:] else ""
            raise BadInput(
                f"{checkpoint.folder}: {spare[0]}{more}: a GGUF file of {self.config.model_type} has no place for it"
            )
        found = []
        if towers:
            found.append(f"the file is of the text decoder alone: {len(towers)} tensors of the towers are not in it")
        if ahead:
            found.append(
                f"{len(ahead)} tensors that predict several tokens ahead ({next(iter(ahead))}) are not in the file"
            )
        return found


_LAYER = re.compile(r"\blayers\.(\d+)\.")


def predicts_ahead(name: str, blocks: int) -> bool:
    """Whether a tensor is of multi-token prediction: of a layer after the last, or under mtp, as in Qwen3-Next."""
    layer = _LAYER.search(name)
    return name.startswith(("mtp.", "model.mtp.")) or (layer is not None and int(layer[1]) >= blocks)


def as_floats(weight: torch.Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray[Any, Any]:
    """A weight in this float type; raises BadInput for a value that overflows it."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
    out = weight.to(dtype).contiguous()
    if not bool(torch.isfinite(out).all()):
        largest = float(weight.abs().max())
        raise BadInput(f"{name}: {kind.name} cannot hold {largest:g}; write BF16 or F32")
    return (out.view(torch.int16) if kind.name == "BF16" else out).numpy()
