"""The artifact as the draft model of its original: what `quantpress eval RUN --draft` measured, for an export's README.

Speculative decoding (Leviathan et al., arXiv:2211.17192) changes the original's speed and never its answers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.artifact.artifact import Artifact
from quantpress.artifact.manifest import own_manifest
from quantpress.core.errors import BadInput

RECORD = Path("eval") / "draft.json"  # written by eval/measure/draft.py


@dataclass(frozen=True)
class Acceptance:
    """The share of the artifact's tokens that `original` accepts: `sampled` at temperature 1, with its standard error,
    and `greedy` at temperature 0.

    tokens {drafted: generated}: expected tokens of one pass of the original at temperature 1, its own token included.
    cost: bytes of the artifact's weights over those of the original's.
    """

    sampled: float
    stderr: float
    greedy: float
    tokens: Mapping[int, float]
    cost: float
    original: str

    def speedup(self, drafted: int) -> float:
        """Speed relative to the original alone: Theorem 3.8 with the measured tokens a pass.

        An upper bound: it takes reading the weights to be the only cost of a pass, as with few concurrent requests.
        """
        return self.tokens[drafted] / (1 + drafted * self.cost)

    @property
    def best(self) -> int:
        """The number of drafted tokens with the largest speedup."""
        return max(self.tokens, key=self.speedup)


def measured(run: Path, artifact: Path) -> Acceptance | None:
    """The measurement in the run folder `run`; None without one, or when the artifact has changed size since."""
    if not (run / RECORD).is_file():
        return None
    try:
        found: dict[str, Any] = json.loads((run / RECORD).read_text(encoding="utf-8"))
        sampled, weights = found["sampled"], found["artifact_bytes"]
        tokens = {int(n): float(value) for n, value in sampled["tokens_a_pass"].items() if value is not None}
        rates = float(sampled["rate"]), float(sampled["stderr"]), float(found["greedy"]["rate"])
        cost = weights / found["original_bytes"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise BadInput(f"{run / RECORD}: cannot be read ({type(error).__name__}: {error}); measure again with "
                       f"quantpress eval {run} --draft") from None  # fmt: skip
    if not tokens or weights != Artifact(artifact).total_bytes:
        return None
    return Acceptance(*rates, tokens, cost, _original_of(run))


def notes(run: Path, draft_for: str, drafted: int, found: Acceptance | None) -> list[str]:
    """Paragraphs for the README of an export that drafts `drafted` tokens at a time for `draft_for`."""
    again = f"`quantpress eval {run} --draft` measures it; export again after that"
    if found is None:
        return [f"How often {draft_for} accepts what the artifact drafts has not been measured: {again}."]
    own = "" if Path(found.original).name == Path(draft_for).name else f"; {draft_for}, served here, may accept fewer"
    rows = [f"| {n} | {found.tokens[n]:.2f} | {found.speedup(n):.2f} |" for n in found.tokens]
    table = ["| tokens drafted | tokens a pass | times as fast, at most |", "|--:|--:|--:|", *rows]
    lines = [
        f"Measured: {found.original} accepts {found.sampled:.1%} (± {found.stderr:.1%}) of the tokens the artifact "
        f"drafts at temperature 1, and {found.greedy:.1%} at 0{own}. The gain at temperature 1, where reading weights "
        f"(the draft's are {found.cost:.0%} of the original's) is the whole cost of a pass, as with few concurrent "
        "requests; with many, drafting may cost more than it gains:",
        "\n".join(table),
    ]
    if found.speedup(found.best) <= 1:
        lines.append("No number of drafted tokens is expected to make it faster: serve the original alone.")
    elif found.best != drafted:
        lines.append(f"{drafted} are drafted here; {found.best} would bring the most: `draft_tokens: {found.best}`.")
    return lines


def facts(found: Acceptance | None, drafted: int) -> dict[str, Any] | None:
    """The measurement for export.json."""
    if found is None:
        return None
    return {
        "acceptance": found.sampled,
        "acceptance_stderr": found.stderr,
        "acceptance_greedy": found.greedy,
        "tokens_a_pass": found.tokens.get(drafted),
        "speedup_at_most": found.speedup(drafted) if drafted in found.tokens else None,
        "best_draft_tokens": found.best,
    }


def _original_of(run: Path) -> str:
    manifest = own_manifest(run)
    return "the original" if manifest is None else manifest.model.id or "the original"
