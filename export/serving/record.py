"""The record of a smoke test, eval/serving.json (schema 1): written, and read back with validation."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.core.schema import Section, first_problem

FILE = Path("eval") / "serving.json"


class Check(Section):
    """One check. reason: what was seen, or why it failed or was skipped."""

    name: str
    status: Literal["pass", "fail", "skip"]
    reason: str
    seconds: float


class Tolerance(Section):
    """Largest allowed absolute difference of a kernel in log-probability: mean, and for one token."""

    kernel: str
    mean: float
    largest: float


class Agreement(Section):
    """The server's greedy answers against our own forward of the same artifact over the same tokens.

    equal_tokens: greedy tokens equal to ours, up to each answer's first difference; behind: the largest gap in
    log-probability between the token we would choose and the server's; logprob_mean, logprob_largest: absolute
    differences over the likeliest tokens of every position, None where the server gives no log-probabilities.
    """

    answers: int
    tokens: int
    equal_tokens: int
    behind: float
    logprobs: int  # how many were compared
    logprob_mean: float | None
    logprob_largest: float | None
    tolerance: Tolerance


class Against(Section):
    """The served model against the reference of its export. Mean KL in nats over the first ten tokens and the rest:
    away, of the server from the artifact as evaluated, allowed up to `limit`; lost, of the server from the original;
    expected, of the artifact from the original.

    agreement: the share of positions at which the server ranks the original's likeliest token first, and what the
    evaluation saw. by_kind: `away` by the kind of prompt. perplexity: of the paragraph, and as evaluated.
    """

    positions: int = 0
    away: float | None = None
    lost: float | None = None
    expected: float | None = None
    agreement: float | None = None
    expected_agreement: float | None = None
    limit: float | None = None
    by_kind: dict[str, float] = Field(default_factory=dict)
    perplexity: float | None = None
    expected_perplexity: float | None = None


class Percentiles(Section):
    """Milliseconds."""

    p50: float
    p95: float
    p99: float


class Load(Section):
    """Requests that arrive at a fixed average rate, as `vllm bench serve` counts them.

    rate: requests a second; seconds: until the last answer. ttft_ms: time to first token; itl_ms: between chunks;
    tpot_ms: time a token after the first. goodput: requests a second that met both limits. error: the first of those
    that failed. what: whose, the artifact's or the original's.
    """

    what: Literal["artifact", "original"] = "artifact"
    rate: float
    seconds: float
    requests: int
    completed: int
    error: str | None
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    tpot_ms: Percentiles | None
    goodput: float
    limit_ttft_ms: float
    limit_tpot_ms: float
    requests_per_second: float
    tokens_per_second: float


class Serving(Section):
    """eval/serving.json: an artifact on a server. Latencies are of `requests` streamed answers, one at a time.

    ttft_ms: median time to first token; itl_ms: time between chunks with text; tokens_per_second {concurrent requests:
    rate}: generated tokens over the whole time, first tokens included; peak_rss_bytes: of all the server's processes.
    """

    schema_: Literal[1] = Field(1, alias="schema")
    server: str
    version: str | None
    artifact: str
    device: str  # of this machine
    command: tuple[str, ...]
    verdict: Literal["PASSED", "FAILED"]
    checks: tuple[Check, ...]
    agreement: Agreement | None
    against: Against | None = None  # None without a reference
    max_model_len: int
    load_seconds: float | None
    requests: int
    prompt_tokens: int | None
    ttft_ms: float | None
    itl_ms: Percentiles | None
    tokens_per_second: dict[int, float]
    peak_rss_bytes: int | None
    load: tuple[Load, ...] = ()
    log: str | None  # relative to the run folder

    def write(self, folder: Path) -> Path:
        """Write the record into a run folder; returns the file."""
        path = folder / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.model_dump(mode="json", by_alias=True))
        return path


def read(folder: Path) -> Serving | None:
    """The record in a run folder; None when there is none. Raises BadInput for one that cannot be read."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return Serving.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        said = first_problem(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise BadInput(f"{path}: not a record this quantpress can read: {said}") from error
