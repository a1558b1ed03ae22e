"""What gates can resolve with the windows and questions that are asked for, before anything is measured.

The spreads are what evaluations of 4-bit models showed, so they are good to within a factor of two; what was measured
in the end has its own interval.
"""

import math

from quantpress.recipe import Evaluation, Gates

from .formatting import plain, share, small
from .gates import limit_name, show_limit
from .statistics import half_width

# Neighbouring tokens are alike, so errors are larger than of independent ones: 1.9 (SmolLM2, 16 windows of 1024 tokens)
# and 1.8 times (MiniMind2, 8 windows) for perplexity, 2.1 times for the same next token.
_CLUSTERED = 2.0
_KL_SPREAD = 4.0  # standard deviation of a token's KL over its mean, clustering included: 2 to 4
_FLIPS = 0.05  # the share of answers that change either way at 4 bits
_BASE = 0.5  # the share of questions that the original answers right
_SHARE = 0.2  # a limit is well resolved where the interval is this share of it


def foreseen(gates: Gates, wanted: Evaluation | None) -> list[str]:
    """A line for each gate on what is sampled: how near to its limit a result can be called, and what that takes."""
    if wanted is None:
        return []
    lines = [line for name, limit in gates.limits().items() if (line := _line(name, limit, wanted)) is not None]
    if lines and wanted.until_clear is not None:
        most = wanted.until_clear
        lines.append(
            f"evaluation goes on to {most.windows:,} windows and {most.questions:,} questions where it is unclear"
        )
    return [plain(line) for line in lines]


def _line(name: str, limit: float, wanted: Evaluation) -> str | None:
    if (task := name.removeprefix("min_recovery.")) != name:
        asked = next((t.limit for t in wanted.tasks if t.label == task), None)
        return None if asked is None else _of_task(name, limit, asked)
    half = half_of_text(name, limit, wanted.windows * wanted.window)
    if half is None:
        return None
    windows = f"{wanted.windows} windows of {wanted.window:,} tokens"
    aim = (1 - limit if name == "min_top1_agreement" else limit) * _SHARE
    told = f"{100 * half:.2g} points" if name in ("max_perplexity_increase", "min_top1_agreement") else small(half)
    line = f"gate {limit_name(name)} {show_limit(limit, name)}: {windows} call what is more than about {told} from it"
    if half <= aim or aim == 0:
        return line
    return f"{line}; {_rounded(wanted.windows * (half / aim) ** 2):,} windows would call a fifth of the limit"


def half_of_text(name: str, limit: float, tokens: int) -> float | None:
    """Half the width of the interval of a result near `limit`, measured on `tokens`; None for what is not of a text.

    A token's change of NLL has a variance of about twice the KL divergence, which is about the rise of the mean NLL.
    """
    spread: float
    if name == "max_perplexity_increase":
        spread = _CLUSTERED * math.sqrt(2 * math.log1p(limit)) * (1 + limit)
    elif name in ("max_kl", "max_kl_p99"):
        spread = _KL_SPREAD * limit * (2 if name == "max_kl_p99" else 1)
    elif name == "min_top1_agreement":
        spread = _CLUSTERED * math.sqrt(limit * (1 - limit))
    else:
        return None
    return half_width(spread / math.sqrt(tokens))


def _of_task(name: str, limit: float, asked: int) -> str:
    half = half_width(math.sqrt(_FLIPS / asked)) / _BASE
    margin = 1 - limit
    said = f"gate {limit_name(name)} {share(limit)}: {asked:,} questions place a recovery within about ±{share(half)}"
    if half <= margin:
        return said
    needed = _rounded(asked * (half / margin) ** 2) if margin > 0 else None
    more = "" if needed is None else f"; about {needed:,} would"
    return f"{said}, so that even an artifact as good as the original cannot be seen to keep it{more}"


def _rounded(count: float) -> int:
    step: int = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return math.ceil(count / step) * step
