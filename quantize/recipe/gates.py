"""The limits of a recipe: what fails a run."""

from pydantic import Field

from .base import Fraction, Strict


class Gates(Strict):
    """Limits that fail the run with exit code 3.

    Each is judged with the uncertainty of what was measured: REGRESSION when the whole 95% interval lies beyond the
    limit, ACCEPT when it lies within, INCONCLUSIVE when it holds the limit.
    """

    max_perplexity_increase: Fraction | None = Field(None, ge=0, description="over the original: 3% or 0.03")
    max_kl: float | None = Field(
        None, ge=0, strict=False, description="mean KL divergence from the original, nats a token"
    )
    max_kl_p99: float | None = Field(
        None, ge=0, strict=False, description="99th percentile of that divergence, nats a token"
    )
    min_top1_agreement: Fraction | None = Field(None, ge=0, le=1, description="98% or 0.98")
    max_bytes: int | None = Field(None, ge=1, description="weights on disk")
    strict: bool = Field(False, description="INCONCLUSIVE fails too; false: it is shown, and the exit code is 0")

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name; those of single tasks as min_recovery.<task>."""
        return self.model_dump(exclude={"strict"}, exclude_none=True)
