"""An artifact against the model it was made from: weights within what rounding loses, all else bit for bit.

What transforms did before is undone: rotations by the manifest's seed, scales of AWQ and SmoothQuant by the norms that
they were folded into, or where a linear took them by the rows of that linear.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from quantpress.artifact.artifact import Artifact
from quantpress.artifact.manifest import Manifest, own_manifest
from quantpress.artifact.original import OriginalCheckpoint
from quantpress.core.errors import BadInput
from quantpress.engine.transforms import Link, links_of, source_channels
from quantpress.models.placed_model import LinearLayer
from quantpress.models.rotated_checkpoint import RotatedCheckpoint
from quantpress.models.skeleton import Skeleton

from .gaps import Gap, gap
from .tensors import at_once, model_of

_UNDONE = 2.0**-6  # of values in 16 bit from which a scale has been taken back
_MOST = 2e4  # a transform's scale is within 1e-4 and 1e4
# What a linear may lose of its power as a whole, in a row and in a group: times what rounding to nearest loses, plus a
# constant, plus a share of the error in the manifest, at most. A calibrated method moves weights on purpose.
_NEAREST = ((3.0, 1e-6, 0.0, 0.5), (8.0, 1e-6, 0.0, 0.6), (14.0, 1e-6, 0.0, 0.9))
_CALIBRATED = ((3.0, 0.1, 0.5, 0.7), (4.0, 0.55, 1.0, 0.95), (15.0, 0.6, 1.0, 4.0))
_STRETCHED = (0.06, 2.0)  # how far columns may be longer or shorter: a constant, and times what rounding loses
_LONGER = (0.15, 1.5)  # how far a weight as a whole may be longer or shorter; methods clip and shrink by less
# How much shorter besides, times its recorded error and error correction's strength: of inputs that have nothing of the
# original's left a strength of 0.5 halves the weight, with an error of 1.25.
_SHORTER = 0.9
_NO_GROUPS = 2  # bits at which a calibrated method may leave any value in a group


@dataclass(frozen=True)
class _Pair:
    """The original and the artifact as readers of one model's tensors; one tensor of each is read at a time."""

    original: Skeleton
    artifact: Skeleton
    stored: Artifact
    lock: Lock = field(default_factory=Lock)

    def before(self, name: str) -> Tensor:
        with self.lock:  # its reader keeps what it has just read
            return self.original.reader.read(name)

    def after(self, name: str) -> Tensor:
        return self.artifact.reader.read(name)

    def names(self) -> Iterator[tuple[str, str, str]]:
        """Each parameter and saved buffer: in the model, on disk in the original, on disk in the artifact."""
        after = self.artifact.places()
        for name, disk in self.original.places().items():
            if name in after:
                yield name, disk, after[name]


@dataclass
class _Scales:
    """What transforms multiplied weights with: of linears by columns [in] and by rows [out], of all else as noted.

    moved: tensors, by their names in the original, that were changed in 16 bit, each with what undoes it. norms: those
    that the scales are read from.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, Tensor] = field(default_factory=dict)
    norms: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def tensor_problems(folder: Path, original: Path) -> tuple[list[str], dict[str, Gap]]:
    """A line for each tensor of an artifact that is not the original's, and how far each linear is from it."""
    manifest = own_manifest(folder)
    pair = _opened(folder, original, manifest)
    linears = {x.name: x for x in pair.original.linears()}
    scales = _transformed(pair, manifest, linears)
    found = list(scales.problems)
    gaps: dict[str, Gap] = {}
    quantized = [x for x in linears.values() if x.name in pair.stored.linears]
    for linear, one in zip(quantized, at_once(lambda x: _gap(pair, x, scales), quantized), strict=True):
        if isinstance(one, str):
            found.append(one)
        else:
            gaps[linear.name] = one
    found += _too_far(pair, gaps, scales, manifest)
    plain = [names for names in pair.names() if names[2].removesuffix(".weight") not in pair.stored.linears]
    found += filter(None, at_once(lambda names: _unlike(pair, names[1], names[2], scales), plain))
    found += _beyond(pair)
    return found, gaps


def _opened(folder: Path, original: Path, manifest: Manifest | None) -> _Pair:
    reader = rotated(OriginalCheckpoint(original), manifest)
    artifact = Artifact(folder)
    taken = artifact.linears
    pair = _Pair(model_of(reader, original, taken), model_of(artifact, folder, taken), artifact)
    artifact.transposed = frozenset(x.name for x in pair.artifact.linears() if x.transposed)
    return pair


def rotated(checkpoint: OriginalCheckpoint, manifest: Manifest | None) -> OriginalCheckpoint | RotatedCheckpoint:
    """The original, turned as it is read where the manifest's recipe says so."""
    transforms = (manifest.recipe.get("transforms") or ()) if manifest is not None else ()
    if transforms and transforms[0].get("name") == "hadamard":
        return RotatedCheckpoint(checkpoint, int(transforms[0].get("seed", 0)))
    return checkpoint


def _oriented(weight: Tensor, linear: LinearLayer) -> Tensor:
    """A linear's weight as [out, in]."""
    return weight.T if linear.transposed else weight


def _gap(pair: _Pair, linear: LinearLayer, scales: _Scales) -> Gap | str:
    weight = _oriented(pair.before(f"{linear.name}.weight"), linear)
    try:
        q = pair.stored.linear(linear.name)
    except BadInput as error:
        return str(error)
    if (q.out_features, q.in_features) != tuple(weight.shape):
        return f"{linear.name}: stored as {[q.out_features, q.in_features]}, and the original has {list(weight.shape)}"
    return gap(q, weight, scales.columns.get(linear.name), scales.rows.get(linear.name))


def _too_far(pair: _Pair, gaps: Mapping[str, Gap], scales: _Scales, manifest: Manifest | None) -> Iterator[str]:
    """Linears that lost more than their grid loses, as a whole, in a row or in a group."""
    records = {} if manifest is None else {layer.name: layer for layer in manifest.layers}
    settings = {} if manifest is None else manifest.recipe.get("method") or {}
    method, strength = str(settings.get("name")), float(settings.get("error_correction") or 0.0)
    for name, one in gaps.items():
        grid, record = pair.stored.linears[name], records.get(name)
        nearest = method == "rtn" and name not in scales.columns and name not in scales.rows
        own = 0.0 if record is None or record.relative_error is None else record.relative_error
        bounds = _NEAREST if nearest else _CALIBRATED
        allowed = [min(most, times * one.nearest + slack + own * part) for times, slack, part, most in bounds]
        groups = nearest or grid.bits > _NO_GROUPS
        found = [one.whole, one.worst_row, one.worst_group if groups else 0.0]
        for what, value, bound in zip(("", f"in row {one.row}, ", f"in group {one.group} of a row, "), found, allowed,
                                      strict=True):  # fmt: skip
            if value > bound:
                yield (
                    f"{name}: {what}its weights are off the original's by {value:.3g} of their power, and {grid} "
                    f"would lose {one.nearest:.2g} to the nearest: they are not that weight's"
                )
                break
        else:
            most = _LONGER[0] + _LONGER[1] * one.nearest
            if not -most - _SHORTER * strength * own <= one.length - 1 <= most:
                yield f"{name}: its weights are {one.length:.3g} times the original's: its scales are not its own"
            if one.columns > _STRETCHED[0] + _STRETCHED[1] * one.nearest:
                yield (
                    f"{name}: its columns are {one.columns:.0%} off the original's, as what is before them was "
                    "scaled: the two do not belong together"
                )


def _unlike(pair: _Pair, before: str, after: str, scales: _Scales) -> str | None:
    """What differs between a tensor that is not quantized and the original's; None when nothing does."""
    wanted, found = pair.before(before), pair.after(after)
    if wanted.shape != found.shape:
        return f"{after}: shape {list(found.shape)}, and the original has {list(wanted.shape)}"
    if before in scales.norms:
        return None
    if before in scales.moved:
        back, wide = found.float() * scales.moved[before], wanted.float()
        if bool(((back - wide).abs() <= _UNDONE * wide.abs() + 1e-6 * wide.abs().max()).all()):
            return None
        return f"{after} is not the original's, scaled as the linears beside it are"
    if wanted.dtype == found.dtype and torch.equal(_bits(wanted), _bits(found)):
        return None
    if torch.equal(wanted.float(), found.float()):
        return None
    off = (wanted.float() != found.float()) | found.float().isnan()
    return f"{after} is not the original's: {int(off.sum())} of {off.numel()} values differ"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _beyond(pair: _Pair) -> Iterator[str]:
    """Tensors that only one of the two has."""
    ours, theirs = set(pair.artifact.unused), set(pair.original.unused)
    for name in sorted(theirs - ours):
        yield f"{name}, which the original has, is absent"
    for name in sorted(ours & theirs):
        if not torch.equal(_bits(pair.before(name)), _bits(pair.after(name))):
            yield f"{name} is not the original's"


def _transformed(pair: _Pair, manifest: Manifest | None, linears: Mapping[str, LinearLayer]) -> _Scales:
    """The scales that the manifest says were folded in, as the artifact's own tensors show them."""
    scales = _Scales()
    if manifest is None:
        return scales
    skeleton = pair.original
    folded = {(record.block, record.feed) for record in manifest.transforms if record.strength is not None}
    for k in sorted({block for block, _ in folded}):
        block, names = skeleton.block(k), skeleton.block_names(k)
        found = [
            link
            for link in links_of(block, skeleton.family.feeds)
            if (k, names.get(f"{link.source}.weight", "").removesuffix(".weight")) in folded
        ]
        norms = [link for link in found if not _is_linear(linears, names, link)]
        for link in norms:
            _of_norm(pair, names, link, linears, scales)
        for link in found:
            if link not in norms:
                channels = source_channels(block, link, skeleton.config, torch.device("cpu"))
                _of_linear(pair, names, link, linears, scales, channels)
    return scales


def _is_linear(linears: Mapping[str, LinearLayer], names: Mapping[str, str], link: Link) -> bool:
    return names[f"{link.source}.weight"].removesuffix(".weight") in linears


def _of_norm(
    pair: _Pair, names: Mapping[str, str], link: Link, linears: Mapping[str, LinearLayer], scales: _Scales
) -> None:
    """The scale that a norm's weight was divided by: what it feeds was multiplied by exactly that."""
    disk = names[f"{link.source}.weight"]
    one = 1.0 if link.feed.plus_one else 0.0
    before, after = pair.before(disk).float() + one, pair.after(disk).float() + one
    scale = torch.where(before == after, torch.ones_like(before), before / after)
    if not bool(((scale > 1 / _MOST) & (scale < _MOST)).all()):
        scales.problems.append(f"{disk} is not the original's divided by positive scales, as a transform leaves it")
        scale = torch.where((scale > 1 / _MOST) & (scale < _MOST), scale, torch.ones_like(scale))
    scales.norms.add(disk)
    if (bias := names.get(f"{link.source}.bias")) is not None:
        scales.moved[bias] = scale
    _multiplied(names, link, linears, scales, scale)


def _of_linear(
    pair: _Pair, names: Mapping[str, str], link: Link, linears: Mapping[str, LinearLayer], scales: _Scales,
    channels: Tensor,
) -> None:  # fmt: skip
    """The scale that the last rows of a linear were divided by, as far as its rounded weight shows it."""
    disk = names[f"{link.source}.weight"]
    name = disk.removesuffix(".weight")
    linear, n = linears[name], int(channels.max()) + 1
    before = _oriented(pair.before(disk), linear).float()
    stored = pair.stored.linear(name).dequantize() if name in pair.stored.linears else pair.after(disk).float()
    if name not in pair.stored.linears:
        stored = _oriented(stored, linear)
    if name in scales.columns:
        stored = stored / scales.columns[name]
    power = before.square().sum(1)
    rows = torch.where(power > 0, (stored * before).sum(1) / power, torch.ones_like(power))
    if not bool(((rows > 1 / _MOST) & (rows < _MOST))[-n:].all()):
        scales.problems.append(f"{disk} is not the original's with rows divided by positive scales")
        rows = torch.where((rows > 1 / _MOST) & (rows < _MOST), rows, torch.ones_like(rows))
    rows[:-n] = 1
    scales.rows[name] = rows
    undo = (1 / rows) if linear.transposed else (1 / rows)[:, None]
    scales.moved[disk] = scales.moved[disk] * undo if disk in scales.moved else undo
    if (bias := names.get(f"{link.source}.bias")) is not None:
        scales.moved[bias] = 1 / rows
    _multiplied(names, link, linears, scales, (1 / rows[-n:])[channels])


def _multiplied(
    names: Mapping[str, str], link: Link, linears: Mapping[str, LinearLayer], scales: _Scales, scale: Tensor
) -> None:
    """Note that the columns of what a link leads into were multiplied by `scale` [in]."""
    for into in link.into:
        disk = names[f"{into}.weight"]
        name = disk.removesuffix(".weight")
        scales.columns[name] = scales.columns[name] * scale if name in scales.columns else scale
        transposed = name in linears and linears[name].transposed
        scales.moved[disk] = 1 / (scale[:, None] if transposed else scale)
