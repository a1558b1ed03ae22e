"""Figures in words, a name and what there is to say for each: the terminal prints them, a notebook shows them."""

from collections.abc import Callable, Iterator

from .formatting import change, interval, number, plain, points, score, share, size, small
from .metrics import measured
from .sections import Efficiency, Figures, Generation, Interval, Speed, TaskResult


def lines(results: Figures) -> Iterator[tuple[str, str]]:
    """Every figure of an evaluation, without gates, warnings and notes."""
    for name, told in _figures(results):
        yield name, plain(told)


def _figures(results: Figures) -> Iterator[tuple[str, str]]:
    for metric, value in measured(results):
        before = "" if value.original is None else f"{metric.show(value.original)} → "
        unit = f" {metric.unit}" if metric.unit else ""
        how = metric.told_change(value, "{}, 95 %: {}")
        error = None if value.change is not None else value.stderr
        yield metric.title, f"{before}{metric.told(value.artifact, error)}{unit}" + (f" ({how})" if how else "")
    if results.repeats:
        each = ", ".join(f"{change(one.perplexity_increase)} KL {small(one.kl_mean)}" for one in results.repeats)
        yield f"means over {len(results.repeats)} runs", each
    if results.divergence is not None and results.divergence.noise is not None:
        yield "noise floor of the divergence", f"KL {small(results.divergence.noise.kl_mean)}"
    for domain in results.domains:
        both = f"{number(domain.original_perplexity)} → {number(domain.artifact_perplexity)}"
        told = _sure(domain.perplexity_increase, domain.perplexity_increase_interval, change)
        yield f"on {domain.name}", f"perplexity {both}, {told}; KL {_sure(domain.kl_mean, domain.kl_interval, small)}"
    for one in results.prompts:
        away = _sure(one.kl_mean, one.kl_interval, small)
        yield f"on {one.name}", f"KL {away}, same next token {share(one.top1_agreement)} of {one.positions:,}"
    for task in results.tasks:
        yield f"{task.task} {task.metric}", _task(task)
    if results.efficiency is not None:
        yield from _efficiency(results.efficiency)
    for generation in results.generations:
        yield "continued", f"{generation.prompt!r}: {_continued(generation)}"


def _sure(value: float, ends: Interval | None, how: Callable[[float], str]) -> str:
    return how(value) + ("" if ends is None else f" ({interval(ends, how)})")


def _task(task: TaskResult) -> str:
    before = "" if task.original is None else f"{score(task.original.value)} → "
    told = f"{before}{score(task.artifact.value)} ± {score(task.artifact.stderr)} of {task.n:,} questions"
    if task.difference is not None:
        told += f", {_sure(task.difference, task.difference_interval, points)} points"
    if task.recovery is not None:
        told += f", recovery {_sure(task.recovery, task.recovery_interval, share)}"
    return told if task.flips is None else f"{told}, {task.lost} answers lost, {task.won} won"


def _efficiency(held: Efficiency) -> Iterator[tuple[str, str]]:
    if held.cache is not None:
        yield "key-value cache", f"{size(held.cache.bytes_per_token)} per token in {held.cache.dtype}"
        fits = ", ".join(f"{fit.gpu} {fit.concurrency:,}" for fit in held.fits)
        yield f"sequences of {held.cache.context:,} tokens", fits or "no GPU asked"
    for who, runtime in (("artifact", held.runtime), ("original", held.original_runtime)):
        for speed in () if runtime is None else runtime.speed:
            yield f"speed of the {who}", _speed(speed)
    if held.runtime is not None:
        yield "timed with", held.runtime.what
    if held.cost is not None:
        yield "cost", held.cost.formula


def _speed(speed: Speed) -> str:
    prefill, decode = speed.prefill_tokens_per_second, speed.decode_tokens_per_second
    what = f"batch {speed.batch}, context {speed.context:,}"
    return f"{what}: prefill {prefill:,.0f}, decode {decode:,.1f} tokens/s"


def _continued(generation: Generation) -> str:
    """Tokens are counted from 1, as on the page."""
    at = generation.first_difference
    return f"all {generation.tokens} tokens alike" if at is None else f"different from token {at + 1}"
