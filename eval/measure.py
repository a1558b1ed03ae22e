"""The evaluation of one artifact against its original, both read from disk."""

from collections.abc import Callable
from pathlib import Path

from quantpress.quantize import machine
from quantpress.quantize.artifact import open_artifact
from quantpress.quantize.calibration import open_tokenizer
from quantpress.quantize.checkpoint import Checkpoint
from quantpress.quantize.errors import BadInput
from quantpress.quantize.model import Skeleton
from quantpress.quantize.recipe import Evaluation, Gates
from quantpress.quantize.texts import load_documents

from .divergence import Windows, compare, windows
from .gates import judge
from .records import Results


def evaluation_text(original: Path, wanted: Evaluation, cache: Path, trust_remote_code: bool = False) -> Windows:
    """The windows that are scored. Raises BadInput when the text is missing or too short, or there is no tokenizer."""
    text = load_documents(wanted, cache=cache, role="evaluation")
    tokenizer = open_tokenizer(original, trust_remote_code)
    return windows(tokenizer, "\n\n".join(text.documents), text.source, wanted)


def evaluate(
    original: Path,
    artifact: Path,
    text: Windows,
    gates: Gates,
    on_block: Callable[[int], None] = lambda blocks: None,
) -> Results:
    """The results of the artifact folder against the original's; `on_block(total)` is called as blocks of either model
    finish.

    Raises BadInput when the two are not the same model.
    """
    device = machine.device()
    checkpoint = Checkpoint(original)
    plain = Skeleton(checkpoint, device=device)
    reader, quantized = open_artifact(artifact, device, plain.dtype)
    if quantized.n_blocks != plain.n_blocks or quantized.config.vocab_size != plain.config.vocab_size:
        raise BadInput(f"{artifact} is not a version of {original}: their blocks or vocabularies differ in number")
    results = compare(plain, quantized, text, lambda: on_block(2 * plain.n_blocks))
    results["original"]["bytes"] = checkpoint.total_bytes
    results["artifact"]["bytes"] = reader.checkpoint.total_bytes
    measured = Results.model_validate(results)
    return measured.model_copy(update={"gates": judge(gates, measured)})
