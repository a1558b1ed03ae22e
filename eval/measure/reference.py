"""The original's hidden states over the evaluation windows, computed once and cached for every artifact compared.

The cache holds the output of the last block in the model's own dtype. From it the head gives the same logits, bit for
bit; for a vocabulary of 49152 and a hidden size of 576 it takes 1/170 of the space of float32 logits. The file is
mapped into memory, and logits are computed for a few hundred tokens at a time.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantpress.artifact.artifact import open_original
from quantpress.calibrate.tokens import Tokens
from quantpress.core import machine
from quantpress.core.files import fingerprint, intact, seal, whole_folder
from quantpress.models.skeleton import Skeleton

from .divergence import Windows, compare, divergence, last_hidden, perplexity_increase
from .sections import NoiseFloor

_LAYOUT = "3"  # raise when what is computed, or how it is stored, changes
_KEPT = 16  # cached originals; the least recently used are deleted
_NOISE_WINDOWS = 4


def reference(
    original: Skeleton,
    folder: Path,
    text: Windows,
    cache: Path,
    on_block: Callable[[], None] = lambda: None,
    *,
    noise: bool = True,
) -> tuple[Tensor, NoiseFloor | None]:
    """Hidden states [windows, window, hidden] of the original in `folder`, and its noise floor; opens its shell.

    noise: whether to measure the noise floor, which runs the original once more in float32.

    From the cache when the same weights were run over the same windows before, in the same dtype, with the same
    versions of torch and transformers, on the same kind of device. on_block is called once per block in either case.
    """
    place = cache / "reference" / (_key(original, folder, text) + ("" if noise else "-only"))
    if intact(place):
        os.utime(place)
        original.open_shell()
        for _ in range(original.n_blocks):
            on_block()
    else:
        hidden = last_hidden(original, text.tokens.ids, on_block)
        floor = _noise(original, folder, hidden, text) if noise else None
        with whole_folder(place) as new:
            with (new / "hidden.bin").open("wb") as file:
                for window in hidden:
                    file.write(window.contiguous().view(torch.uint8).numpy().data)
            if floor is not None:
                (new / "noise.json").write_text(floor.model_dump_json(), encoding="utf-8")
            seal(new)
        _forget_old(place.parent)
    ids = text.tokens.ids
    width = (place / "hidden.bin").stat().st_size // (ids.numel() * original.dtype.itemsize)
    shape = (*ids.shape, width)
    mapped = torch.from_file(str(place / "hidden.bin"), size=ids.numel() * width, dtype=original.dtype)
    if not noise:
        return mapped.view(shape), None
    return mapped.view(shape), NoiseFloor.model_validate(json.loads((place / "noise.json").read_text("utf-8")))


def _noise(original: Skeleton, folder: Path, hidden: Tensor, text: Windows) -> NoiseFloor:
    """The original in its own dtype against itself in float32; a float32 model against itself in other batches."""
    n = min(_NOISE_WINDOWS, len(text.scored))
    ids = text.tokens.ids[:n]
    few = replace(text, tokens=Tokens(ids, text.tokens.source, text.tokens.bos), scored=text.scored[:n])
    _, other = open_original(folder, original.device, torch.float32)
    own = str(original.dtype).removeprefix("torch.")
    if original.dtype == torch.float32:
        again = torch.cat([last_hidden(other, row[None], lambda: None) for row in ids])
        what = "float32, one window at a time instead of a batch"
    else:
        again = last_hidden(other, ids, lambda: None)
        what = f"{own} against float32"
    scores = compare((original, other), (hidden[:n], again), few)
    away = divergence(scores)
    return NoiseFloor(
        what=f"{what}, {len(scores.kl):,} tokens",
        kl_mean=away.kl_mean,
        kl_p99=away.kl_p99,
        top1_agreement=away.top1_agreement,
        perplexity_increase=perplexity_increase(scores.original_nll, scores.artifact_nll, few)[0],
    )


def _key(original: Skeleton, folder: Path, text: Windows) -> str:
    """Hash of everything that the hidden states depend on."""
    scored = text.scored.tolist()
    libraries = machine.libraries()
    parts = (_LAYOUT, libraries, str(original.dtype), original.device.type, text.tokens.sha256, scored)
    return hashlib.sha256(json.dumps([*parts, fingerprint(folder)]).encode()).hexdigest()[:32]


def _forget_old(folder: Path) -> None:
    kept = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.stat().st_mtime)
    for old in kept[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
