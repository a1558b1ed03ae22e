"""What an evaluation measures, section by section, checked as it is written and read."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from quantpress.core.schema import Section

# A measured number. JSON has no infinity and no NaN: null stands for both and is read back as NaN.
Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
]
Interval = tuple[Number, Number]  # 95 % confidence interval, from sampling error alone
Verdict = Literal["ACCEPT", "REGRESSION", "INCONCLUSIVE", "NONE"]
_FAR, _FAR_FROM_TEXT = 1.0, 10.0  # KL on chats: nats, and times that on the text


class Subject(Section):
    """What was measured, and against what; paths as the user gave them."""

    kind: Literal["run", "artifact", "checkpoint", "served"]
    name: str
    format: str | None = None  # of its weights; None for a plain checkpoint, and where a server does not say
    original: str | None = None
    server: str | None = None  # the address of a served model


class EvaluationText(Section):
    """The text that both models were evaluated on: `windows` windows of `window` tokens.

    The last `stride` targets of each window are scored (all targets of the first). bos: whether each window starts with
    the BOS token. bos_tried: one window's perplexity with and without it, where `bos: auto` tried both. vocabulary,
    unigram_nll: what a uniform guess and the tokens' own frequencies score; see baselines.py.
    """

    source: str
    sha256: str
    tokens: int  # scored
    bytes: int = 0  # UTF-8 length of the scored tokens
    windows: int
    window: int
    stride: int | None
    bos: bool
    bos_tried: tuple[float, float] | None = None
    vocabulary: int | None = None
    unigram_nll: Number = math.nan  # nats per token


class Quality(Section):
    """The quality of one model on that text."""

    perplexity: Number  # per token
    nll: Number = math.nan  # nats per token
    nll_stderr: Number  # cluster-robust, as tokens are not independent; see statistics.py
    bits_per_byte: Number
    byte_perplexity: Number = math.nan  # 2 ** bits_per_byte: does not depend on the tokenizer
    bytes: int  # weights on disk; 0 when served

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.nll_stderr


class Bucket(Section):
    """The tokens at which the original's most likely next token had a probability in [low, high)."""

    low: float
    high: float
    tokens: int
    kl_mean: Number
    kl_stderr: Number
    top1_agreement: Number


class NoiseFloor(Section):
    """The original against itself, computed differently: a divergence this small says nothing about an artifact."""

    what: str
    kl_mean: Number
    kl_p99: Number
    top1_agreement: Number
    perplexity_increase: Number


class Divergence(Section):
    """KL divergence from the original's next-token distribution, nats per token, and how often the top token agrees."""

    kl_mean: Number
    kl_stderr: Number
    kl_interval: Interval | None = None
    kl_median: Number
    kl_p90: Number
    kl_p99: Number
    kl_p99_interval: Interval | None = None
    kl_max: Number
    top1_agreement: Number
    top1_stderr: Number = math.nan
    top1_interval: Interval | None = None
    confidence: tuple[Bucket, ...] = ()
    noise: NoiseFloor | None = None


class DomainResult(Section):
    """Both models on another text than the first; fields as there."""

    name: str
    text: EvaluationText
    original_perplexity: Number
    artifact_perplexity: Number
    perplexity_increase: Number
    perplexity_increase_interval: Interval | None = None
    kl_mean: Number
    kl_interval: Interval | None = None
    top1_agreement: Number
    top1_interval: Interval | None = None


class ByPrompt(Section):
    """The divergence on prompts as a server sees them, at the greedy answers' tokens: plain ones, and chats in the
    model's template, whose marks a text for evaluation does not hold. KL in nats over the likeliest tokens and the
    rest; top1_agreement: how often the artifact ranks the original's likeliest token first. Intervals are over prompts.
    """

    kind: Literal["raw", "chat"]
    positions: int
    kl_mean: Number
    kl_interval: Interval | None = None
    top1_agreement: Number
    top1_interval: Interval | None = None

    @property
    def name(self) -> str:
        """What it is, for tables."""
        return "chats in the template" if self.kind == "chat" else "plain prompts"


class Score(Section):
    """One model's mean score on a task."""

    value: Number
    stderr: Number


class TaskResult(Section):
    """One metric of one task. Differences are paired: both models answered the same `n` documents.

    difference: artifact minus original, with its standard error and interval. lost, won: how many answers that were
    right became wrong, and the other way round; None where answers are not right or wrong. flips: the share of answers
    that changed either way. recovery: the artifact's score as a
    fraction of the original's; None without an original, or when that scores 0.
    """

    task: str
    metric: str
    higher_is_better: bool
    few_shot: int
    n: int
    sha256: str  # of the documents with their prompts, including few-shot examples
    artifact: Score
    original: Score | None = None
    difference: Number | None = None
    difference_stderr: Number | None = None
    difference_interval: Interval | None = None
    recovery: Number | None = None
    recovery_interval: Interval | None = None
    lost: int | None = None
    won: int | None = None
    flips_interval: Interval | None = None

    @property
    def flips(self) -> float | None:
        return None if self.lost is None or self.won is None else (self.lost + self.won) / self.n


class Speed(Section):
    """Tokens per second at one batch size and context, all sequences together; *_stderr over `repeats` repeats."""

    batch: int
    context: int  # prompt tokens per sequence
    repeats: int
    prefill_tokens_per_second: Number
    prefill_stderr: Number
    decode_tokens_per_second: Number
    decode_stderr: Number


class Runtime(Section):
    """What it took to load and run one model. what: the program that ran it, for which alone the figures hold.

    peak_rss_bytes: largest resident memory while loading and running; peak_vram_bytes: largest allocation on a GPU.
    """

    what: str
    device: str
    dtype: str
    threads: int
    load_seconds: Number
    peak_rss_bytes: int
    peak_vram_bytes: int | None = None
    speed: tuple[Speed, ...] = ()


class KvCache(Section):
    """The key-value cache of one sequence, from the config; layers with a sliding window stop growing there (the
    largest of several)."""

    dtype: str
    bytes_per_token: int  # within the sliding window
    bytes_per_token_past_window: int | None = None  # None without sliding windows
    sliding_window: int | None = None
    state_bytes: int = 0  # of recurrent layers, whatever the length
    context: int  # tokens
    bytes_at_context: int


class Fit(Section):
    """How many sequences of `context` tokens fit a GPU beside the weights; 0: none."""

    gpu: str
    memory_bytes: int
    context: int
    concurrency: int


class Cost(Section):
    """What a million tokens cost on hardware at `per_hour`; formula: the calculation with its numbers."""

    per_hour: float
    per_million_decoded: Number
    per_million_prefilled: Number
    formula: str


class Efficiency(Section):
    """Size, memory and speed of the artifact."""

    bytes: int  # weights on disk
    original_bytes: int | None = None
    parameters: int
    bits_per_parameter: float  # the whole model, including what stays in 16 bit
    bits_per_weight: float | None = None  # per quantized weight, including its scales and zero points
    runtime: Runtime | None = None
    original_runtime: Runtime | None = None
    cache: KvCache | None = None
    fits: tuple[Fit, ...] = ()
    cost: Cost | None = None


class Repeat(Section):
    """The figures of one of several runs of a recipe, by the seed of its calibration."""

    seed: int
    perplexity: Number
    perplexity_increase: Number
    kl_mean: Number
    top1_agreement: Number


class Generation(Section):
    """Greedy continuations of one prompt by both models.

    first_difference: index of the first new token that differs, None if all agree. shared_characters: length of the
    text before it.
    """

    prompt: str
    original: str
    artifact: str
    tokens: int  # limit on new tokens
    first_difference: int | None
    shared_characters: int


class GateCheck(Section):
    """One gate of the recipe. INCONCLUSIVE: the limit lies within the interval, so the noise exceeds the margin."""

    name: str  # min_recovery.<task> for a task
    limit: float
    value: Number | None  # None when it could not be measured
    interval: Interval | None = None
    verdict: Literal["ACCEPT", "REGRESSION", "INCONCLUSIVE"]
    reason: str
    needs: int | None = None  # windows or questions that would settle it, where more could


class GateReport(Section):
    """All gates. verdict: the worst of the checks, NONE without gates. strict: INCONCLUSIVE fails the run, too."""

    verdict: Verdict = "NONE"
    reason: str = "the recipe sets no gates"
    strict: bool = False
    checks: tuple[GateCheck, ...] = ()

    @property
    def missed(self) -> bool:
        """Whether the gates fail the run."""
        return self.exit_code != 0

    @property
    def exit_code(self) -> int:
        """Of the command that judged: 3 for a gate that was missed, 4 for one that is too close to call, else 0."""
        if self.verdict == "REGRESSION":
            return 3
        return 4 if self.strict and self.verdict == "INCONCLUSIVE" else 0


class Figures(Section):
    """All that an evaluation measured, and what its gates say. perplexity_increase: a fraction.

    A section that was not measured is None or empty. An interrupted evaluation keeps the sections it finished, with
    `complete` false. repeats: the runs whose means these figures are, this artifact's own first; empty for one run.
    """

    schema_: Literal[2] = Field(2, alias="schema")
    complete: bool = True
    subject: Subject | None = None
    text: EvaluationText | None = None
    dtype: str
    device: str
    original: Quality | None = None
    artifact: Quality | None = None
    perplexity_increase: Number | None = None
    perplexity_increase_interval: Interval | None = None
    divergence: Divergence | None = None
    domains: tuple[DomainResult, ...] = ()
    prompts: tuple[ByPrompt, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    efficiency: Efficiency | None = None
    generations: tuple[Generation, ...] = ()
    repeats: tuple[Repeat, ...] = ()
    gates: GateReport = GateReport()
    notes: tuple[str, ...] = ()  # what was asked for and could not be measured, with the reason
    seconds: float

    @property
    def warnings(self) -> list[str]:
        """A line where chats fare far worse than the text that was evaluated, which its figures do not show."""
        text = None if self.divergence is None else self.divergence.kl_mean
        return [
            f"chats: KL {one.kl_mean:.2f} from the original over {one.positions} tokens of answers, and {text:.3f} on "
            "the evaluation's text: what only chats hold, such as the template's marks, is more than the artifact can "
            "represent (static input scales?)"
            for one in self.prompts
            if one.kind == "chat" and text is not None and one.kl_mean > max(_FAR, _FAR_FROM_TEXT * text)
        ]
