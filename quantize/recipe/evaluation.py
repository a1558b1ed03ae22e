"""What is measured on the artifact: perplexity and divergence, tasks, continuations, memory and speed."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..core.schema import Strict, named
from .text import Text

# Memory in MiB as the driver reports it: less than nominal where error correction takes a part.
GPUS: dict[str, int] = {
    "T4": 15360, "L4": 23034, "A10G": 23028, "RTX 3090": 24576, "RTX 4090": 24564, "RTX 5090": 32607, "L40S": 46068,
    "A100 40GB": 40960, "A100 80GB": 81920, "H100 80GB": 81559, "H200": 143771, "B200": 183359, "MI300X": 196592,
}  # fmt: skip


class Task(Strict):
    """A task of lm-eval by its name, or a local one by its YAML file (see lm-eval's task guide)."""

    name: str | None = Field(None, min_length=1, description="of a task or group that lm-eval knows, such as arc_easy")
    file: str | None = Field(
        None,
        description="a task's YAML file; its data_files are relative to its folder. It may run code: review it first",
    )
    few_shot: int | None = Field(None, ge=0, description="examples before each question; null: the task's own number")
    limit: int | None = Field(None, ge=1, description="the first documents only; null: all")
    metric: str | None = Field(None, description="the metric to report, such as acc_norm; null: all that are averages")

    @model_validator(mode="after")
    def _is_named_once(self) -> Self:
        if (self.name is None) == (self.file is None):
            raise ValueError("a task has either a `name` that lm-eval knows or a `file`")
        return self

    @property
    def label(self) -> str:
        """What results and gates call it."""
        return self.name or Path(self.file or "").stem


class Timing(Strict):
    """How fast the dequantized model runs in transformers on the machine at hand; a server's kernels are not timed."""

    batches: tuple[int, ...] = Field((1,), min_length=1, strict=False, description="sequences at once")
    contexts: tuple[int, ...] = Field((128, 1024), min_length=1, strict=False, description="tokens of the prompt")
    new_tokens: int = Field(16, ge=2, description="tokens decoded after the prompt")
    repeats: int = Field(3, ge=2, description="timed runs, after one for warm-up")

    @field_validator("batches", "contexts")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(item < 1 for item in value):
            raise ValueError("numbers have to be 1 or more")
        return value


class EfficiencySettings(Strict):
    """Memory and speed of the artifact."""

    context: int = Field(
        4096, ge=1, description="tokens a sequence, for the size of the key-value cache and what fits on a GPU"
    )
    gpus: tuple[str, ...] = Field(
        ("L4", "RTX 4090", "L40S", "A100 80GB", "H100 80GB"),
        strict=False,
        description=f"GPUs to compute the number of concurrent sequences for, of: {', '.join(GPUS)}",
    )
    timing: Timing | None = Field(None, description="time prefill and decoding, {} with defaults; null: not timed")
    price_per_hour: float | None = Field(
        None, gt=0, strict=False, description="of the machine that is timed, in any currency: gives a price per token"
    )

    @field_validator("gpus")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in GPUS:
                raise ValueError(f"no GPU {name!r} in the table; there are {', '.join(GPUS)}")
        return value

    @model_validator(mode="after")
    def _a_price_needs_a_speed(self) -> Self:
        if self.price_per_hour is not None and self.timing is None:
            raise ValueError("price_per_hour needs a measured speed: add `timing: {}`")
        return self


class UntilClear(Strict):
    """How far an evaluation goes on while a gate is too close to call; each step measures at least twice as much."""

    windows: int = Field(128, ge=1, description="of the text, at most")
    questions: int = Field(2000, ge=1, description="of each task that a gate limits, at most")


class Domain(Text):
    """Another text that both models are measured on, beside the first: another domain, language or length."""

    name: str | None = Field(None, min_length=1, description="what the report calls it; default: the source")
    source: str = Field(
        "calibration",
        description="as for evaluation; `calibration`: a part of the calibration's text that it does not calibrate on",
    )
    split: str = Field("test", description="dataset split")
    windows: int = Field(4, ge=2, description="number of windows")
    window: int | None = Field(None, ge=16, description="tokens a window; default: the evaluation's")

    @property
    def label(self) -> str:
        """What results and the report call it."""
        return self.name or Path(self.source).stem


def _domain(value: object) -> object:
    """`code` is `{source: code}`."""
    return {"source": value} if isinstance(value, str) else value


_NamedDomain = Annotated[Domain, BeforeValidator(_domain, json_schema_input_type=Domain | str)]


class Evaluation(Text):
    """Perplexity and divergence from the original over windows of one text, tasks, continuations of a few prompts,
    memory and speed.
    """

    split: str = Field("test", description="dataset split")
    windows: int = Field(16, ge=1, description="number of windows, from the start of the text")
    window: int = Field(1024, ge=16, description="tokens a window")
    stride: int | None = Field(None, ge=1, description="tokens between window starts; default: the window")
    tasks: tuple[Annotated[Task, BeforeValidator(named, json_schema_input_type=Task | str)], ...] = Field(
        (), strict=False, description="tasks of lm-eval; needs the extra quantpress[tasks]"
    )
    until_clear: UntilClear | None = Field(
        None, description="measure more while a gate is too close to call, {} with defaults; null: stop at `windows`"
    )
    domains: tuple[_NamedDomain, ...] | None = Field(
        None,
        strict=False,
        description="further texts, such as [calibration, code, multilingual] or {name: long, source: default, window: "
        "8192}; null: `calibration` where no further download is needed; []: none",
    )
    prompts: tuple[str, ...] = Field(
        (
            "The capital of France is",
            "Water boils at a lower temperature on a mountain because",
            "def fibonacci(n):\n",
        ),
        strict=False,
        description="prompts that both models continue greedily, side by side; []: none",
    )
    new_tokens: int = Field(40, ge=1, description="at most, for each continuation")
    efficiency: EfficiencySettings = Field(EfficiencySettings(), description="memory, cache size and speed")

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride {self.stride} is larger than window {self.window}: tokens would be left out")
        if self.source == "self":
            raise ValueError("`self` is a calibration source; evaluate on text the model did not write")
        if any(domain.source == "self" for domain in self.domains or ()):
            raise ValueError("domains: `self` is a calibration source; evaluate on text the model did not write")
        names = [domain.label for domain in self.domains or ()]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"domains: {repeated} is listed twice; give one of them another `name`")
        labels = [task.label for task in self.tasks]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"tasks: {label} is listed twice")
        return self
