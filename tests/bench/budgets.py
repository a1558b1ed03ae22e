"""Budgets beside the recipes they have to beat at the same bytes: one width, and first and last blocks in more bits.

    python tests/bench/budgets.py --calibration FILE.txt --evaluation FILE.txt [FILE.txt …] [--model M] [--bos]

For each menu of MENUS: every recipe it could be replaced by, then a budget of exactly the bytes that it takes.
A row is one whole run. The menu `gguf` is that of GGUF files, beside llama.cpp's mixes.
"""

from collections.abc import Iterator
from typing import Any

from runs import Figures, Runs, options, say

from quantpress.engine.pipeline import prepare
from quantpress.recipe.loading import parse

Grid = dict[str, Any]
INT2: Grid = {"bits": 2, "group_size": 32, "symmetric": False}
INT3, INT4, INT6 = ({"bits": bits, "group_size": 64} for bits in (3, 4, 6))
INT8: Grid = {"bits": 8, "group_size": -1}
NVFP4, FP8 = {"type": "nvfp4"}, {"type": "fp8"}
MENUS: dict[str, tuple[Grid | None, ...]] = {  # smallest first
    "int3, int4, int6": (INT3, INT4, INT6),
    "int2, int3, int4": (INT2, INT3, INT4),
    "int4, int8, 16 bit": (INT4, INT8, None),
    "nvfp4, fp8, 16 bit": (NVFP4, FP8, None),
}
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")


def rivals(menu: tuple[Grid | None, ...], blocks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, keys of the recipe) of what a budget of this menu has to beat."""
    formats = [grid for grid in menu if grid is not None]
    for grid in formats[1 : len(menu) - 1]:
        yield f"all {name(grid)}", {"weights": grid}
    ends = [f"*.layers.{k}.*" for k in (0, blocks - 1)]
    for at, small in enumerate(formats[:2]):
        for large in menu[at + 1 :] if at == 0 else formats[at + 1 :]:
            keys: dict[str, Any] = {"ignore": ends}
            if large is not None:
                whole = {"type": "int", "symmetric": True} | large
                keys = {"overrides": [{"match": pattern} | whole for pattern in ends]}
            yield f"{name(small)}, first and last block {name(large)}", {"weights": small} | keys


def name(grid: Grid | None) -> str:
    return "16 bit" if grid is None else str(grid.get("type", f"int{grid.get('bits')}"))


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--menus", nargs="+", choices=[*MENUS, "gguf"], default=list(MENUS))
    parser.add_argument("--only", nargs="+", help="rivals by their name; default all")
    args = parser.parse_args()
    runs = Runs(args)
    names = " | ".join(f"{text.name}: perplexity | KL" for text in args.evaluation)
    say(f"| menu | recipe | MB | {names} | CPU s |\n|---|---|--:|{'--:|--:|' * len(args.evaluation)}--:|")
    if "gguf" in args.menus:
        of_files(runs, args.only)
    for menu in (menu for menu in args.menus if menu != "gguf"):
        met: dict[int, str] = {}
        for rival, keys in rivals(MENUS[menu], runs.blocks):
            if args.only and rival not in args.only:
                continue
            show(menu, rival, runs.figures({"head": None} | keys))
            planned = prepare(parse(runs.base | {"head": None} | keys), runs.source).plan
            met.setdefault(planned.artifact_bytes, rival)
        for size, rival in met.items():
            budget = {"head": None, "budget": {"bytes": size, "menu": list(MENUS[menu])}}
            show(menu, f"**budget** in the bytes of: {rival}", runs.figures(budget))


def of_files(runs: Runs, only: list[str] | None) -> None:
    """The rows of GGUF."""
    for mix in (mix for mix in MIXES if not only or mix in only):
        found = runs.figures({"formats": ["gguf"], "gguf": {"type": mix}})
        show("gguf", mix, found)
        keys = {"formats": ["gguf"], "gguf": {"budget": {"bytes": found.bytes}}}
        show("gguf", f"**budget** in the bytes of: {mix}", runs.figures(keys))


def show(menu: str, recipe: str, found: Figures) -> None:
    cells = " | ".join(f"{p:.2f} | {kl:.4f}" for p, kl in zip(found.perplexity, found.kl, strict=True))
    say(f"| {menu} | {recipe} | {found.bytes / 1e6:.2f} | {cells} | {found.cpu_s:.0f} |")


if __name__ == "__main__":
    main()
