"""Whether an artifact is a version of its original, and every tensor of it accounted for."""

from pathlib import Path

from quantpress.core.errors import BadInput
from quantpress.models.skeleton import Skeleton


def check_same_model(plain: Skeleton, quantized: Skeleton, artifact: Path, original: Path) -> None:
    """Raise BadInput unless both have the same number of blocks and the same vocabulary."""
    if quantized.n_blocks != plain.n_blocks or quantized.config.vocab_size != plain.config.vocab_size:
        raise BadInput(
            f"{artifact} is not a version of {original}: they differ in the number of blocks or the vocabulary"
        )


def unplaced(plain: Skeleton, quantized: Skeleton, artifact: Path) -> str | None:
    """A line on the tensors of the artifact that neither the model nor the original has a place for; None without any.

    Raises BadInput for one beside a weight: a scale or zero point, without which the weight is not what it looks like.
    """
    own = set(plain.unused)
    beyond = [name for name in quantized.unused if name not in own]
    for name in beyond:
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight in quantized.reader:
            raise BadInput(
                f"{artifact}: {name} lies beside {weight}, and nothing says how they belong together: the weight may "
                "be codes of a format that config.json does not name; give an artifact whose config.json does"
            )
    if not beyond:
        return None
    more = f" and {len(beyond) - 1} more" if beyond[1:] else ""
    return f"{beyond[0]}{more}: the model has no place for this, so it was passed over"
