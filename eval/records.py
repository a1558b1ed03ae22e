"""What a run wrote about itself: manifest.json and eval/results.json, checked as they are read."""

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from quantpress.quantize.errors import BadInput


class Record(BaseModel):
    """A part of what a run wrote; keys that are not shown here are left alone."""

    model_config = ConfigDict(frozen=True)


class Model(Record):
    """The original: where it came from and the sha256 of its files."""

    id: str
    kind: str
    revision: str | None
    caveat: str | None
    files: dict[str, str]


class Machine(Record):
    """What the run ran on."""

    cpu: str
    cores: int
    device: str
    memory_bytes: int


class CalibrationText(Record):
    """The text the rounding was fitted on: `samples` sequences of `seq_len` tokens."""

    source: str
    sha256: str
    samples: int
    seq_len: int
    tokens: int


class Artifact(Record):
    """Sizes of the weights on disk; `bits_per_parameter` counts what stays in 16 bit too."""

    format: str
    bytes: int
    original_bytes: int
    quantized_bits_per_weight: float
    bits_per_parameter: float
    parameters: int


class Timing(Record):
    """What quantizing took; `peak_rss_bytes` is the process's largest resident memory."""

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    per_block_seconds: tuple[float, ...]


class Linear(Record):
    """A linear layer of the manifest; `relative_error` is output error over output power, None when not measured."""

    name: str
    block: int | None
    shape: tuple[int, ...] = ()
    bits: float
    scheme: str
    relative_error: float | None = None
    note: str | None = None


class Manifest(Record):
    """manifest.json."""

    name: str
    model: Model
    recipe: dict[str, Any]
    quantpress: str
    versions: dict[str, str]
    machine: Machine
    calibration: CalibrationText | None
    seed: int
    layers: tuple[Linear, ...]
    fallbacks: tuple[str, ...]
    artifact: Artifact
    converted: tuple[str, ...]
    timing: Timing


class EvaluationText(Record):
    """The text both models were judged on, in `windows` of `window` tokens."""

    source: str
    sha256: str
    tokens: int
    windows: int
    window: int
    stride: int | None
    bos: bool


class Quality(Record):
    """One model on that text."""

    perplexity: float
    nll_stderr: float  # nats a token
    bits_per_byte: float
    bytes: int  # weights on disk

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.nll_stderr


class Divergence(Record):
    """KL divergence from the original's next-token distribution, nats a token, and how often the top token agrees."""

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_max: float
    top1_agreement: float


class Check(Record):
    """One gate of the recipe."""

    name: str
    limit: float
    value: float
    passed: bool


class GateReport(Record):
    """All gates; the verdict is NONE when the recipe sets none."""

    verdict: Literal["ACCEPT", "REGRESSION", "NONE"]
    checks: tuple[Check, ...]


class Results(Record):
    """eval/results.json; `perplexity_increase` is a fraction."""

    text: EvaluationText
    dtype: str
    device: str
    original: Quality
    artifact: Quality
    perplexity_increase: float
    divergence: Divergence
    gates: GateReport
    seconds: float


def read(folder: Path) -> tuple[Manifest, Results]:
    """The manifest and the results in a run folder.

    Raises BadInput, one line, when either is missing, is not JSON, or is of another schema.
    """
    manifest = _load(folder / "manifest.json", Manifest, f"{folder}: no manifest.json; is this a run folder?")
    missing = f"{folder}: no eval/results.json; evaluate the run first (quantpress eval {folder})"
    return manifest, _load(folder / "eval" / "results.json", Results, missing)


_R = TypeVar("_R", bound=Record)


def _load(path: Path, kind: type[_R], missing: str) -> _R:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(missing) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != 1:
        raise BadInput(f"{path}: schema {schema!r} is not 1; this quantpress cannot read it")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadInput(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
