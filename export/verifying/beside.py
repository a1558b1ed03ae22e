"""The files beside the weights: JSON that can be read, a tokenizer of this model, a chat template that works."""

from collections.abc import Iterator
from pathlib import Path

from quantpress.artifact.manifest import own_manifest
from quantpress.calibrate.chat_template import template_fault
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
    fault = template_fault(tokenizer)
    # With a manifest the template is known to be the original's, whatever that does with what a user says.
    if fault is not None and (fault.kind == "broken" or (fault.kind == "drops" and manifest is None)):
        yield f"{folder}: {fault.line}"
