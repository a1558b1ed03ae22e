"""Several runs of one recipe, with other calibration samples and seeds, folded into one.

Every figure becomes the mean over the runs. Its interval holds two variances: that of the text or the questions, which
the runs share and which more runs do not narrow, and that of the seeds, by Student's t with one degree less than runs.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from .gates import judge_again
from .results import Results
from .sections import Divergence, DomainResult, Interval, Quality, Repeat, Score, TaskResult
from .statistics import half_width

_R = TypeVar("_R", DomainResult, TaskResult)


def folded(runs: Sequence[tuple[int, Results]]) -> Results:
    """The mean of `runs`, each with its seed: two or more, on the same text, the first of which is the artifact's own.

    What describes one artifact alone (continuations, memory, speed, served prompts) stays the first's. Gates are judged
    again, by the means.
    """
    own, all_of = runs[0][1], [results for _, results in runs]
    texts = [one.artifact for one in all_of if one.artifact is not None]
    away = [one.divergence for one in all_of if one.divergence is not None]
    increases = [_known(one.perplexity_increase) for one in all_of]
    artifact = _quality(texts)
    mean = Results.model_copy(own, update={
        "artifact": artifact, "divergence": _divergence(away),
        "perplexity_increase": _average(increases, math.log1p, math.expm1),
        "perplexity_increase_interval": _interval(
            increases, [one.perplexity_increase_interval for one in all_of], math.log1p, math.expm1
        ),
        "domains": tuple(_each(own.domains, [one.domains for one in all_of], _same_text, _domain)),
        "tasks": tuple(_each(own.tasks, [one.tasks for one in all_of], _same_questions, _task)),
        "repeats": tuple(_record(seed, results) for seed, results in runs),
    })  # fmt: skip
    return mean.model_copy(update={"gates": judge_again(own.gates, mean)})


def _record(seed: int, results: Results) -> Repeat:
    assert results.artifact is not None
    assert results.divergence is not None
    return Repeat(
        seed=seed, perplexity=results.artifact.perplexity, perplexity_increase=_known(results.perplexity_increase),
        kl_mean=results.divergence.kl_mean, top1_agreement=results.divergence.top1_agreement,
    )  # fmt: skip


def _same(value: float) -> float:
    return value


def _known(value: float | None) -> float:
    return math.nan if value is None else value


Scale = Callable[[float], float]


def _average(values: Sequence[float], there: Scale = _same, back: Scale = _same) -> float:
    """The mean on the scale that `there` maps to: differences of log-likelihoods for perplexities."""
    if not all(map(math.isfinite, values)):
        return next(value for value in values if not math.isfinite(value))
    return back(sum(map(there, values)) / len(values))


def _seed_error(values: Sequence[float]) -> float:
    """Standard error of the mean of `values`, one a seed."""
    n, middle = len(values), sum(values) / len(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (n - 1) / n)


def _interval(
    values: Sequence[float], ends: Sequence[Interval | None], there: Scale = _same, back: Scale = _same
) -> Interval | None:
    """The 95 % interval of the mean; None where one run has none."""
    known = [pair for pair in ends if pair is not None]
    if len(known) < len(values) or not all(map(math.isfinite, (*values, *(end for pair in known for end in pair)))):
        return None
    at = [there(value) for value in values]
    middle, seeds = sum(at) / len(at), half_width(_seed_error(at), len(at))
    below = sum(value - there(low) for value, (low, _) in zip(at, known, strict=True)) / len(at)
    above = sum(there(high) - value for value, (_, high) in zip(at, known, strict=True)) / len(at)
    return back(middle - math.hypot(below, seeds)), back(middle + math.hypot(above, seeds))


def _stderr(values: Sequence[float], errors: Sequence[float]) -> float:
    """Of the mean: the text's own, and the seeds', whose t is made up for so that 1.96 of it are the interval."""
    shared = sum(errors) / len(errors)
    return math.hypot(shared, half_width(_seed_error(values), len(values)) / half_width(1.0))


def _quality(runs: Sequence[Quality]) -> Quality:
    nll = _average([math.log(one.perplexity) for one in runs])
    bits = _average([one.bits_per_byte for one in runs])
    return runs[0].model_copy(update={
        "perplexity": math.exp(nll), "nll": nll, "bits_per_byte": bits, "byte_perplexity": 2**bits,
        "nll_stderr": _stderr([math.log(one.perplexity) for one in runs], [one.nll_stderr for one in runs]),
    })  # fmt: skip


def _divergence(runs: Sequence[Divergence]) -> Divergence:
    kl, tail, top1 = ([getattr(one, name) for one in runs] for name in ("kl_mean", "kl_p99", "top1_agreement"))
    buckets = []
    for k, bucket in enumerate(runs[0].confidence):  # by the original's probabilities: the same in every run
        each = [one.confidence[k] for one in runs]
        means = [one.kl_mean for one in each]
        buckets.append(bucket.model_copy(update={
            "kl_mean": _average(means), "kl_stderr": _stderr(means, [one.kl_stderr for one in each]),
            "top1_agreement": _average([one.top1_agreement for one in each]),
        }))  # fmt: skip
    return runs[0].model_copy(update={
        "kl_mean": _average(kl), "kl_stderr": _stderr(kl, [one.kl_stderr for one in runs]),
        "kl_interval": _positive(_interval(kl, [one.kl_interval for one in runs])),
        "kl_median": _average([one.kl_median for one in runs]), "kl_p90": _average([one.kl_p90 for one in runs]),
        "kl_p99": _average(tail), "kl_p99_interval": _positive(_interval(tail, [one.kl_p99_interval for one in runs])),
        "kl_max": max(one.kl_max for one in runs),
        "top1_agreement": _average(top1), "top1_stderr": _stderr(top1, [one.top1_stderr for one in runs]),
        "top1_interval": _share(_interval(top1, [one.top1_interval for one in runs])), "confidence": tuple(buckets),
    })  # fmt: skip


def _positive(ends: Interval | None) -> Interval | None:
    return None if ends is None else (max(0.0, ends[0]), ends[1])


def _share(ends: Interval | None) -> Interval | None:
    return None if ends is None else (max(0.0, ends[0]), min(1.0, ends[1]))


def _each(
    own: Sequence[_R], all_of: Sequence[Sequence[_R]], same: Callable[[_R, _R], bool], fold: Callable[[list[_R]], _R]
) -> list[_R]:
    """Every entry of the first run folded with those of the others; one that another run has not stays as it is."""
    out = []
    for entry in own:
        found = [other for others in all_of for other in others if same(entry, other)]
        out.append(fold(found) if len(found) == len(all_of) else entry)
    return out


def _same_text(a: DomainResult, b: DomainResult) -> bool:
    return a.name == b.name and a.text == b.text


def _domain(runs: list[DomainResult]) -> DomainResult:
    increases, kl = [one.perplexity_increase for one in runs], [one.kl_mean for one in runs]
    top1, ends = [one.top1_agreement for one in runs], [one.perplexity_increase_interval for one in runs]
    return runs[0].model_copy(update={
        "artifact_perplexity": _average([one.artifact_perplexity for one in runs], math.log, math.exp),
        "perplexity_increase": _average(increases, math.log1p, math.expm1),
        "perplexity_increase_interval": _interval(increases, ends, math.log1p, math.expm1),
        "kl_mean": _average(kl), "kl_interval": _positive(_interval(kl, [one.kl_interval for one in runs])),
        "top1_agreement": _average(top1), "top1_interval": _share(_interval(top1, [one.top1_interval for one in runs])),
    })  # fmt: skip


def _same_questions(a: TaskResult, b: TaskResult) -> bool:
    return (a.task, a.metric, a.n, a.sha256) == (b.task, b.metric, b.n, b.sha256)


def _task(runs: list[TaskResult]) -> TaskResult:
    scores = [one.artifact.value for one in runs]
    mean = Score(value=_average(scores), stderr=_stderr(scores, [one.artifact.stderr for one in runs]))
    update: dict[str, object] = {"artifact": mean}
    for name in ("difference", "recovery"):
        values = [getattr(one, name) for one in runs]
        if None not in values:
            ends = [getattr(one, f"{name}_interval") for one in runs]
            update |= {name: _average(values), f"{name}_interval": _interval(values, ends)}
    differences, errors = [one.difference for one in runs], [one.difference_stderr for one in runs]
    if None not in differences and None not in errors:
        update["difference_stderr"] = _stderr([_known(d) for d in differences], [_known(e) for e in errors])
    flips = [one.flips for one in runs]
    if None not in flips:
        lost, won = (round(sum(getattr(one, name) for one in runs) / len(runs)) for name in ("lost", "won"))
        share = _share(_interval([_known(f) for f in flips], [one.flips_interval for one in runs]))
        update |= {"lost": lost, "won": won, "flips_interval": share}
    return runs[0].model_copy(update=update)
