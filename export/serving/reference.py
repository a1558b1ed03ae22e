"""reference.json: what the original answers and what the artifact did when it was evaluated, to hold a server to.

It travels with every export. With it a served model is judged without the original, the weights or torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from quantpress.core.errors import BadInput
from quantpress.core.files import whole_file
from quantpress.core.schema import Section, first_problem

FILE = "reference.json"
_SMALLEST = 1e-6  # of a probability, so that logarithms are finite

Kind = Literal["raw", "chat", "long", "long chat"]
Tops = tuple[tuple[float, ...], ...]  # [tokens of the answer, likeliest tokens]: log-probabilities


class Asked(Section):
    """A prompt with the original's greedy answer.

    kind: chat prompts went through the original's chat template, long ones begin with the paragraph. text: what was
    asked; ids: the tokens the original's tokenizer makes of it. answer: of the original, up to and with the end token.
    top: the original's likeliest tokens where each token of the answer stands; original, artifact: log-probabilities of
    these tokens by both models, in float32.
    """

    kind: Kind
    text: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    answer_text: str
    top: tuple[tuple[int, ...], ...]
    original: Tops
    artifact: Tops

    @property
    def chat(self) -> bool:
        return self.kind.endswith("chat")

    @property
    def long(self) -> bool:
        return self.kind.startswith("long")


class Paragraph(Section):
    """A text that means something to the model: of the built-in ones that which the original finds likeliest.

    It stands alone or as the answer in a chat. original, artifact: log-probabilities of ids[start:].
    """

    text: str
    ids: tuple[int, ...]
    start: int
    original: tuple[float, ...]
    artifact: tuple[float, ...]


class RoundTrip(Section):
    """A string that tokenizers get wrong: its ids, and the text that the original's tokenizer makes of them."""

    text: str
    ids: tuple[int, ...]
    decoded: str


class Noise(Section):
    """How far the artifact is from itself when its kernel computes otherwise: mean KL over all positions, nats.

    bfloat16: weights and activations in 16 bit. rounded_inputs: the inputs of all linears rounded to int8, as 4-bit
    kernels of CPUs and llama.cpp do. The two of `farther`: by how much each takes it away from the original, beyond
    chance; nothing where the artifact itself is as noisy. None: not measured.
    """

    bfloat16: float
    rounded_inputs: float
    farther_bfloat16: float | None = None
    farther_rounded_inputs: float | None = None


class Reference(Section):
    """reference.json, schema 1.

    artifact: the digest of the artifact's files (`Sizes.digest`), None of one without a manifest. bos: the token that
    the original's tokenizer puts first, None without one. ends: those at which its answers end, the one that ends a
    turn of its chats first. chat_template: sha256 of the original's, None without one;
    dated: whether it writes today's date. static_inputs: whether the artifact rounds inputs by static ranges. gguf:
    whether it is a GGUF file, whose servers round all inputs to int8.
    sampling: the generation_config's advice. evaluated: what the evaluation measured on its own text, such as kl_mean.
    """

    schema_: Literal[1] = Field(1, alias="schema")
    model: str
    artifact: str | None = None
    libraries: Mapping[str, str]
    bos: int | None
    ends: tuple[int, ...] = ()
    chat_template: str | None
    dated: bool = False
    static_inputs: bool = False
    gguf: bool = False
    asked: tuple[Asked, ...]
    paragraph: Paragraph | None
    round_trips: tuple[RoundTrip, ...]
    noise: Noise
    sampling: Mapping[str, Any] = {}
    evaluated: Mapping[str, float | None] = {}

    def write(self, path: Path) -> None:
        """Write it without white space: tens of kilobytes."""
        with whole_file(path) as file:
            document = self.model_dump(mode="json", by_alias=True)
            file.write((json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n").encode())


def find_reference(path: Path) -> Path | None:
    """The reference that belongs to a folder: an export's, a run's, or that of the model folder inside one."""
    folder = path if path.is_dir() else path.parent
    places = [above / name for above in (folder, folder.parent) for name in (FILE, Path("eval") / FILE)]
    return next((place for place in places if place.is_file()), None)


def read_reference(path: Path) -> Reference:
    """The reference in a file, or in the folder of an export or a run. Raises BadInput where there is none."""
    file = path if path.is_file() else find_reference(path)
    if file is None:
        raise BadInput(
            f"{path}: no {FILE}; `quantpress run` and `quantpress eval` write one into the run's eval/, and "
            "`quantpress export` packs it into the export"
        )
    try:
        return Reference.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        said = first_problem(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise BadInput(f"{file}: not a reference this quantpress can read: {said}") from error


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q) in nats, from the log-probabilities of the same few tokens; all other tokens count as one.

    At most the divergence over the whole vocabulary (the data-processing inequality), and 0 where the two agree.
    """
    total, rest_p, rest_q = 0.0, 1.0, 1.0
    for a, b in zip(p, q, strict=True):
        total += math.exp(a) * (a - max(b, math.log(_SMALLEST)))
        rest_p, rest_q = rest_p - math.exp(a), rest_q - math.exp(b)
    if rest_p > _SMALLEST:
        total += rest_p * math.log(rest_p / max(rest_q, _SMALLEST))
    return max(0.0, total)
