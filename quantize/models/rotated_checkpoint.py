"""The transform `hadamard`: rotations folded into the weights as a checkpoint is read (QuaRot, arXiv:2404.00456).

The residual stream x becomes x R1 and the values v of the heads of layer k become v R2[k] (SpinQuant, arXiv:2405.16406,
section 3.1), with R1 and R2[k] orthogonal. Linears that read a rotated stream undo the rotation and those that write to
it apply it, so the model computes the same function, while outliers of weights and inputs are spread over all channels.
A server runs the model as before: no operation is added.

It is exact where only RMSNorms read the residual stream: ||x R1|| = ||x||, once each norm's weight gamma has been
folded into the linears that the norm feeds.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..methods.hadamard import Rotation
from .architecture import is_multimodal, text_config
from .checkpoint import Checkpoint
from .families import TOWERS, family_of
from .family import Family
from .skeleton import Skeleton
from .vetting import not_finite

HEAD = "lm_head.weight"
_PIECE = 1 << 21  # elements rotated at a time, in float64


@dataclass(frozen=True)
class _Stream:
    """Where the blocks of a family meet the residual stream, by names inside a block; * is any number.

    readers: the linears that read it, by the norm before them. writers: the linears that add to it. values: the linear
    whose last rows make the attention values. output: the linear that reads those. unit: the norm weight that means a
    factor of one.
    """

    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    values: str
    output: str
    unit: float


def _stream(family: Family) -> _Stream:
    """Read off a family's feeds: a source that no other feed leads into is a norm on the residual stream."""
    fed = {name for feed in family.feeds for name in feed.into}
    norms = [feed for feed in family.feeds if feed.source not in fed]
    mixed = next(feed for feed in family.feeds if feed.heads)
    return _Stream(
        readers={feed.source: feed.into for feed in norms},
        writers=tuple(name for feed in family.feeds if feed not in norms for name in feed.into),
        values=mixed.source,
        output=mixed.into[0],
        unit=0.0 if norms[0].plus_one else 1.0,
    )


@dataclass(frozen=True)
class _Turn:
    """W [out, in] becomes rows^T W diag(gamma) columns; a rotation smaller than that side of W acts on each head."""

    columns: Rotation | None = None
    rows: Rotation | None = None
    first_row: int = 0  # where the values begin in a fused q/k/v; `rows` acts from here on
    norm: str | None = None  # the tensor that gamma is read from


class RotatedCheckpoint:
    """A checkpoint with the names and dtypes of the original, whose tensors are rotated as they are read.

    Only the tensor asked for is held in memory. A head that was tied to the embedding becomes a tensor of its own, as
    the final norm's gamma is folded into the head only. notes: what a user should know of such changes.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int) -> None:
        """Raises BadInput for a family where the rotation is not exact, and for missing or unknown tensors."""
        text = text_config(checkpoint.config)
        self._kind = str(text.model_type)
        if is_multimodal(checkpoint.config):
            raise BadInput(
                f"transform hadamard cannot rotate multimodal models ({checkpoint.config['model_type']}): "
                f"{TOWERS}; leave the transform out"
            )
        family = family_of(self._kind)
        if family.no_hadamard is not None:
            raise BadInput(
                f"transform hadamard cannot rotate {self._kind} models: {family.no_hadamard}; leave the transform out"
            )
        self._stream, self._checkpoint = _stream(family), checkpoint
        self.config: dict[str, Any] = dict(checkpoint.config)
        embedding, final = self._outer("embed_tokens.weight"), self._outer("norm.weight")
        tied = bool(text.tie_word_embeddings)
        self._head_source = embedding if tied else self._outer(HEAD)
        if tied:
            self.config["tie_word_embeddings"] = False
        R1 = Rotation(checkpoint.shape(embedding)[1], seed)
        self._turns = {embedding: _Turn(R1), HEAD: _Turn(R1, norm=final)}
        self._norms = {final}
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        values = (text.num_key_value_heads or text.num_attention_heads) * head_dim
        R2 = [Rotation(head_dim, seed + 1 + k) for k in range(text.num_hidden_layers)]
        skeleton = Skeleton(checkpoint, device=torch.device("cpu"))
        for k in range(skeleton.n_blocks):
            names = skeleton.block_names(k)
            for inside in names:
                self._place(names, inside, R1, R2[k], values)
        for name in skeleton.unused:
            if len(checkpoint.shape(name)) == 2:
                raise self._unknown(name)
        self.notes = self._notes(tied, R1, R2[0])

    def names(self) -> list[str]:
        """Tensor names, in the order of the files; a head that was tied comes last."""
        return list(dict.fromkeys([*self._checkpoint.names(), HEAD]))

    def __contains__(self, name: object) -> bool:
        return name == HEAD or name in self._checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(self._source(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.dtype(self._source(name))

    def nbytes(self, name: str) -> int:
        return self._checkpoint.nbytes(self._source(name))

    def read(self, name: str) -> Tensor:
        """The rotated tensor, in memory of its own. Raises BadInput where its dtype cannot hold it, once rotated."""
        tensor = self._checkpoint.read(self._source(name))
        if name in self._norms:
            return tensor.fill_(self._stream.unit)
        turn = self._turns.get(name)
        if turn is None:
            return tensor
        # A tensor rotated on both sides stays in float32 between the two, so that it is rounded once.
        both = turn.columns is not None and turn.rows is not None
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if both else tensor
        matrix = wide if wide.dim() == 2 else wide[:, None]
        if turn.columns is not None:
            _turn(matrix, turn.columns, None if turn.norm is None else self._gamma(turn.norm))
        if turn.rows is not None:
            _turn(matrix[turn.first_row :].T, turn.rows, None)
        rotated = wide.to(tensor.dtype)
        if not_finite(rotated) is not None and not_finite(self._checkpoint.read(self._source(name))) is None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise BadInput(f"{name} holds inf in {dtype} once it is rotated; convert the checkpoint to bfloat16")
        return rotated

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """As `read`, for a part along the first dimension."""
        return self.read(name)[rows]

    def _place(self, names: Mapping[str, str], inside: str, R1: Rotation, R2: Rotation, values: int) -> None:
        """Note how the tensor `inside` a block changes.

        names: of the block's tensors on disk, by those inside. values: how many rows hold attention values.
        """
        name, module = names[inside], inside.rpartition(".")[0]
        stream, shape = self._stream, self._checkpoint.shape(name)
        norm = next((norm for norm, linears in stream.readers.items() if _among(module, linears)), None)
        is_weight = len(shape) == 2
        if module in stream.readers:
            self._norms.add(name)
        elif norm is not None:
            rows = R2 if module == stream.values else None
            self._turns[name] = _Turn(R1 if is_weight else None, rows, shape[0] - values, names[f"{norm}.weight"])
        elif _among(module, stream.writers):
            self._turns[name] = _Turn(R2 if is_weight and module == stream.output else None, R1)
        elif is_weight:
            raise self._unknown(name)

    def _unknown(self, name: str) -> BadInput:
        return BadInput(
            f"transform hadamard does not know what {name} of a {self._kind} model reads and writes; "
            "leave the transform out"
        )

    def _notes(self, untied: bool, R1: Rotation, R2: Rotation) -> tuple[str, ...]:
        found = []
        if untied:
            added = self.nbytes(HEAD)
            found.append(f"hadamard: the head is no longer tied to the embedding, which adds {added} bytes")
        found += [
            f"hadamard: no known Hadamard matrix has order {R.n} ({what}): a random orthogonal matrix is used instead"
            for R, what in ((R1, "hidden size"), (R2, "head size"))
            if not R.is_hadamard
        ]
        return tuple(found)

    def _outer(self, name: str) -> str:
        """The on-disk name of a tensor outside the blocks, with or without the prefix of the whole model."""
        for disk in (f"model.{name}", name):
            if disk in self._checkpoint:
                return disk
        raise BadInput(f"transform hadamard: the checkpoint has no tensor {name}, which must be rotated")

    def _source(self, name: str) -> str:
        return self._head_source if name == HEAD else name

    def _gamma(self, norm: str) -> Tensor:
        """What the norm multiplies each channel by, float64 [hidden]."""
        return self._checkpoint.read(norm).double() + (1 - self._stream.unit)


def _turn(X: Tensor, R: Rotation, gamma: Tensor | None) -> None:
    """X [rows, n] becomes X diag(gamma) R in place, a piece at a time; a smaller R acts on each R.n of the columns."""
    step = max(1, _PIECE // X.shape[1])
    for start in range(0, X.shape[0], step):
        piece = X[start : start + step]
        wide = piece.double() if gamma is None else piece.double() * gamma
        piece.copy_(R(wide.reshape(-1, R.n)).reshape(piece.shape))


def _among(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)
