"""The limits of a recipe: what fails a run."""

from pydantic import Field

from .base import Fraction, Strict


class Gates(Strict):
    """Limits that fail the run with exit code 3."""

    max_perplexity_increase: Fraction | None = Field(None, ge=0, description="over the original: 3% or 0.03")
    max_kl: float | None = Field(
        None, ge=0, strict=False, description="mean KL divergence from the original, nats a token"
    )
    min_top1_agreement: Fraction | None = Field(None, ge=0, le=1, description="98% or 0.98")
    max_bytes: int | None = Field(None, ge=1, description="weights on disk")
