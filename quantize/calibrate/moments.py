"""The second moments of a linear's inputs, summed over rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..core.ranks import ALONE, Ranks
from ..methods.layer_error import output_power, output_powers
from ..methods.symmetric_products import panels
from .picked_rows import column_squares, missed_squares, sampled_rows

_WHOLE = 2048  # columns up to which a GPU makes a symmetric product in one launch: those of experts are many
_ROWS = 4096  # of fewer rows one of any size
_PANEL = 1024  # columns of a larger one that it multiplies at a time: fewer leave it partly idle
_PANELS = 4, 16  # at most, up to _WIDE columns and beyond: a panel is a launch, and of wide matrices a small part
_WIDE = 8192
_TOGETHER = 1 << 26  # weights or squares of experts that are multiplied at once
_COPIED = 1 << 13  # the most columns of a symmetric matrix of which a copy is made to mirror it


class Moments:
    """Sums over rows of a linear's inputs X and of D = X0 - X: X^T X, D^T X (the drift) and D^T D.

    Of all processes of a run: each adds the rows of its lane, `end_lanes` joins them, `finish` ends it. like: a tensor
    of the device. width: columns of X. paired: whether there may be a D. diagonal: only X^T X, and its diagonal only.
    weights W [out, in]: of the original's linears; if given, W D^T X and ||D w||^2 of their rows are summed up in the
    place of the drift and of D^T D where that is less work. outputs: X0 W^T is given in the place of X0, of one weight.
    """

    def __init__(
        self,
        like: Tensor,
        width: int,
        *,
        paired: bool = False,
        diagonal: bool = False,
        weights: Sequence[Tensor] = (),
        outputs: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._like, self._diagonal, self.outputs, self._ranks = like, diagonal, outputs, ranks
        rows = sum(map(len, weights))
        self._weights = tuple(weights) if outputs or sums_by_rows(rows, width) else ()
        compared = ("moved", "powers") if self._weights else ("drift", "squares")
        self._names = ("moment", *compared) if paired and not diagonal else ("moment",)
        self._shapes = dict.fromkeys(self._names, (width,) if diagonal else (width, width))
        self._shapes |= {"moved": (rows, width), "powers": (rows,)}
        self._lane: dict[str, Tensor] = {}  # X^T X and D^T D: their upper triangles
        self._sums: dict[str, Tensor] = {}
        self._at_once = False
        self.tokens, self.unmatched = 0, False

    def begin_lane(self, batches: int) -> None:
        """A lane of so many batches follows.

        A GPU that is alone adds the product of its only batch to the sums at once. It rounds such a product before it
        adds it, so that the bits are those of a lane by itself.
        """
        self._at_once = batches == 1 and self._ranks.size == 1

    def add(self, seen: Tensor, original: Tensor | None) -> None:
        """Add rows of X [tokens, in] in the model's dtype, and the same rows of X0, or of X0 W^T."""
        if self._diagonal:
            self._of_lane("moment").add_(column_squares(seen))
            return
        self._add("moment", seen, seen)
        if original is None:
            return
        if self.outputs:
            self._add("moved", original, seen)  # D^T X is what this is beyond W X^T X, see `finish`
            self._of_lane("powers").add_(missed_squares(original, seen, self._weights[0]))
            return
        # The difference is small: bfloat16's 8 bits of it are enough, at twice the speed.
        factor = seen if seen.dtype == torch.bfloat16 else seen.to(torch.float32)
        difference = original - factor
        if self._weights:
            each = [difference @ weight.to(difference.dtype).T for weight in self._weights]
            outputs = each[0] if len(each) == 1 else torch.cat(each, 1)
            self._add("moved", outputs, factor)
            self._of_lane("powers").add_(column_squares(outputs))
            return
        self._add("drift", difference, factor)
        some = sampled_rows(difference) if _sums_in_float32(difference.device, difference.dtype) else difference
        self._add("squares", some, some)

    def _add(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add left^T right to the lane's sum."""
        as_they_are = _sums_in_float32(left.device, left.dtype)
        sums = self._sums if self._at_once else self._lane
        first = name not in sums
        if as_they_are and (len(left) or not first):
            if first:  # no zeros to be written and read
                sums[name] = self._like.new_empty(self._shapes[name], dtype=torch.float32)
            _add_16_bit(sums[name], left, right, first=first)
        elif name == "moment" or as_they_are or left.is_cuda:  # errors are small differences of it
            add_product(self._of_lane(name), left, right)
        else:
            _add_of_differences(self._of_lane(name), left, right)

    def count(self, x: Tensor, *, unmatched: bool) -> None:
        """Count a batch x [tokens, in] whose rows have been added."""
        self.tokens += x.shape[0]
        self.unmatched |= unmatched

    def finish(self, tokens: int, unmatched: bool) -> None:
        """No more rows come. tokens, unmatched: of all processes."""
        self.tokens, self.unmatched = tokens, unmatched
        self._lane.clear()
        if not tokens:
            self._sums.clear()
        self._sums = {name: self._ranks.whole(part, self._shapes[name][0]) for name, part in self._sums.items()}
        if "moment" in self._sums and not self._diagonal:
            _whole(self._sums["moment"])
        if self.outputs and "moved" in self._sums:
            _subtract_product(self._sums["moved"], self._weights[0], self._sums["moment"])

    @property
    def drift(self) -> Tensor | None:
        """D^T X [in, in]; None when no row of D has passed, or where `moved` takes its place."""
        return self._sums.get("drift")

    @property
    def compared(self) -> bool:
        """Whether a row of D has passed."""
        return not self._sums.keys().isdisjoint(("drift", "moved"))

    @property
    def moved(self) -> Sequence[Tensor]:
        """W D^T X [out, in] of each of the weights; empty where the drift is summed up."""
        return _split(self._sums["moved"], self._weights) if "moved" in self._sums else ()

    def moment(self) -> Tensor | None:
        """X^T X [in, in], or its diagonal [in]; None when no row has passed."""
        return self._sums.get("moment")

    def _of_lane(self, name: str) -> Tensor:
        if name not in self._lane:
            self._lane[name] = self._like.new_zeros(self._shapes[name], dtype=torch.float32)
        return self._lane[name]


def sums_by_rows(rows: int, width: int) -> bool:
    """Whether W D^T X and ||D w||^2 of all rows of weights [rows, width] are less work than D^T X and D^T D.

    A token takes 4 rows width operations for those, and 3 width^2 for these: of D^T D half is computed.
    """
    return 0 < 4 * rows < 3 * width


def sums_by_outputs(weight: Tensor) -> bool:
    """Whether W D^T X of the rows of a weight W [out, in] of the original is best had from X0 W^T, which the original
    computes anyway: 2 rows width operations for a token, in the place of 3 width^2 or of 4 rows width.
    """
    rows, width = weight.shape
    return rows <= width and weight.dtype == torch.bfloat16 and _sums_in_float32(weight.device, weight.dtype)


def end_lanes(sums: Sequence[Moments], holders: int) -> None:
    """Add the lane of this process, and those of the others, to each of `sums`; the first `holders` processes have one.

    In two launches for all of them where a process is alone.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for one in sums:
        if one._ranks.size > 1:
            for name in one._names:
                lane = one._of_lane(name)
                one._sums[name] = one._ranks.add(one._sums.get(name), lane, holders)
                lane.zero_()
            continue
        for name, lane in list(one._lane.items()):
            if name in one._sums:
                pairs.append((one._sums[name], lane))
            else:
                one._sums[name] = one._lane.pop(name)
        if one._like.is_cuda:
            one._lane.clear()  # the next product needs no zeros
    if pairs:
        totals, lanes = ([pair[i] for pair in pairs] for i in (0, 1))
        torch._foreach_add_(totals, lanes)
        if not totals[0].is_cuda:
            torch._foreach_zero_(lanes)


def drift_powers(
    weights: Sequence[Sequence[Tensor]], sums: Sequence[Moments], *, together: bool
) -> list[Sequence[Tensor]]:
    """||D w||^2 of each row of the linears that share an input, by input and linear; weights [out, in] likewise.

    together: in few products, on a GPU.
    """
    powers: list[Sequence[Tensor]] = [() for _ in sums]
    alike: dict[object, list[int]] = {}
    for i, (own, one) in enumerate(zip(weights, sums, strict=True)):
        if "powers" in one._sums:
            powers[i] = _split(one._sums["powers"], own)
        elif together:
            alike.setdefault(tuple(weight.shape for weight in own), []).append(i)
        else:
            squares = _whole(one._sums["squares"])
            powers[i] = [output_power(weight.to(torch.float32), squares) for weight in own]
    for places in alike.values():
        width, rows = weights[places[0]][0].shape[1], sum(map(len, weights[places[0]]))
        step = max(1, _TOGETHER // (width * max(width, rows)))
        for some in (places[start : start + step] for start in range(0, len(places), step)):
            found = [sums[i]._sums["squares"] for i in some]
            squares = _whole(found[0][None] if len(found) == 1 else torch.stack(found))
            weight = torch.cat([weight for i in some for weight in weights[i]]).to(torch.float32)
            for i, power in zip(some, output_powers(weight.view(len(some), rows, width), squares), strict=True):
                powers[i] = _split(power, weights[i])
    return powers


def _split(power: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of each of the weights."""
    return torch.split(power, [len(weight) for weight in weights])


def _whole(upper: Tensor) -> Tensor:
    """The symmetric matrices [..., in, in] with these upper triangles; made in place."""
    if upper.shape[-1] <= _COPIED:
        return upper.triu_().add_(upper.triu(1).mT)
    for part in panels(upper.shape[-1]):
        here = upper[..., part, part]
        here.copy_(here.triu() + here.triu(1).mT)
        rest = slice(part.stop, None)
        upper[..., rest, part].copy_(upper[..., part, rest].mT)
    return upper


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to `total` [in, in] float32, for rows [tokens, in]; of a symmetric product only the upper
    triangle, below which `total` is undefined.

    Factors of 16 bits are multiplied exactly, and their products summed in float32. A GPU takes them as they are.
    """
    if _sums_in_float32(left.device, left.dtype):
        _add_16_bit(total, left, right, first=False)
        return
    with exact_products(left.dtype):
        if left is right:
            add_second_moment(total, left.to(torch.float32))
        else:
            total.addmm_(left.to(torch.float32).T, right.to(torch.float32))


def _add_of_differences(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`add_product` on a CPU where bfloat16's 8 bits of each product are enough, at twice the speed."""
    if left is not right:
        total.add_(left.T @ right)
    elif left.dtype == torch.bfloat16:
        for part in panels(len(total)):
            total[part, part.start :].add_(left[:, part].T @ left[:, part.start :])
    else:
        add_product(total, left, right)


def _subtract_product(total: Tensor, weight: Tensor, moment: Tensor) -> None:
    """Subtract W H from `total` [out, in] float32, for weight = W [out, in] in 16 bits and moment = H [in, in] float32.

    Each number of H is taken as the sum of two in 16 bits, whose products are exact.
    """
    minus = weight.neg()
    for part in panels(weight.shape[1]):
        high = moment[part].to(weight.dtype)
        low = torch.sub(moment[part], high, out=torch.empty_like(high))
        for one in (high, low):
            torch.addmm(total, minus[:, part], one, out_dtype=torch.float32, out=total)


def _add_16_bit(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """`add_product` as a GPU does it best; on the first call `total` may hold anything."""
    columns = total.shape[1]
    parted = left is right and columns > _WHOLE and len(left) >= _ROWS
    width = max(_PANEL, -(-columns // _PANELS[columns > _WIDE])) if parted else columns
    for start in range(0, columns, width):
        part, rest = slice(start, start + width) if left is right else slice(None), slice(start, None)
        into = total[part, rest]
        if first:
            torch.mm(left[:, part].T, right[:, rest], out_dtype=torch.float32, out=into)
        else:
            torch.addmm(into, left[:, part].T, right[:, rest], out_dtype=torch.float32, out=into)


@cache
def _sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU multiplies values of 16 bits as they are and sums up in float32, into a part of a matrix: tried
    once, on whole numbers, of which every product and sum is exact.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    numbers = torch.arange(512 * 96, device=device).reshape(512, 96) * 7 % 31 - 15
    rows, total = numbers.to(dtype), torch.zeros(128, 192, device=device)
    wanted, part = total.double(), total[:96, 96:]
    wanted[:96, 96:] = 2 * (numbers.double().T @ numbers.double())
    try:
        torch.mm(rows.T, rows, out_dtype=torch.float32, out=part)
        torch.addmm(part, rows.T, rows, out_dtype=torch.float32, out=part)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(total.double(), wanted)


def add_second_moment(total: Tensor, rows: Tensor) -> None:
    """Add X^T X to the upper triangle of `total` [in, in] for X = rows [tokens, in] float32; below it, undefined."""
    if rows.device.type != "cpu":
        total.addmm_(rows.T, rows)
        return
    for part in panels(rows.shape[1]):
        total[part, part.start :].addmm_(rows[:, part].T, rows[:, part.start :])


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 matrices whose values came from `dtype` use faster units that multiply them exactly.

    AMX's bfloat16 and TF32 represent bfloat16 values exactly, TF32 also float16 values; sums stay float32.
    """
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    gpu: Any = torch.backends.cuda.matmul
    before = cpu.fp32_precision, gpu.fp32_precision
    if dtype == torch.bfloat16:
        cpu.fp32_precision = "bf16"
    if dtype in (torch.bfloat16, torch.float16):
        gpu.fp32_precision = "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before
