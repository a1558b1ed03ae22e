"""The processes that share one run: what passes between them. Alone, everything here is what the process has itself.

One leads: it reads the text, writes the files and speaks to the user. torch.distributed carries tensors of a GPU over
NCCL, all others over gloo.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .errors import BadInput, LostRank

if TYPE_CHECKING:
    from torch import Tensor

_MEETING = timedelta(minutes=30)  # the first may load texts before it comes
_PATIENCE = timedelta(days=7)  # one may read a checkpoint of terabytes while the others wait
_ALIGNED = 16  # bytes: where a tensor begins in a run of several
_STEP = 16  # rows: the vector units of a CPU compute whole runs of them, as if no row had been given away


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `size`, of which `here` run on this machine."""

    rank: int = 0
    size: int = 1
    here: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def open(self, on_gpu: bool) -> None:
        """Meet the others, at the address that torchrun's environment variables name."""
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        if self.size > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            with _told():
                store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=_MEETING))
                dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE)

    def close(self) -> None:
        """Part from the others, once all are here."""
        if self.size > 1:
            import torch.distributed as dist

            self.gather(None)
            dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size
        with _told():
            dist.all_gather_object(values, value)
        return values

    def tell(self, value: Any = None) -> Any:
        """What the leader passes, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        told = [value]
        with _told():
            dist.broadcast_object_list(told, 0)
        return told[0]

    def collect(self, part: "Tensor") -> list["Tensor"]:
        """The tensors of all ranks, which lie on the host, for the leader; [] for the others."""
        if self.size == 1:
            return [part]
        import torch.distributed as dist

        shapes = self.gather(tuple(part.shape))
        parts = [part.new_empty(shape) for shape in shapes] if self.leads else []
        with _told():
            for rank, other in enumerate(parts):
                dist.recv(other, rank) if rank else other.copy_(part)
            if not self.leads:
                dist.send(part.contiguous(), 0)
        return parts

    def agree(self, problem: str | None) -> None:
        """Raise BadInput where a rank has a problem; with several the first. On others than the leader LostRank."""
        found = next((one for one in self.gather(problem) if one is not None), None)
        if found is not None:
            raise BadInput(found) if self.leads else LostRank(found)

    def rows(self, n: int) -> slice:
        """Which of `n` rows are this rank's."""
        steps = -(-n // _STEP)
        start, stop = (min(n, _STEP * (steps * r // self.size)) for r in (self.rank, self.rank + 1))
        return slice(start, stop)

    def add(self, total: "Tensor | None", part: "Tensor", holders: int) -> "Tensor":
        """Add the `part` [n, ...] of each of the first `holders` ranks, in their order, to the total.

        Of the total each rank holds a slab of its rows, from which `whole` makes it again; None: nothing yet. `part`
        may be taken over.
        """
        if self.size == 1:
            return part if total is None else total.add_(part)
        for slab in self._slabs(part)[:holders]:
            total = slab.clone() if total is None else total.add_(slab)
        assert total is not None
        return total

    def _slabs(self, part: "Tensor") -> Sequence["Tensor"]:
        """This rank's rows of the part of every rank."""
        import torch.distributed as dist

        sizes = self._sizes(part.shape[0])
        mine = sizes[self.rank]
        received = part.new_empty(self.size * mine, *part.shape[1:])
        with _told():
            dist.all_to_all_single(received, part.contiguous(), [mine] * self.size, sizes)
        return received.view(self.size, mine, *part.shape[1:]).unbind()

    def whole(self, slab: "Tensor", n: int) -> "Tensor":
        """The total [n, ...] of which each rank holds a slab of its rows."""
        if self.size == 1:
            return slab
        import torch
        import torch.distributed as dist

        sizes = self._sizes(n)
        padded = slab.new_zeros(max(sizes), *slab.shape[1:])
        padded[: slab.shape[0]] = slab
        slabs = [torch.empty_like(padded) for _ in sizes]
        with _told():
            dist.all_gather(slabs, padded)
        return torch.cat([one[:size] for one, size in zip(slabs, sizes, strict=True)])

    def _sizes(self, n: int) -> list[int]:
        bounds = [n * r // self.size for r in range(self.size + 1)]
        return [stop - start for start, stop in pairwise(bounds)]

    def exchange(self, tensors: Sequence["Tensor"], about: Any, to: "Tensor") -> list[tuple[list["Tensor"], Any]]:
        """The tensors of every rank and what each says about its own. to: a tensor of the device that they pass by."""
        if self.size == 1:
            return [(list(tensors), about)]
        import torch
        import torch.distributed as dist

        heads = self.gather(([(tuple(t.shape), t.dtype) for t in tensors], about))
        sizes = [sum(map(_padded, shapes)) for shapes, _ in heads]
        own = to.new_zeros(max(sizes), dtype=torch.uint8)
        at = 0
        for tensor in tensors:
            data = tensor.contiguous().reshape(-1).view(torch.uint8)
            own[at : at + len(data)] = data
            at += _padded((tuple(tensor.shape), tensor.dtype))
        arrived = [torch.empty_like(own) for _ in heads]
        if len(own):
            with _told():
                dist.all_gather(arrived, own)
        return [(list(_parted(data, shapes)), said) for data, (shapes, said) in zip(arrived, heads, strict=True)]


ALONE = Ranks()


def _bytes(head: tuple[tuple[int, ...], Any]) -> int:
    size: int = head[1].itemsize
    for n in head[0]:
        size *= n
    return size


def _padded(head: tuple[tuple[int, ...], Any]) -> int:
    return -(-_bytes(head) // _ALIGNED) * _ALIGNED


def _parted(data: "Tensor", heads: Sequence[tuple[tuple[int, ...], Any]]) -> Iterator["Tensor"]:
    at = 0
    for head in heads:
        yield data[at : at + _bytes(head)].view(head[1]).view(head[0])
        at += _padded(head)


@contextmanager
def _told() -> Iterator[None]:
    """Raise LostRank where another process is not there any more."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
        from .memory import is_out_of_memory

        if is_out_of_memory(error):
            raise
        raise LostRank("another process of the run has ended; its own message says why") from error
