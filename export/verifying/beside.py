"""The files beside the weights: JSON that can be read, a tokenizer of this model, a chat template that works."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from quantpress.artifact.manifest import own_manifest
from quantpress.calibrate.tokens import check_vocabulary, open_tokenizer
from quantpress.core.errors import BadInput
from quantpress.core.files import changed
from quantpress.models.checkpoint import INDEX

from .listing import broken_json

_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
# A file that holds a vocabulary; the others that a tokenizer has only describe it.
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.*.model", "vocab.*", "*.tiktoken", "*.spm",
    "tekken.json",
)  # fmt: skip
_SAID = "Hello, who are you?"


def companions_of(folder: Path, rows: int | None) -> Iterator[str]:
    """A line for each file beside the weights that is damaged, absent or not the original's.

    rows: of the model's embedding, None where it is not known.
    """
    yield from broken_json(folder)
    manifest = own_manifest(folder)
    if manifest is not None:
        files = manifest.model.files.items()
        beside = {n: d for n, d in files if not n.endswith(_WEIGHTS) and n not in ("config.json", INDEX)}
        lost = list(changed(folder, beside))
        yield from (f"{folder}: {name}, which the original has, {what}" for name, what in lost)
        if lost:  # what it leaves of the tokenizer says no more
            return
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab.*")):
        if manifest is None:
            yield f"{folder}: no tokenizer: servers start with one, or not at all"
        return
    if not any(file for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        yield f"{folder}: a tokenizer without its vocabulary: none of {', '.join(_VOCABULARIES[:3])}, … is there"
        return
    try:
        tokenizer = open_tokenizer(folder)
        if rows is not None:
            check_vocabulary(tokenizer, rows)
    except BadInput as error:
        if "its own code" not in str(error):
            yield str(error)
        return
    yield from _template(folder, tokenizer)


def _template(folder: Path, tokenizer: Any) -> Iterator[str]:
    """The default chat template can be parsed and hands on what a user says."""
    template = getattr(tokenizer, "chat_template", None)
    if not template or (isinstance(template, dict) and "default" not in template):
        return
    reasons = []
    for content in (_SAID, [{"type": "text", "text": _SAID}]):
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except TemplateSyntaxError as error:
            yield f"{folder}: the chat template is broken: {' '.join(str(error).split())[:160]}"
            return
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            reasons.append(" ".join(str(error).split())[:160])
            continue
        if _SAID in text:
            return
        reasons.append("what the user says is not in its text")
    yield f"{folder}: the chat template fails on a user's message: {reasons[0]}"
