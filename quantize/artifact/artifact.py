"""Artifact folders read back from disk, so that what is evaluated is what a server would load."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate import kv_cache
from ..core.errors import BadInput
from ..core.files import changed
from ..core.untrusted import read_json
from ..formats import FORMATS, detect
from ..gguf.reader import GgufCheckpoint, gguf_files
from ..models.architecture import model_config, stated_dtype
from ..models.building import auto_class
from ..models.checkpoint import Checkpoint
from ..models.skeleton import Skeleton
from ..numbers.activations import round_inputs
from ..numbers.grid import Grid, Inputs, QuantizedLinear
from ..numbers.types import Activations
from .manifest import read_manifest
from .original import OriginalCheckpoint, check_no_codes, stated_of


class Artifact:
    """A quantized checkpoint read like a plain one: weights are dequantized as they are read.

    linears: the grid of each quantized linear by its on-disk name. A plain checkpoint has none, nor has one in a format
    that only `OriginalCheckpoint` dequantizes. Raises BadInput for a quantization that neither reads.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint = _opened(folder)
        self.config: dict[str, Any] = self.checkpoint.config
        self.format = detect(self.config)
        self.activations: Activations | None = None
        self.dynamic: frozenset[str] = frozenset()  # linears whose scales of inputs are not static, as the others' are
        self.kv_cache: str | None = None
        self.linears: dict[str, Grid] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.transposed: frozenset[str] = frozenset()  # linears the model keeps as [in, out]
        if self.format is not None:
            shapes = {name: self.checkpoint.shape(name) for name in self.checkpoint.names()}
            self.shapes = FORMATS[self.format].linears(shapes, self.checkpoint.read)
            grids = FORMATS[self.format].grids(self.config["quantization_config"], list(self.shapes))
            self.activations = FORMATS[self.format].activations(self.config["quantization_config"])
            self.dynamic = FORMATS[self.format].dynamic(self.config["quantization_config"], list(self.shapes))
            self.kv_cache = FORMATS[self.format].kv_cache(self.config["quantization_config"])
            for name in self.shapes:
                grid = grids.get(name)
                if grid is None:
                    raise BadInput(f"{folder}: {name} is quantized on disk and not in config.json")
                self.linears[name] = grid

    @property
    def foreign(self) -> str | None:
        """What the weights are stored as, in a few words, where that is none of the formats that are written here."""
        return self.checkpoint.quantization if isinstance(self.checkpoint, OriginalCheckpoint) else None

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in a GGUF file; `format` is None then, since the file describes itself."""
        return isinstance(self.checkpoint, GgufCheckpoint)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint or str(name).removesuffix(".weight") in self.linears

    def names(self) -> list[str]:
        """The names of the tensors of the unquantized model."""
        plain = [n for n in self.checkpoint.names() if n.endswith(".bias") or n.rpartition(".")[0] not in self.linears]
        return [*plain, *(f"{linear}.weight" for linear in self.linears)]

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights on disk."""
        return self.checkpoint.total_bytes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor as `read` returns it."""
        return self._dtype if name.removesuffix(".weight") in self.linears else self.checkpoint.dtype(name)

    def plain_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor that is not quantized; None for the weight of a quantized linear."""
        return None if name.removesuffix(".weight") in self.linears else self.checkpoint.shape(name)

    def bits_per_weight(self) -> float | None:
        """Bits on disk per quantized weight, including scales and zeros; None when nothing is quantized."""
        if isinstance(self.checkpoint, GgufCheckpoint):
            return self.checkpoint.bits_per_weight()
        names = [name for name in self.checkpoint.names() if not name.endswith(".bias")]
        size = sum(self.checkpoint.nbytes(name) for name in names if name.rpartition(".")[0] in self.linears)
        count = sum(rows * columns for rows, columns in self.shapes.values())
        return size * 8 / count if count else None

    def linear(self, name: str) -> QuantizedLinear:
        """The unpacked record of a quantized linear."""
        if self.format is None:
            raise KeyError(name)
        return FORMATS[self.format].unpack(name, self.checkpoint.read, self.linears[name], self.shapes[name])

    @property
    def scattered(self) -> bool:
        """Whether any linear has groups of scattered columns (desc_act), judging by its stored tensors."""
        if self.format is None:
            return False
        reader, read = FORMATS[self.format], self.checkpoint.read
        return any(reader.scattered(n, read, grid, self.shapes[n][1]) for n, grid in self.linears.items())

    def inputs(self, name: str) -> Inputs | None:
        """How the inputs of a quantized linear are rounded; None where they stay in 16 bit."""
        if self.format is None or self.activations is None or name not in self.linears:
            return None
        grid = self.linears[name]
        spec = self.activations.at_run_time if name in self.dynamic else self.activations.beside(grid)
        return FORMATS[self.format].inputs(name, self.checkpoint.read, spec, grid)

    def cache_scales(self, attention: str) -> tuple[Tensor, Tensor]:
        """The scales of the cached keys and values of `attention`, float32 []."""
        if self.format is None:
            raise KeyError(attention)
        keys, values = (f"{attention}.{suffix}" for suffix in FORMATS[self.format].cache_suffixes)
        for name in (keys, values):
            if name not in self.checkpoint:
                raise BadInput(f"the config says that the key-value cache is quantized, and there is no {name}")
        return self._scalar(keys), self._scalar(values)

    def _scalar(self, name: str) -> Tensor:
        scale = self.checkpoint.read(name).to(torch.float32)
        if scale.numel() != 1:
            raise BadInput(f"{name}: shape {list(scale.shape)}, and only one scale a layer can be read")
        return scale.reshape(())

    def read(self, name: str) -> Tensor:
        """A tensor as in the unquantized model."""
        linear = name.removesuffix(".weight")
        if linear not in self.linears:
            return self.checkpoint.read(name)
        weight = self.linear(linear).dequantize(self._dtype)
        return weight.T.contiguous() if linear in self.transposed else weight

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """As `read`, for a part along the first dimension."""
        return self.checkpoint.read_rows(name, rows) if name in self.checkpoint else self.read(name)[rows]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the unquantized model; that of a weight as [out, in]."""
        return self.shapes.get(name.removesuffix(".weight")) or self.checkpoint.shape(name)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, str(stated_dtype(self.config) or "float32").removeprefix("torch."))
        return dtype


def auto_class_of(folder: Path) -> str:
    """The name of transformers' auto class that loads the model in `folder`."""
    return str(auto_class(model_config(read_json(folder / "config.json"))).__name__)


def _opened(folder: Path) -> Checkpoint | GgufCheckpoint:
    """The folder's tensors: as they lie there where one of FORMATS reads them, else dequantized as they are read."""
    if gguf_files(folder):
        return GgufCheckpoint(folder)
    checkpoint = Checkpoint(folder)
    stated = stated_of(checkpoint)
    if stated is None or not any(stated["quant_method"] == f.method or f.reads(stated) for f in FORMATS.values()):
        return OriginalCheckpoint(folder)
    checkpoint.config = checkpoint.config | {"quantization_config": stated}  # also where it stands in a file of its own
    return checkpoint


def open_original(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[OriginalCheckpoint, Skeleton]:
    """The model that artifacts are compared with, as a run reads it: dequantized, its inputs in 16 bit."""
    checkpoint = OriginalCheckpoint(folder)
    skeleton = Skeleton(checkpoint, device=device, dtype=dtype)
    skeleton.check_shapes(checkpoint.shape)
    check_no_codes(skeleton, checkpoint)
    return checkpoint, skeleton


def open_artifact(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Artifact, Skeleton]:
    """An artifact and the skeleton of its model, which rounds inputs and key-value cache as the artifact says."""
    artifact = Artifact(folder)
    skeleton = Skeleton(artifact, device=device, dtype=dtype)
    skeleton.check_shapes(artifact.plain_shape)
    if isinstance(artifact.checkpoint, Checkpoint):
        check_no_codes(skeleton, artifact.checkpoint, but=artifact.linears)
    artifact.transposed = frozenset(x.name for x in skeleton.linears() if x.transposed)
    if artifact.kv_cache is not None:
        for name, attention in kv_cache.attentions(skeleton):
            kv_cache.tap(attention, kv_cache.rounding(artifact.kv_cache, *artifact.cache_scales(name)))
    for linear in skeleton.linears():
        inputs = artifact.inputs(linear.name)
        if inputs is not None:
            skeleton.round_inputs(linear, partial(round_inputs, inputs=inputs))
    return artifact, skeleton


def verify(out: Path) -> int:
    """Check the files of `out/quantized` against the hashes in its manifest; returns how many there are.

    Raises BadInput naming the first file that differs or is missing.
    """
    hashes = read_manifest(out).artifact.files
    for name, what in changed(out / "quantized", hashes):
        raise BadInput(f"{out / 'quantized' / name}, which the manifest names, {what}; restore it, or run again with "
                       "--overwrite")  # fmt: skip
    return len(hashes)
