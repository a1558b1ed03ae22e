"""What a server's loader refuses, said before the work. Measured on vLLM 0.32 and read from the formats' sources."""

from collections.abc import Mapping, Sequence

from quantpress.quantize.recipe import Activations, Grid

_GPTQ_GROUPS = (-1, 32, 64, 128)
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def servability(
    formats: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, Grid | None],
    *,
    shuffled: bool,
    activations: Activations | None = None,
) -> list[str]:
    """One line for each thing that would keep a server from loading the artifact.

    shapes {name: (out, in)}; schemes: the grid of each linear, None where it stays in 16 bit; activations: what the
    inputs of quantized linears are rounded to.
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
    if "compressed-tensors" in formats:
        found += _number_types(grids, activations)
        experts = {grid for name, grid in schemes.items() if grid is not None and ".experts." in name}
        found += _experts(sorted(experts, key=str), activations)
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


def _number_types(grids: Sequence[Grid], activations: Activations | None) -> list[str]:
    """What vLLM's kernels for compressed-tensors files do not compute: its table of schemes, and refusals on CPU."""
    floats = sorted({str(grid.type) for grid in grids if grid.type not in ("int", "fp8-block")})
    found = [f"vLLM's CPU backend has no kernel for {', '.join(floats)} weights; its GPU kernels take them"]
    found = found if floats else []
    for grid in (grid for grid in grids if grid.type == "int"):
        found += _weights_only(grid) if activations is None else _integer_products(grid, activations)
    return found


def _weights_only(grid: Grid) -> list[str]:
    if grid.bits == 8:
        return [
            f"vLLM's CPU backend has no kernel for {grid} weights with 16-bit activations; its GPU kernels take them"
        ]
    if grid.bits == 4 and grid.group_size == -1:
        return [f"vLLM's CPU backend fails on {grid} weights with its default kernel: set weights.group_size"]
    return []


def _integer_products(grid: Grid, activations: Activations) -> list[str]:
    """int8 x int8, int4 x int8 and int4 x fp8, each of one shape only."""
    pair = f"{grid} weights with {activations} activations"
    found = [] if grid.symmetric else [f"vLLM refuses {pair}: set weights.symmetric: true"]
    if grid.bits == 8 and grid.group_size != -1:
        found.append(f"vLLM refuses {pair}: set weights.group_size: -1")
    if grid.bits == 4 and not activations.dynamic:
        found.append(f"vLLM refuses {pair}: leave activations.dynamic out")
    if activations.type == "fp8":
        found.append(f"vLLM computes {pair} on Hopper GPUs only")
        if grid.group_size != 128:
            found.append(f"vLLM refuses {pair}: set weights.group_size: 128")
    return found


def _experts(grids: Sequence[Grid], activations: Activations | None) -> list[str]:
    """What transformers 5.17 makes of experts, which it merges into one tensor as it loads."""
    found: list[str] = []
    for grid in grids:
        if grid.type == "nvfp4":
            found.append("transformers drops the global scales of nvfp4 experts and answers wrongly: serve with vLLM")
        elif grid.type in ("mxfp8", "fp8-block") or (activations is not None and activations.type == "int8"):
            found.append(f"transformers does not load experts of {grid} weights in this layout: serve with vLLM")
        elif activations is not None:
            found.append(f"transformers leaves the inputs of experts in 16 bit; {activations} is for vLLM")
    return list(dict.fromkeys(found))


def _tensor_parallel(shapes: Mapping[str, tuple[int, int]], schemes: Mapping[str, Grid | None]) -> list[str]:
    """The largest tensor parallelism whose shards still hold whole groups (row-parallel linears split their input)."""
    most = 8
    for name, (_, in_features) in shapes.items():
        grid = schemes[name]
        if grid is None or not name.endswith(("o_proj", "down_proj")):
            continue
        groups = in_features // grid.columns(in_features)
        while most > 1 and grid.group_size > 0 and groups % most:
            most //= 2
    return [] if most == 8 else [f"tensor parallelism up to {most}: beyond it a shard would cut a scale group in two"]
