"""Whether transformers can join the tensors of compressed-tensors files that are one parameter in its classes."""

from collections.abc import Mapping

from ..formats.layouts import WORDS, layout_of
from ..models.loading import keeps_modules
from ..models.skeleton import Skeleton
from ..numbers.types import Activations, Grid


def why_not_joined(skeleton: Skeleton, schemes: Mapping[str, Grid | None], inputs: Activations | None) -> str | None:
    """Why transformers cannot load compressed-tensors files with these linears, by on-disk name; None where it can.

    It decompresses the weights of experts before it joins them, from 5.24 on of all that it joins, and takes them all
    for the one kind: others stop it, go lost or are read wrongly (its `DecompressExperts`).
    """
    quantized = {f"{name}.weight": grid for name, grid in schemes.items() if grid is not None}
    plain_go_lost = any(grid.type == "int" or grid.bits < 8 for grid in quantized.values())
    for name, sources in skeleton.joined(quantized).items():
        weights = [source.removesuffix("$").endswith(".weight") for source in sources]
        if not (all(weights) if keeps_modules() else any(weights) and all("experts" in source for source in sources)):
            continue
        grid = quantized.get(name)
        if grid is None and plain_go_lost and name.endswith(".weight"):
            return f"{name} is not quantized, and what it joins to one tensor it takes for quantized like the rest"
        if grid is not None and layout_of(grid, inputs) != WORDS and grid.type not in ("fp8", "mxfp4"):
            return f"it has no way to read experts of {grid}{' with int8 inputs' if grid.type == 'int' else ''}"
    return None
