"""The quality gates of a recipe: limits that fail a run."""

from pydantic import Field

from ..core.schema import Bytes, Fraction, Strict
from .evaluation import Evaluation


class Gates(Strict):
    """Limits that fail the run.

    Each is judged by the 95 % interval of what was measured: REGRESSION (exit code 3) when all of it is beyond the
    limit, ACCEPT when all of it is within, INCONCLUSIVE (exit code 4) when it contains the limit.
    """

    max_perplexity_increase: Fraction | None = Field(None, ge=0, description="over the original: 3% or 0.03")
    max_kl: float | None = Field(
        None, ge=0, strict=False, description="mean KL divergence from the original, nats a token"
    )
    max_kl_p99: float | None = Field(
        None, ge=0, strict=False, description="99th percentile of that divergence, nats a token"
    )
    min_top1_agreement: Fraction | None = Field(None, ge=0, le=1, description="98% or 0.98")
    max_bytes: Bytes | None = Field(None, ge=1, description="weights on disk: a number, 4GB or 24GiB")
    min_recovery: dict[str, Fraction] = Field(
        {},
        description="by task: the share of the original's score that its worst metric keeps, 99% or 0.99",
    )
    min_tokens_per_second: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="in decoding, at the first batch and context of evaluation.efficiency.timing",
    )
    strict: bool = Field(True, description="false: INCONCLUSIVE is only reported, and the exit code is 0")

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name; those of tasks as min_recovery.<task>."""
        limits: dict[str, float] = self.model_dump(exclude={"strict", "min_recovery"}, exclude_none=True)
        return limits | {f"min_recovery.{task}": limit for task, limit in self.min_recovery.items()}

    def check(self, evaluation: Evaluation) -> None:
        """Raise ValueError for a limit on what `evaluation` does not measure."""
        known = [task.label for task in evaluation.tasks]
        for task in self.min_recovery:
            if task not in known:
                there = f"there are {', '.join(known)}" if known else "it has none"
                raise ValueError(f"gates.min_recovery: no task {task!r} in evaluation.tasks; {there}")
        if self.min_tokens_per_second is not None and evaluation.efficiency.timing is None:
            raise ValueError("gates.min_tokens_per_second needs evaluation.efficiency.timing: {}")
