"""The same prompts continued by the original and by the artifact, side by side."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantpress.core.files import whole_file

from .results import Generation

Write = Callable[[Sequence[list[int]], int], list[list[int]]]  # prompts, most new tokens -> continuations


def side_by_side(
    original: Write, artifact: Write, tokenizer: Any, bos: int | None, prompts: Sequence[str], new_tokens: int
) -> tuple[Generation, ...]:
    """Greedy continuations of `prompts`, each with BOS (if given) before it, and where the two differ first."""
    front = [] if bos is None else [bos]
    given = [front + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    written = [write(given, new_tokens) for write in (original, artifact)]
    out = []
    for prompt, first, second in zip(prompts, *written, strict=True):
        parting = first_difference(first, second)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (first, second)]
        shared = tokenizer.decode(first[:parting], skip_special_tokens=True)
        characters = min(_alike(shared, text) for text in texts)
        out.append(
            Generation(
                prompt=prompt,
                original=texts[0],
                artifact=texts[1],
                tokens=new_tokens,
                first_difference=parting,
                shared_characters=characters,
            )
        )
    return tuple(out)


def remembered(folder: Path, what: Sequence[Any], write: Write) -> Write:
    """`write` with its answers cached in `folder`; what: everything that identifies the model and how it computes."""

    def answer(prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        key = hashlib.sha256(json.dumps([*what, list(prompts), new_tokens]).encode()).hexdigest()[:32]
        path = folder / f"{key}.json"
        if not path.is_file():
            written = write(prompts, new_tokens)
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write(json.dumps(written).encode())
        kept: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))
        return kept

    return answer


def _alike(first: str, second: str) -> int:
    """How many leading characters two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The index of the first token that differs, or that only one of the two has; None when they are equal."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return None if len(first) == len(second) else min(len(first), len(second))
