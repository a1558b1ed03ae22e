"""Size against divergence, at least six sizes a format: the charts docs/pareto-NAME.svg and the figures behind them.

    python tests/bench/pareto.py NAME --calibration FILE.txt --evaluation FILE.txt [--model M] [--bos]

The figures are kept in docs/pareto-NAME.json, one row a recipe; what is there is not measured again, so that a run that
was stopped goes on. `--draw` draws alone. The chart has KL on the first text.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runs import Runs, options, say

from quantpress.eval.report.figures import svg
from quantpress.eval.report.page import templates
from quantpress.eval.report.tradeoff import Axes, Point, pareto, tradeoff

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
GROUPED = {bits: {"bits": bits, "group_size": 64} for bits in (3, 4, 5, 6)}
INTEGERS = {2: {"bits": 2, "group_size": 32, "symmetric": False}, **GROUPED, 8: {"bits": 8, "group_size": -1}}
TYPES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
RECIPES: dict[str, dict[str, Any]] = {
    **{f"int{bits}": {"weights": grid, "head": None} for bits, grid in INTEGERS.items()},
    **{kind: {"formats": ["gguf"], "gguf": {"type": kind}} for kind in TYPES},
}
AXES = Axes("KL from the original, nats a token")


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    kept = DOCS / f"pareto-{args.name}.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    runs = None if args.draw else Runs(args)
    for recipe, keys in RECIPES.items():
        if runs is not None and recipe not in known:
            known[recipe] = asdict(runs.figures(keys))
            say(f"{recipe}: {json.dumps(known[recipe])}")
            kept.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    (DOCS / f"pareto-{args.name}.svg").write_text(drawn(args.name, known), encoding="utf-8")


def drawn(name: str, known: dict[str, dict[str, Any]]) -> str:
    """The chart of the rows {recipe: figures}, KL on the first text."""
    points = [Point(recipe, row["bytes"], row["kl"][0]) for recipe, row in known.items()]
    best = set(pareto(points, AXES))
    points = [Point(p.label, p.x, p.y, role="front" if i in best else "dominated") for i, p in enumerate(points)]
    plot = tradeoff(points, (940, 480), AXES, lambda p: f"{p.label}: {p.x / 1e6:.1f} MB, KL {p.y:.4f}")
    caption = (
        "GPTQ on the same tokens; KL on WikiText-2 test. int: compressed-tensors, groups of 64 (int2: 32, int8: a row),"
        " head and embeddings in 16 bit. Q: GGUF, which rounds those too."
    )
    return svg(templates(), "tradeoff", caption, plot=plot, heading=f"{name}: size against divergence")


if __name__ == "__main__":
    main()
