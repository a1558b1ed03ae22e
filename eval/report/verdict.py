"""The verdict in words, first on every page and card, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..measure.formatting import plain, share, size, small
from .measured_run import LeftOut, MeasuredRun
from .page_text import program
from .standing import Judged, Level, best_quality, judge_runs, pick

# level: the badge's class, and its words without and with gates.
_BADGES: dict[Level, tuple[str, str, str]] = {
    "fine": ("ACCEPT", "Fine", "Accepted"),
    "look closer": ("INCONCLUSIVE", "Look closer", "Too close to call"),
    "missed": ("REGRESSION", "Misses its gates", "Misses its gates"),
    "broken": ("REGRESSION", "Broken", "Broken"),
    "void": ("REGRESSION", "No verdict", "No verdict"),
}


@dataclass(frozen=True)
class Verdict:
    """badge: its class in the style sheet; word: the verdict in a word or two; todo: what to do, a line each."""

    level: Level
    badge: str
    word: str
    reason: str
    todo: tuple[str, ...]


def verdict(run: MeasuredRun) -> Verdict:
    """The verdict on one run."""
    (one,) = judge_runs([run])
    badge, soft, gated = _BADGES[one.standing.level]
    word = soft if run.results.gates.verdict == "NONE" else gated
    return Verdict(one.standing.level, badge, word, one.standing.reason, tuple(_what_to_do(one)))


def _what_to_do(one: Judged) -> list[str]:
    run, level = one.run, one.standing.level
    if level == "void":
        return ["Do not judge or publish this artifact by these figures; measure again as the verdict says."]
    if level == "fine":
        return [f"Take it. {_serve(run)}"]
    if level in ("missed", "broken"):
        return [f"Do not {'serve' if level == 'broken' else 'release'} it. {_next(run)}"]
    if run.results.gates.verdict == "INCONCLUSIVE":
        return ["Measure more before you release it: the gates below name how much would settle it."]
    return [
        f"Compare the continuations and the tasks that matter to you before you take it. {_serve(run)}",
        f"To lose less: {_next(run)[len('Try ') :]}",
    ]


def _serve(run: MeasuredRun, inside: str = "") -> str:
    """How to start it. inside: the run's folder with a slash, where several runs are spoken of."""
    targets = [str(target.get("name")) for target in run.manifest.recipe.get("targets") or ()]
    if targets:
        return f"{inside}export/{targets[0]}/ has the files that start it on {program(targets[0])}."
    if run.manifest.artifact.format == "gguf":
        return f"llama.cpp serves it; {inside}quantized/README.md has the commands."
    return f"{inside}quantized/README.md names the servers that load it, with their commands."


def _next(run: MeasuredRun) -> str:
    """The recipe to try next, from what this one was."""
    recipe = run.manifest.recipe
    method = str((recipe.get("method") or {}).get("name", ""))
    weights = recipe.get("weights") or {}
    bits = min((layer.bits for layer in run.manifest.layers if layer.bits < 16), default=16)
    group = int(weights.get("group_size") or 0)
    if run.manifest.artifact.format == "gguf":
        return "Try a larger type: gguf-q4_k_m below 4 bits, gguf-q8_0 otherwise."
    if bits < 4:
        return "Try 4 bits: the recipe w4a16-gptq."
    if method == "rtn" and bits <= 4:
        return "Try GPTQ at the same bits: the recipe w4a16-gptq, or --set method=gptq."
    if bits <= 4 and (group > 32 or group < 0):
        return "Try smaller groups (--set weights.group_size=32), or 8 bits for the worst layers below (overrides)."
    if bits <= 4:
        return "Try 8 bits: the recipe w8a16-rtn, or 8 bits for the worst layers below (overrides)."
    return "Try leaving the worst layers below in 16 bit (ignore)."


@dataclass(frozen=True)
class Choice:
    """Of several runs: which to take, what else could be taken, and what was left out.

    judged: all, in the page's order. take: the smallest that is fine, else the closest to the original. best: the
    closest to the original. headline, todo: the same in words.
    """

    judged: tuple[Judged, ...]
    take: Judged | None
    best: Judged | None
    headline: str
    todo: tuple[str, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def worth(self) -> list[str]:
        """Labels of the runs worth choosing between."""
        return [one.run.label for one in self.judged if one.beaten is None]


def choose(runs: Sequence[MeasuredRun], left_out: Sequence[LeftOut] = ()) -> Choice:
    """The choice between several runs, without a wish for memory or speed; `recommend` asks with one."""
    judged = tuple(judge_runs(runs))
    take = pick(judged, "smallest")
    worth = [one for one in judged if one.beaten is None]
    best = best_quality(worth) if worth else None
    return Choice(judged, take, best, plain(_headline(judged, take, best)), tuple(_advice(take, best)), tuple(left_out))


def _headline(judged: Sequence[Judged], take: Judged | None, best: Judged | None) -> str:
    if take is None:
        levels = {one.standing.level for one in judged}
        if levels == {"void"}:
            return f"No verdict: {judged[0].standing.reason}."
        why = "passes its gates" if levels == {"missed"} else "can be recommended"
        return f"None of the {len(judged)} artifacts {why}."
    gated = take.run.results.gates.verdict == "ACCEPT"
    fine = take.standing.level == "fine"
    kind = "None is clearly fine; the closest to the original"
    if fine:
        kind = "The smallest that passes its gates" if gated else "The smallest that is fine"
    text = f"{kind}: {_named(take)}."
    return text if best is None or best is take else f"{text} Closest to the original: {_named(best)}."


def _named(one: Judged) -> str:
    run = one.run
    same = share(run.divergence.top1_agreement)
    return f"{run.label}, {run.smaller}, KL {small(one.kl)}, the same next token {same} of the time"


def _advice(take: Judged | None, best: Judged | None) -> list[str]:
    if take is None:
        return ["Nothing here should be served; the table says why, run by run."]
    label = take.run.label
    out = []
    if take.standing.level == "fine":
        out.append(f"Take {label}: {take.standing.reason}. {_serve(take.run, f'{take.run.folder.name}/')}")
    else:
        out.append(f"Look closer at {label} before you take it: {take.standing.reason}.")
        out.append(f"To lose less: {_next(take.run)[len('Try ') :]}")
    if best is not None and best is not take:
        nearer = "is clearly closer to the original" if best.clearly_closer(take) else "is as close within the noise"
        sizes = f"{size(best.run.size)} against {size(take.run.size)}"
        out.append(plain(f"{best.run.label} ({sizes}) {nearer}: {best.kl_shown} against {take.kl_shown}."))
    return out
