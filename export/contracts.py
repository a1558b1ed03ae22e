"""What a server's loader refuses, said before the work. Measured on vLLM 0.32 and read from the formats' sources."""

from collections.abc import Mapping, Sequence

from quantpress.quantize.recipe import Grid

_GPTQ_GROUPS = (-1, 32, 64, 128)
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def servability(
    formats: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, Grid | None],
    *,
    shuffled: bool,
) -> list[str]:
    """One line for each thing that would keep a server from loading the artifact.

    shapes {name: (out, in)}; schemes: the grid of each linear, None where it stays in 16 bit.
    """
    grids = sorted({grid for grid in schemes.values() if grid is not None}, key=str)
    found: list[str] = []
    if "gptq" in formats:
        if any(not grid.symmetric for grid in grids):
            found.append("vLLM refuses asymmetric GPTQ files: set weights.symmetric: true, or use compressed-tensors")
        if shuffled:
            found.append("vLLM refuses desc_act GPTQ files: set method.static_groups: true")
        odd = sorted({grid.group_size for grid in grids} - set(_GPTQ_GROUPS))
        if odd:
            found.append(f"vLLM refuses GPTQ group sizes {odd}: it takes {list(_GPTQ_GROUPS)}")
    if any(grid.bits in (2, 3) for grid in grids):
        found.append("vLLM has no 2- or 3-bit kernel for these files; transformers reads them")
    for fused in _FUSED:
        for name in shapes:
            if not name.endswith(fused[0]):
                continue
            parts = [name.removesuffix(fused[0]) + part for part in fused]
            if len({schemes[part] for part in parts if part in schemes}) > 1:
                found.append(f"vLLM fuses {', '.join(parts)} and needs one scheme for all of them")
    found += _tensor_parallel(shapes, schemes)
    return found


def _tensor_parallel(shapes: Mapping[str, tuple[int, int]], schemes: Mapping[str, Grid | None]) -> list[str]:
    """The largest tensor parallelism whose shards still hold whole groups (row-parallel linears split their input)."""
    most = 8
    for name, (_, in_features) in shapes.items():
        grid = schemes[name]
        if grid is None or not name.endswith(("o_proj", "down_proj")):
            continue
        groups = in_features // grid.columns(in_features)
        while most > 1 and grid.group_size != -1 and groups % most:
            most //= 2
    return [] if most == 8 else [f"tensor parallelism up to {most}: beyond it a shard would cut a scale group in two"]
