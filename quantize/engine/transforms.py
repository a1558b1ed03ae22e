"""Transforms of a block: its linears' inputs are observed in one pass, scales are chosen and folded into its weights.

Afterwards the block computes the same function, up to rounding in its dtype, with weights that quantize better.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..artifact.manifest import TransformRecord
from ..calibrate.block_pass import BlockPass, SharedInput
from ..calibrate.lanes import Lanes
from ..core.errors import BadInput
from ..core.ranks import Ranks
from ..methods import TRANSFORMS
from ..methods.channel_scales import Observed, Rounding
from ..models.block_arguments import BlockArguments
from ..models.family import Feed
from ..models.skeleton import Skeleton
from ..numbers.activations import columns_of, measured, round_inputs
from ..numbers.grid import Grid
from ..recipe import Hadamard, Recipe, SmoothQuant

_ROWS = 1024  # input rows kept, on which the error with rounded inputs is measured


@dataclass
class Changes:
    """What was done to a block: names of the parameters that changed, and the manifest's record of each transform."""

    parameters: set[str] = field(default_factory=set)
    records: list[TransformRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Link:
    """A feed found in a block. into: names of all modules that read the output of `source`, scaled together."""

    source: str
    into: tuple[str, ...]
    feed: Feed


class BlockTransforms:
    """The transforms of a recipe that scale channels, for the blocks of one model.

    Raises BadInput for a model whose family has no feeds in models/families.py.
    """

    def __init__(self, recipe: Recipe, skeleton: Skeleton) -> None:
        self._wanted = [transform for transform in recipe.transforms if not isinstance(transform, Hadamard)]
        self._skeleton = skeleton
        self._recipe = recipe
        if self._wanted and not skeleton.family.feeds:
            raise BadInput(
                f"transform {self._wanted[0].name} needs to know which norms feed which linears in a "
                f"{skeleton.config.model_type} block, and no row of models/families.py says so; leave it out of "
                "`transforms`, or add the row"
            )

    def apply(
        self,
        k: int,
        block: nn.Module,
        grids: dict[str, Grid],
        hidden: Tensor | None,
        arguments: BlockArguments | None,
        lanes: Lanes | None,
        *,
        restarts: bool = False,
    ) -> Changes:
        """Transform block `k` in place; its inputs hidden [samples, seq_len, hidden] are not changed.

        grids: of each linear that will be rounded, by its name in the block. lanes, restarts: as for BlockPass.
        """
        changes = Changes()
        if not self._wanted or hidden is None or arguments is None or lanes is None:
            return changes
        links = {
            link.into[0]: link for link in links_of(block, self._skeleton.family.feeds) if set(link.into) & set(grids)
        }
        watch = _Watch(max(1, lanes.samples * hidden.shape[1] // _ROWS), lanes.ranks)
        looks = BlockPass(
            block, hidden, arguments, {name: block.get_submodule(name) for name in links},
            device=self._skeleton.device, lanes=lanes, keep=False, watch=watch, restarts=restarts,
            diagonal=self._by_rows, all_experts=self._recipe.calibration.all_experts,
        )  # fmt: skip
        scales: dict[str, Tensor] = {}
        for shared in looks:
            for name in shared.names:
                source = f"{self._skeleton.blocks_name}.{k}.{links[name].source}.weight"
                feed = self._skeleton.disk_name(source).removesuffix(".weight")
                scale, records = self._chosen(block, links[name], grids, shared, watch)
                changes.records += [TransformRecord(block=k, feed=feed, **record) for record in records]
                if scale is not None:
                    scales[name] = scale
        # Folded only now: batches that waited before the linears were computed with the old weights.
        for name, link in links.items():
            if name in scales:
                changes.parameters |= fold(
                    block, link, scales[name], source_channels(block, link, self._skeleton.config)
                )
        return changes

    def _chosen(
        self, block: nn.Module, link: Link, grids: dict[str, Grid], shared: SharedInput, watch: "_Watch"
    ) -> tuple[Tensor | None, list[dict[str, Any]]]:
        """The scale [in] of all transforms together for one feed, each applied to the result of the one before."""
        why = unfit(block, link, self._skeleton.config)
        if why is None and shared.moment is None:
            why = "no calibration token reached it"
        if why is not None or shared.moment is None:
            names = ", ".join(transform.name for transform in self._wanted)
            return None, [{"note": f"{names} left out: {why}"}]
        tie = source_channels(block, link, self._skeleton.config)
        inputs = watch.inputs(shared.names[0], shared.moment, tie, _channels(block, link, self._skeleton.config))
        weights = [(columns(block.get_submodule(name)), grids[name]) for name in link.into if name in grids]
        total, records = torch.ones_like(inputs.peak), []
        for transform in self._wanted:
            found = TRANSFORMS[transform.name](weights, inputs, transform, self._rounding())
            records.append(
                {"transform": transform.name, "strength": found.strength, "note": None}
                | {"error_before": found.before, "error_after": found.after}
            )
            total = total * found.scale
            weights = [((w.to(torch.float32) * found.scale).to(w.dtype), grid) for w, grid in weights]
            inputs = inputs.divided(found.scale)
        return (None if bool((total == 1).all()) else total), records

    @property
    def _by_rows(self) -> bool:
        """Whether errors are measured on rows of rounded inputs, so that no second moments are needed."""
        return self._recipe.activations is not None and all(isinstance(x, SmoothQuant) for x in self._wanted)

    def _rounding(self) -> Rounding | None:
        """How the artifact rounds inputs, None if it does not; a static scale is measured on the inputs given."""
        spec = self._recipe.activations
        if spec is None:
            return None
        spec = spec.beside(self._recipe.weights)
        columns = columns_of(spec, self._recipe.weights)
        return lambda x: round_inputs(x, measured(spec, columns, float(x.min()), float(x.max())))


def unfit(block: nn.Module, link: Link, config: Any) -> str | None:
    """Why no scale can move from the source into the linears it feeds; None when one can."""
    rows, wanted = _size(block.get_submodule(link.source)), _channels(block, link, config)
    heads = config.num_attention_heads
    if link.feed.heads and columns(block.get_submodule(link.into[0])).shape[1] % heads:
        return f"the inputs of {link.into[0]} do not divide into {heads} heads"
    if rows < wanted or (rows > wanted and not link.feed.last):
        return f"{link.source} puts out {rows} channels and {link.into[0]} takes in {wanted}"
    return None


def fold(block: nn.Module, link: Link, scale: Tensor, tie: Tensor) -> set[str]:
    """Divide the outputs of the source of `link` by `scale` [in] and multiply the columns of what it feeds by it.

    tie [in]: the source channel of each column. Returns the names of the parameters that changed.
    """
    n = int(tie.max()) + 1
    channels = torch.ones(n, device=scale.device).index_copy(0, tie, scale)  # equal for columns of one channel
    source: Any = block.get_submodule(link.source)
    changed = {f"{link.source}.{name}" for name, _ in source.named_parameters(recurse=False)}
    used = _divide_linear(source, channels) if source.weight.dim() == 2 else _divide_norm(source, channels, link.feed)
    for name in link.into:
        module: Any = block.get_submodule(name)
        by = used[tie]
        moved = module.weight.to(torch.float32) * (by[:, None] if isinstance(module, Conv1D) else by)
        _replace(module, "weight", moved)
        changed.add(f"{name}.weight")
    return changed


def _divide_norm(norm: Any, scale: Tensor, feed: Feed) -> Tensor:
    """Divide a norm's weight and bias by `scale` [channels]; returns old / new weight, the scale after rounding.

    The new weight is rounded to the model's dtype. Multiplying the columns by the intended scale would leave that
    rounding error on the whole channel; multiplying them by old / new weight cancels it.
    """
    one = 1.0 if feed.plus_one else 0.0
    before = norm.weight.to(torch.float32) + one
    _replace(norm, "weight", before / scale - one)
    used = before / (norm.weight.to(torch.float32) + one)
    used = torch.where(torch.isfinite(used) & (used > 0), used, scale)  # a weight of zero stays zero
    if getattr(norm, "bias", None) is not None:
        _replace(norm, "bias", norm.bias.to(torch.float32) / used)
    return used


def _divide_linear(linear: Any, scale: Tensor) -> Tensor:
    """Divide the last rows of a linear, and of its bias, by `scale` [channels]; returns it."""
    rows = torch.ones(_size(linear), device=scale.device)
    rows[-scale.numel() :] = scale
    _replace(
        linear, "weight", linear.weight.to(torch.float32) / (rows if isinstance(linear, Conv1D) else rows[:, None])
    )
    if linear.bias is not None:
        _replace(linear, "bias", linear.bias.to(torch.float32) / rows)
    return scale


def _replace(module: Any, name: str, value: Tensor) -> None:
    """Replace a parameter by a new one: the old one's memory may be the mapped checkpoint."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=False))


def columns(module: Any) -> Tensor:
    """The weight of a linear or a router as [out, in]."""
    weight: Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def _size(source: Any) -> int:
    """Number of output channels of a norm or linear."""
    return int(source.weight.shape[-1] if isinstance(source, Conv1D) else source.weight.shape[0])


def _channels(block: nn.Module, link: Link, config: Any) -> int:
    """Number of source channels that the columns of what it feeds come from."""
    n = columns(block.get_submodule(link.into[0])).shape[1]
    return n // _queries(config) if link.feed.heads else n


def _queries(config: Any) -> int:
    """Query heads per key-value head."""
    heads = int(config.num_attention_heads)
    return heads // int(getattr(config, "num_key_value_heads", None) or heads)


def source_channels(block: nn.Module, link: Link, config: Any, device: torch.device | None = None) -> Tensor:
    """The source channel, counted among its last ones, that each column of what it feeds reads: int64 [in].

    device: that of the result, by default the weights'.
    """
    weight = columns(block.get_submodule(link.into[0]))
    index = torch.arange(weight.shape[1], device=device or weight.device)
    if not link.feed.heads:
        return index
    width = weight.shape[1] // int(config.num_attention_heads)
    return index // width // _queries(config) * width + index % width


def links_of(block: nn.Module, feeds: tuple[Feed, ...]) -> Iterator[Link]:
    """The feeds of a block; a feed of experts once for each expert."""
    names = [name for name, _ in block.named_modules()]
    for feed in feeds:
        for source in names:
            expert = re.fullmatch(_regex(feed.source, r"(\d+)"), source)
            if expert is None:
                continue
            number = expert[1] if expert.groups() else r"\d+"
            into = [n for piece in feed.into for n in names if re.fullmatch(_regex(piece, number), n)]
            if into:
                yield Link(source, tuple(into), feed)


def _regex(name: str, star: str) -> str:
    return re.escape(name).replace(r"\*", star)


class _Watch:
    """Observes the inputs of one group of linears: the largest of each channel, and a sample of rows."""

    def __init__(self, stride: int, ranks: Ranks) -> None:
        self._stride, self._ranks, self._name = stride, ranks, ""
        self._peaks: list[Tensor] = []  # one, or none yet
        self._rows: list[tuple[int, Tensor]] = []  # with their lane

    def __call__(self, name: str, rows: Tensor, lane: int) -> None:
        if name != self._name:
            self._name, self._peaks, self._rows = name, [], []
        peak = rows.abs().amax(0)
        self._peaks = [torch.maximum(before, peak) for before in self._peaks] or [peak]
        self._rows.append((lane, rows[:: self._stride].clone()))

    def inputs(self, name: str, moment: Tensor, tie: Tensor, channels: int) -> Observed:
        """What all processes have observed of the group `name`, with its second moments, `tie` and `channels`."""
        here = name == self._name
        tensors = [*self._peaks, *(rows for _, rows in self._rows)] if here else []
        peaks, rows = list[Tensor](), list[tuple[int, Tensor]]()
        for found, lanes in self._ranks.exchange(tensors, [lane for lane, _ in self._rows] if here else [], moment):
            peaks += found[:1]
            rows += zip(lanes, found[1:], strict=True)
        rows.sort(key=lambda one: one[0])
        return Observed(moment, torch.stack(peaks).amax(0), torch.cat([part for _, part in rows]), tie, channels)
