"""The kinds of artifact a run can write, behind one interface: a Hugging Face folder, or a GGUF file.

A backend checks the recipe against the model, says how each linear is rounded and what the run will need, and puts the
artifact together from what the blocks left. `job.prepare` is the one place that chooses between them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..artifact.config_only import HeadersOnly
from ..artifact.manifest import Manifest, Sizes
from ..artifact.original import OriginalCheckpoint
from ..calibrate.tokens import Tokens
from ..core.ranks import ALONE, Ranks
from ..gguf.reader import GgufCheckpoint
from ..models.by_name import ByName
from ..models.checkpoint import Checkpoint
from ..models.placed_model import LinearLayer
from ..models.rotated_checkpoint import RotatedCheckpoint
from ..models.skeleton import Skeleton
from ..models.vetting import MOST_OF_FLOAT16
from ..numbers.grid import Grid
from ..recipe import Recipe
from .plan import Plan
from .settings import Settings
from .sources import Source

_MOST = 2.0**60  # whose square float32 still holds, added up over a row


@dataclass(frozen=True)
class Setup:
    """A recipe and the model it is to quantize, opened from its config and shard headers.

    checkpoint: the original. reader: what is quantized, the original or its Hadamard-rotated form. ranks: the processes
    that are to share the run.
    """

    recipe: Recipe
    source: Source
    checkpoint: OriginalCheckpoint
    reader: OriginalCheckpoint | RotatedCheckpoint
    skeleton: Skeleton
    linears: list[LinearLayer]
    ranks: Ranks = field(default=ALONE, kw_only=True)

    @property
    def headers_only(self) -> bool:
        """Whether the original's files need not be there; only a plan can be made."""
        return isinstance(self.checkpoint, HeadersOnly)

    @property
    def parameters(self) -> int:
        """How many weights the original has."""
        return sum(math.prod(self.checkpoint.shape(name)) for name in self.checkpoint.names())

    def sizes(
        self,
        format: str,
        artifact: Checkpoint | GgufCheckpoint,
        packed_bytes: int,
        weights: int,
        files: Mapping[str, str],
    ) -> Sizes:
        """What the manifest says of the artifact's size; packed_bytes: of its quantized `weights`, scales included.

        files: SHA-256 by name.
        """
        return Sizes(
            format=format,
            bytes=artifact.total_bytes,
            original_bytes=self.checkpoint.total_bytes,
            quantized_bits_per_weight=8 * packed_bytes / weights,
            bits_per_parameter=8 * artifact.total_bytes / self.parameters,
            parameters=self.parameters,
            files=dict(files),
        )


@dataclass(frozen=True, kw_only=True)
class Backend(ABC):
    """One kind of artifact, for one Setup.

    schemes: the grid of each linear by its on-disk name; None where the blocks leave it as it is.
    rounds_blocks: False where the backend quantizes the original as a whole, and the blocks are not run.
    importance: mean squares [in] of the inputs of each linear, from the user's importance matrix. Where there are any
    they replace the calibration of the blocks.
    imatrix_sha256: of the importance matrix that the user gives; None without one.
    keep_final: what to keep, as tensors in the last block's part, of the states [samples, seq_len, hidden] that leave
    the last block; None: nothing.
    """

    setup: Setup
    schemes: dict[str, Grid | None]
    rounds_blocks: bool = True
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    imatrix_sha256: str | None = None
    keep_final: Callable[[Tensor], dict[str, Tensor]] | None = None

    @property
    def outside(self) -> Mapping[str, Grid]:
        """The grids of what is quantized outside of the blocks, head and embeddings, by on-disk name."""
        return {}

    @property
    def limits(self) -> dict[str, float]:
        """The largest value that may be in a tensor of the file, by on-disk name: in what is rounded, and in what the
        original's float16 has to hold.
        """
        skeleton = self.setup.skeleton
        layers = [*(name for name, grid in self.schemes.items() if grid is not None), *self.outside]
        limits = self._limits((f"{layer}.weight" for layer in layers), _MOST)
        if skeleton.dtype != torch.float16 or isinstance(skeleton, ByName):
            return limits
        return limits | self._limits(skeleton.loaded_in(torch.float16), MOST_OF_FLOAT16)

    def _limits(self, tensors: Iterable[str], most: float) -> dict[str, float]:
        on_disk = self.setup.skeleton.reader.on_disk
        return {name: most for tensor in tensors for name in on_disk(tensor)}

    @classmethod
    @abstractmethod
    def of(cls, setup: Setup) -> Self:
        """Raises BadInput for a model or a recipe that cannot be written."""

    @abstractmethod
    def plan(self) -> Plan:
        """What the run will need."""

    def alternatives(self) -> Sequence[Self]:
        """The backend with each of the schemes that a budget may choose, or only as it is."""
        return [self]

    def settled(self, tokens: Tokens | None, work: Path) -> Self:
        """The backend with what only the calibration text can decide; `work` keeps that for a resumed run."""
        return self

    @abstractmethod
    def assemble(
        self, manifest: Manifest, parts: Mapping[Path, str], tokens: Tokens | None, settings: Settings
    ) -> Manifest:
        """Write `settings.out`/quantized, whole or not at all, and return its manifest.

        manifest: what is known of the run before. parts: a file for each block, with its tensors in FORMATS' form,
        and its SHA-256.
        """
