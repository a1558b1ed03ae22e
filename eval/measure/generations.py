"""The same prompts continued by the original and by the artifact, side by side."""

from collections.abc import Callable, Sequence
from typing import Any

from quantpress.core.text import common_prefix

from .sections import Generation

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
        characters = min(common_prefix(shared, text) for text in texts)
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


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The index of the first token that differs, or that only one of the two has; None when they are equal."""
    return None if list(first) == list(second) else common_prefix(first, second)
