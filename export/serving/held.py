"""A served model that is held against its reference: what may be asked of it, and how far its kernel may be off."""

from dataclasses import dataclass, field
from typing import Any

from .client import Client
from .record import Against
from .reference import Asked, Reference

LOGPROBS: dict[str, Any] = {"logprobs": 20, "return_tokens_as_token_ids": True}
_FLOOR = 0.002  # nats: what kernels may differ by beside the noise that was measured
_TIMES = 2.0  # the noise


@dataclass
class Held:
    """What has been found so far. other_tokens: the tokenizer's check failed."""

    against: Against = field(default_factory=Against)
    other_tokens: bool = False

    def add(self, **found: Any) -> None:
        self.against = self.against.model_copy(update=found)


@dataclass(frozen=True)
class ServedCheck:
    """A served model and its reference. context: tokens of prompt and answer that the server takes; None: any.

    rounds_inputs: whether its kernel may round to int8 what comes into quantized linears; for GGUF files all do.
    """

    client: Client
    reference: Reference
    context: int | None
    held: Held
    rounds_inputs: bool = False

    @property
    def limit(self) -> float:
        return self._limit(rounded=self.rounds_inputs or self.reference.gguf)

    @property
    def farther(self) -> float | None:
        """How much farther than evaluated from the original the kernel may take it, beside chance; None: not known."""
        noise = self.reference.noise
        found = [noise.farther_bfloat16]
        found += [noise.farther_rounded_inputs] if self.rounds_inputs or self.reference.gguf else []
        known = [value for value in found if value is not None]
        return _FLOOR + _TIMES * max(known) if known else None

    @property
    def widest(self) -> float:
        """The limit for a kernel that rounds inputs."""
        return self._limit(rounded=True)

    def _limit(self, *, rounded: bool) -> float:
        noise = self.reference.noise
        return _FLOOR + _TIMES * max(noise.bfloat16, noise.rounded_inputs if rounded else 0.0)

    def fits(self, one: Asked) -> bool:
        return self.context is None or len(one.ids) + len(one.answer) <= self.context
