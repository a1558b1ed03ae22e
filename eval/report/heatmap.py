"""The output errors of the layers by kind and block, and the colours that stand for them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from quantpress.artifact.manifest import LayerRecord

LIGHT = ("#fbefd0", "#f8dca2", "#f4c272", "#eea356", "#e2814b", "#cd6049", "#ab4450", "#832f55", "#571f4f")
DARK = ("#372634", "#4d2c40", "#6b3448", "#8c3f4a", "#ad514a", "#cb694a", "#e38a4f", "#f2b269", "#fbe0a0")
LEVELS = len(LIGHT)
_KINDS = ("qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down")  # the order rows are drawn in
# What a layer's relative error is, by the manifest's error_measure; methods/layer_error.py has the formula.
MEASURES = {
    "output_accumulated": "the squared error of its output on the calibration text, with that of the layers before it, "
    "as a share of the original model's squared output at the same place",
    "output_local": "the squared error of its output on the calibration text, given the layers already rounded before "
    "it, as a share of the squared output of the original layer on the same inputs",
    "weight_by_importance": "the squared error of its weights, columns weighted by the importance matrix, as a share "
    "of the squared weights weighted alike",
    "weight": "the squared error of its weights as a share of the squared weights; no text was run through the model",
}
_BY_OTHERS = "its relative error, as the version of quantpress that made the artifact measured it"


@dataclass(frozen=True)
class Cell:
    """The linears of one kind in one block: one, or all experts."""

    kind: str
    block: int
    layers: tuple[LayerRecord, ...]

    @property
    def worst(self) -> float | None:
        return max((e for layer in self.layers if (e := layer.relative_error) is not None), default=None)

    @property
    def median(self) -> float | None:
        errors = [e for layer in self.layers if (e := layer.relative_error) is not None]
        return statistics.median(errors) if errors else None

    @property
    def quantized(self) -> bool:
        return any(layer.bits < 16 for layer in self.layers)

    @property
    def scheme(self) -> str:
        return ", ".join(dict.fromkeys(layer.scheme for layer in self.layers))

    @property
    def note(self) -> str:
        return "; ".join(dict.fromkeys(layer.note for layer in self.layers if layer.note))


@dataclass(frozen=True)
class Heat:
    """Cells by kind (rows) and block (columns); outside: linears that belong to no block."""

    kinds: tuple[str, ...]
    blocks: tuple[int, ...]
    cells: tuple[Cell, ...]
    outside: tuple[LayerRecord, ...]

    @property
    def experts(self) -> bool:
        """Whether a cell stands for several layers."""
        return any(len(cell.layers) > 1 for cell in self.cells)

    def of(self, kind: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == kind]

    def worst(self, most: int = 10) -> list[Cell]:
        """The cells with the largest error, worst first."""
        known = [cell for cell in self.cells if cell.worst is not None]
        return sorted(known, key=lambda c: -(c.worst or 0.0))[:most]


@dataclass(frozen=True)
class HeatScale:
    """A logarithmic colour scale of LEVELS steps, at least one decade wide."""

    low: float
    high: float

    @classmethod
    def of(cls, heats: Sequence[Heat]) -> "HeatScale | None":
        errors = [e for heat in heats for cell in heat.cells if (e := cell.worst) is not None and 0 < e < math.inf]
        if not errors:
            return None
        low, high = math.log10(min(errors)), math.log10(max(errors))
        spare = max(0.0, 1.0 - (high - low)) / 2
        return cls(10 ** (low - spare), 10 ** (high + spare))

    def level(self, error: float) -> int:
        """The index of an error's colour in LIGHT and DARK."""
        if not error > 0:
            return 0
        step = math.log(error / self.low) / math.log(self.high / self.low) * LEVELS if error < math.inf else LEVELS
        return min(LEVELS - 1, max(0, math.floor(step)))

    def edges(self) -> list[float]:
        """The LEVELS + 1 errors at which the colour changes."""
        return [self.low * (self.high / self.low) ** (i / LEVELS) for i in range(LEVELS + 1)]


def measure_in_words(error_measure: str | None) -> str:
    """What the cells show, in words, for a run's error_measure; artifacts of other versions may have another one."""
    return _BY_OTHERS if error_measure is None else MEASURES.get(error_measure, _BY_OTHERS)


def heat(linears: Sequence[LayerRecord]) -> Heat:
    """Group linears by kind and block; the experts of a block share a cell."""
    paths: dict[tuple[str, int], list[LayerRecord]] = {}
    for linear in linears:
        if linear.block is not None and linear.block >= 0:
            paths.setdefault((_path(linear.name, linear.block), linear.block), []).append(linear)
    short = _short_names(list(dict.fromkeys(path for path, _ in paths)))
    order = {kind: i for i, kind in enumerate(_KINDS)}
    kinds = sorted(dict.fromkeys(short.values()), key=lambda k: order.get(k, len(order)))
    cells = [Cell(short[path], block, tuple(group)) for (path, block), group in paths.items()]
    cells.sort(key=lambda c: (kinds.index(c.kind), c.block))
    outside = tuple(linear for linear in linears if linear.block is None or linear.block < 0)
    return Heat(tuple(kinds), tuple(sorted({c.block for c in cells})), tuple(cells), outside)


def _path(name: str, block: int) -> str:
    """`model.layers.3.mlp.experts.7.up_proj` in block 3 is `mlp.experts.up_proj`."""
    parts = name.split(".")
    inner = parts[parts.index(str(block)) + 1 :] if str(block) in parts else parts
    return ".".join(part for part in inner if not part.isdigit()) or name


def _short_names(paths: list[str]) -> dict[str, str]:
    """The shortest unique suffix of each path, without `_proj` where the rest is a known kind."""
    out: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        for n in range(1, len(parts) + 1):
            tail = [_stem(part) for part in parts[-n:]]
            if sum([_stem(part) for part in other.split(".")[-n:]] == tail for other in paths) == 1:
                break
        out[path] = " ".join(tail)
    return out


def _stem(part: str) -> str:
    return part.removesuffix("_proj") if part.removesuffix("_proj") in _KINDS else part
