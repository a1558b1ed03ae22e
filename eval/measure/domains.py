"""Further texts beside the first: in and out of the calibration's domain, other languages, longer contexts.

Calibration flatters the domain it is from, so a report that shows one text only says half.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantpress.calibrate.texts import Documents, load_documents
from quantpress.core.errors import BadInput
from quantpress.recipe import Calibration, Evaluation
from quantpress.recipe.evaluation import Domain

from .divergence import TokenScores, Windows, divergence, perplexity_increase, quality, windows
from .sections import DomainResult

_CHARACTERS = 6  # a token, generously


@dataclass(frozen=True)
class DomainText:
    """The windows of one domain."""

    name: str
    text: Windows


def chosen(wanted: Evaluation, calibration: Calibration) -> Sequence[Domain]:
    """The recipe's domains; by default the calibration's, where that is at hand without another download."""
    if wanted.domains is not None:
        return wanted.domains
    local = calibration.source.endswith((".txt", ".jsonl")) and calibration.source != wanted.source
    embedded = calibration.source == "default" and wanted.source == "default"
    return (Domain(source="calibration"),) if local or embedded else ()


def load(
    wanted: Evaluation, calibration: Calibration, tokenizer: Any, cache: Path, note: Callable[[str], None]
) -> list[DomainText]:
    """The windows of every domain, each with the BOS token that the first text has.

    A domain that the recipe names and that cannot be had raises BadInput; the default one is noted and left out.
    """
    found = []
    for domain in chosen(wanted, calibration):
        changes = {"windows": domain.windows, "window": domain.window or wanted.window, "stride": None}
        try:
            text = _documents(domain, calibration, int(changes["windows"] or 0) * int(changes["window"] or 0), cache)
            cut = windows(tokenizer, "\n\n".join(text.documents), text.source, wanted.model_copy(update=changes))
        except BadInput as error:
            if wanted.domains is not None:
                raise BadInput(f"evaluation.domains, {domain.label}: {error}") from error
            note(f"the calibration's own domain: {error}")
            continue
        found.append(DomainText(domain.label, cut))
    return found


def _documents(domain: Domain, calibration: Calibration, tokens: int, cache: Path) -> Documents:
    """The domain's documents; of the calibration's text those that are last in the order it is drawn in."""
    if domain.source != "calibration":
        return load_documents(domain, cache=cache, role="evaluation")
    if calibration.source == "self":
        raise BadInput("the model wrote the calibration text itself")
    text = load_documents(calibration, cache=cache, role="calibration")
    order = torch.randperm(len(text.documents), generator=torch.Generator().manual_seed(calibration.seed)).tolist()
    whole, apart = "\n\n".join(text.documents[i] for i in order), _CHARACTERS * tokens
    used = _CHARACTERS * calibration.samples * calibration.seq_len if calibration.seed == 0 else len(whole)
    if used + apart > len(whole):
        raise BadInput(f"{text.source} has no part left of {tokens:,} tokens that is not calibrated on")
    return Documents((whole[-apart:],), f"{text.source}, a part that is not calibrated on", text.sha256)


def result(name: str, text: Windows, scores: TokenScores) -> DomainResult:
    """The figures of one domain."""
    before, after = (quality(nll, text, 0).perplexity for nll in (scores.original_nll, scores.artifact_nll))
    increase, interval = perplexity_increase(scores.original_nll, scores.artifact_nll, text)
    away = divergence(scores)
    return DomainResult(
        name=name, text=text.record(), original_perplexity=before, artifact_perplexity=after,
        perplexity_increase=increase, perplexity_increase_interval=interval, kl_mean=away.kl_mean,
        kl_interval=away.kl_interval, top1_agreement=away.top1_agreement, top1_interval=away.top1_interval,
    )  # fmt: skip
