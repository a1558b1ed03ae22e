"""The metrics of an evaluation, one declaration each.

Tables, the comparison, summaries, the model card, the command line and the gates all read METRICS. To add a metric:
measure it (a field of `Figures`), declare it here, test it; a gate on it also needs a limit in the recipe's `Gates`.
Task scores are not declared here: which tasks there are is up to the recipe.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .formatting import change, interval, number, percent_error, share, size, small, spread
from .sections import Figures, Interval, Quality
from .statistics import around


@dataclass(frozen=True)
class MetricValue:
    """A metric in one evaluation.

    stderr, original_stderr: standard errors; None where there is no sampling error, NaN where it is unknown.
    change: the artifact's value relative to the original's, as a fraction.
    interval: the 95 % interval of what a gate limits: the change where the metric `limits_change`, else the artifact's
    value.
    """

    artifact: float
    original: float | None = None
    stderr: float | None = None
    original_stderr: float | None = None
    change: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Metric:
    """How one metric is read, named, written and gated.

    name: key in summary.json.
    read: None where the evaluation did not measure it.
    limit: key of the recipe's `Gates`, None without a gate; limited: what that gate limits, in words.
    compared: whether the comparison of several runs has a column for it. of_text: whether more windows of the text
    measure it better.
    """

    name: str
    title: str
    unit: str
    better: Literal["lower", "higher"]
    help: str
    read: Callable[[Figures], MetricValue | None]
    show: Callable[[float], str] = small
    show_error: Callable[[float], str] = spread
    show_change: Callable[[MetricValue], str] = lambda value: "" if value.change is None else change(value.change)
    limit: str | None = None
    limited: str = ""
    limits_change: bool = False
    compared: bool = True
    of_text: bool = False

    @property
    def heading(self) -> str:
        """The title with its unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def judged(self, value: MetricValue) -> float:
        """The number that the gate's limit is held against."""
        return (math.nan if value.change is None else value.change) if self.limits_change else value.artifact

    def told(self, value: float | None, error: float | None) -> str:
        """A value with its standard error, where that is known; empty where there is no value."""
        if value is None:
            return ""
        return self.show(value) + ("" if error is None or math.isnan(error) else f" ± {self.show_error(error)}")

    def told_change(self, value: MetricValue, sure: str = "{} ({})") -> str:
        """The artifact against the original; where the change has an interval both, as `sure` joins them."""
        told = self.show_change(value)
        ends = value.interval if self.limits_change else None
        return told if ends is None else sure.format(told, interval(ends, change))

    def show_limited(self, number: float) -> str:
        """A limit, or what it is held against, as text."""
        return change(number) if self.limits_change else self.show(number)


def measured(results: Figures) -> list[tuple[Metric, MetricValue]]:
    """Every metric that these results hold, in the order of METRICS."""
    return [(metric, value) for metric in METRICS if (value := metric.read(results)) is not None]


def gated(limit: str) -> Metric:
    """The metric that a limit of the recipe is about."""
    return next(metric for metric in METRICS if metric.limit == limit)


def _both(results: Figures) -> tuple[Quality, Quality] | None:
    both = results.original, results.artifact
    return None if both[0] is None or both[1] is None else (both[0], both[1])


def _perplexity(results: Figures) -> MetricValue | None:
    if (both := _both(results)) is None:
        return None
    before, after = both
    return MetricValue(
        after.perplexity, before.perplexity, after.stderr, before.stderr,
        results.perplexity_increase, results.perplexity_increase_interval,
    )  # fmt: skip


def _bits_per_byte(results: Figures) -> MetricValue | None:
    if (both := _both(results)) is None:
        return None
    before, after = both[0].bits_per_byte, both[1].bits_per_byte
    return MetricValue(after, before, change=after / before - 1 if before else None)


def _kl_mean(results: Figures) -> MetricValue | None:
    away = results.divergence
    return None if away is None else MetricValue(away.kl_mean, stderr=away.kl_stderr, interval=away.kl_interval)


def _kl_p99(results: Figures) -> MetricValue | None:
    away = results.divergence
    return None if away is None else MetricValue(away.kl_p99, interval=away.kl_p99_interval)


def _top1_agreement(results: Figures) -> MetricValue | None:
    away = results.divergence
    if away is None:
        return None
    return MetricValue(away.top1_agreement, stderr=away.top1_stderr, interval=away.top1_interval)


def _bytes(results: Figures) -> MetricValue | None:
    """None for a served model: its size cannot be seen from outside."""
    held, both = results.efficiency, _both(results)
    after = held.bytes if held else both[1].bytes if both else 0
    before = held.original_bytes if held and held.original_bytes else both[0].bytes if both else 0
    if not after:
        return None
    return MetricValue(after, before or None, change=after / before - 1 if before else None, interval=(after, after))


def _smaller(value: MetricValue) -> str:
    """How many times smaller than the original."""
    if value.original is None:
        return ""
    ratio = value.original / value.artifact
    return f"{ratio:.1f}× smaller" if ratio >= 1 else f"{1 / ratio:.1f}× larger"


def _bits_per_weight(results: Figures) -> MetricValue | None:
    held = results.efficiency
    return None if held is None or held.bits_per_weight is None else MetricValue(held.bits_per_weight)


def _bits_per_parameter(results: Figures) -> MetricValue | None:
    held = results.efficiency
    if held is None:
        return None
    before = None if held.original_bytes is None else held.original_bytes * 8 / max(1, held.parameters)
    return MetricValue(held.bits_per_parameter, before)


def _tokens_per_second(results: Figures) -> MetricValue | None:
    """Decoding at the first batch size and context that were timed."""
    held = results.efficiency
    if held is None or held.runtime is None or not held.runtime.speed:
        return None
    speed = held.runtime.speed[0]
    rate, error = speed.decode_tokens_per_second, speed.decode_stderr
    before = held.original_runtime.speed[:1] if held.original_runtime else ()
    first, first_error = (before[0].decode_tokens_per_second, before[0].decode_stderr) if before else (None, None)
    return MetricValue(
        rate, first, error, first_error,
        change=rate / first - 1 if first else None, interval=around(rate, error, speed.repeats),
    )  # fmt: skip


METRICS: tuple[Metric, ...] = (
    Metric(
        "perplexity", "Perplexity", "", "lower",
        "How surprised the model is by the next token of a text, on average: 1 is never. Comparable only on the same "
        "text, windows and tokenizer. ± is one standard error; both models read the same tokens, so the difference is "
        "more certain than the two errors suggest.",
        _perplexity, number, limit="max_perplexity_increase", limited="perplexity", limits_change=True, of_text=True,
    ),
    Metric(
        "bits_per_byte", "Bits per byte", "", "lower",
        "The same surprise per byte of text, which does not depend on the tokenizer.",
        _bits_per_byte, "{:.4f}".format, compared=False,
    ),
    Metric(
        "kl_mean", "KL divergence", "nats per token", "lower",
        "How far the artifact's next-token distribution is from the original's; 0 is identical. It shows changes that "
        "average out in perplexity.",
        _kl_mean, limit="max_kl", limited="KL", of_text=True,
    ),
    Metric(
        "kl_p99", "KL divergence, 99th percentile", "nats per token", "lower",
        "One token in a hundred diverges more than this.",
        _kl_p99, limit="max_kl_p99", limited="KL (99th percentile)", of_text=True,
    ),
    Metric(
        "top1_agreement", "Same next token", "", "higher",
        "How often both models rank the same next token first.",
        _top1_agreement, share, percent_error, limit="min_top1_agreement", limited="same next token", of_text=True,
    ),
    Metric(
        "bytes", "Weights on disk", "", "lower", "All weight files together.",
        _bytes, size, show_change=_smaller, limit="max_bytes", limited="size on disk",
    ),
    Metric(
        "bits_per_weight", "Bits per quantized weight", "", "lower",
        "What is stored for a quantized weight, including its share of scales and zero points.",
        _bits_per_weight, "{:.2f}".format,
    ),
    Metric(
        "bits_per_parameter", "Bits per parameter", "", "lower",
        "The whole model, including what stayed in 16 bit.",
        _bits_per_parameter, "{:.2f}".format, compared=False,
    ),
    Metric(
        "tokens_per_second", "Decoding speed", "tokens per second", "higher",
        "Of the dequantized model in transformers on this machine; a server's kernels are timed by the smoke test.",
        _tokens_per_second, "{:,.1f}".format, limit="min_tokens_per_second", limited="tokens per second",
    ),
)  # fmt: skip
