"""What becomes of every tensor of the original: quantized, kept as it is for a reason, or copied."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..models.by_name import ByName
from ..models.placed_model import LinearLayer
from ..models.skeleton import Skeleton
from ..numbers.types import Grid

LEAST = 0.9  # share of the blocks' weights under which a plan warns


def share_of_linears(skeleton: Skeleton, linears: list[LinearLayer]) -> float:
    """The share of the weights of the blocks' matrices that is in linear layers."""
    inside = sum(x.out_features * x.in_features for x in linears)
    return inside / max(1, inside + sum(n for _, n, _ in skeleton.left_out()))


def account(
    skeleton: Skeleton, linears: list[LinearLayer], towers: Mapping[str, Grid], displaced: Sequence[str] = ()
) -> tuple[str, ...]:
    """Lines on all that no recipe quantizes, like layers together. Routers are only mentioned where they are many.

    towers: the grids of what is quantized in a multimodal model's towers, by on-disk name. displaced: tensors that
    are of no part of the model, and whose names those of the artifact take.
    """
    if isinstance(skeleton, ByName):
        return tuple(skeleton.about())
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, n, why in skeleton.left_out():
        groups.setdefault((re.sub(r"\d+", "*", name), why), []).append((name, n))
    lines, kind = [], skeleton.config.model_type
    share = share_of_linears(skeleton, linears)
    if share < LEAST:
        lines.append(f"only {share:.0%} of the blocks' weights are in layers that can be quantized")
    for (pattern, why), found in groups.items():
        if share < LEAST or not why.startswith("it chooses"):
            lines.append(f"{pattern} stays in 16 bit ({len(found)} tensors, {sum(n for _, n in found)} weights): {why}")
    lines += _towers(skeleton, towers)
    if beyond := [name for name in skeleton.unused if name not in displaced]:
        more = f" and {len(beyond) - 1} more" if beyond[1:] else ""
        lines.append(f"{beyond[0]}{more}: transformers' {kind} has no place for this; copied as it is")
    for name in displaced[:1]:
        more = f" and {len(displaced) - 1} more" if displaced[1:] else ""
        lines.append(f"{name}{more}: left out, the artifact needs the name; transformers' {kind} has no place for this")
    return tuple(lines)


def _towers(skeleton: Skeleton, quantized: Mapping[str, Grid]) -> list[str]:
    """What becomes of a multimodal model's towers, and what the figures do not tell of it."""
    towers = skeleton.tower_tensors()
    if not towers:
        return []
    shared = next(iter(skeleton.block_names(0).values())).split(".")[0]  # with the text decoder
    parts = dict.fromkeys(".".join(name.split(".")[: 1 + name.startswith(f"{shared}.")]) for name in towers)
    names, all_of_it = ", ".join(parts), f"({len(towers)} tensors, {sum(towers.values())} weights)"
    what = f"copied as it is {all_of_it}, since text does not pass through it"
    if quantized:
        taken = sum(towers[f"{name}.weight"] for name in quantized)
        grid = next(iter(quantized.values()))
        what = f"{len(quantized)} linears ({taken} weights) rounded to the nearest {grid}, the rest copied {all_of_it}"
    return [
        f"{names}: beside the text decoder, {what}",
        "a multimodal model, calibrated and evaluated on text alone: no figure says how it answers on images or sound",
    ]


def quantized_share(skeleton: Skeleton, linears: list[LinearLayer], quantized: set[str]) -> float:
    """The share of the weights of the blocks' matrices that will be quantized. quantized: linears, by on-disk name."""
    taken = sum(x.out_features * x.in_features for x in linears if x.name in quantized)
    inside = sum(x.out_features * x.in_features for x in linears)
    return taken / max(1, inside + sum(n for _, n, _ in skeleton.left_out()))


def few(skeleton: Skeleton, linears: list[LinearLayer], names: Sequence[str]) -> bool:
    """Whether the linears `names`, all together, are so small a share of the blocks that they may stay in 16 bit."""
    return quantized_share(skeleton, linears, {x.name for x in linears} - set(names)) >= LEAST * (
        share_of_linears(skeleton, linears)
    )


def left_for_transformers(skeleton: Skeleton, linears: list[LinearLayer], reached: Mapping[str, str]) -> Iterator[str]:
    """Lines on linears that stay so that transformers loads the rest, like layers together.

    reached: the class that reaches for their weights, by on-disk name.
    """
    share = quantized_share(skeleton, linears, {x.name for x in linears} - set(reached)) if reached else 1.0
    alike = Counter((re.sub(r"\d+", "*", name), kind) for name, kind in reached.items())
    for (pattern, kind), n in alike.items():
        yield (
            f"{pattern} stays in 16 bit ({n} tensors), so that transformers loads the rest, {share:.0%} of the "
            f"blocks' weights: before 5.24 it initialises its {kind} through this weight; for a server that loads all, "
            "name it: --set targets=[vllm]"
        )


def left_for_their_width(linears: list[LinearLayer], names: Sequence[str], grid: Grid) -> Iterator[str]:
    """Lines on linears that `grid` does not divide, like layers together."""
    alike = Counter((re.sub(r"\d+", "*", x.name), x.in_features) for x in linears if x.name in names)
    for (pattern, width), n in alike.items():
        yield (
            f"{pattern} stays in 16 bit ({n} tensors): its in_features {width} is not a multiple of group_size "
            f"{grid.columns(width)}; `overrides` can give it one that divides"
        )
