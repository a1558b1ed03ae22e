"""Damage drawn at random: always seen by checksums, mostly beside the original; what is seen without is printed."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantpress.exports.verify import verify

from . import runs

EACH = 12  # times that each kind is drawn


def flipped_bit(folder: Path, draw: random.Random) -> None:
    """One bit of any file."""
    file = draw.choice([f for f in sorted(folder.iterdir()) if f.is_file() and f.name != "manifest.json"])
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def of_tensors(change: Callable[[dict[str, Tensor], random.Random], None]) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, draw: random.Random) -> None:
        held = load_file(folder / "model.safetensors")
        change(held, draw)
        save_file({name: t.contiguous() for name, t in held.items()}, folder / "model.safetensors", {"format": "pt"})

    return damage


def scaled(held: dict[str, Tensor], draw: random.Random) -> None:
    """A float tensor, scales or weights, by a factor of a half to two, and at least a quarter off one."""
    name = draw.choice(sorted(n for n, t in held.items() if t.is_floating_point()))
    held[name] = (held[name].float() * draw.choice([0.5, 0.7, 1.3, 2.0])).to(held[name].dtype)


def exchanged(held: dict[str, Tensor], draw: random.Random) -> None:
    """Two tensors of one shape and type."""
    alike = [(a, b) for a in sorted(held) for b in sorted(held) if a < b and held[a].shape == held[b].shape
             and held[a].dtype == held[b].dtype and not torch.equal(held[a], held[b])]  # fmt: skip
    one, other = draw.choice(alike)
    held[one], held[other] = held[other], held[one]


def zeroed(held: dict[str, Tensor], draw: random.Random) -> None:
    """A page of a tensor."""
    name = draw.choice(sorted(n for n, t in held.items() if t.numel() * t.element_size() >= 512))
    flat = held[name].view(-1).view(torch.uint8)
    start = draw.randrange(max(1, len(flat) - 4096))
    flat[start : start + 4096] = 0


def setting(folder: Path, draw: random.Random) -> None:
    """A number in config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    key = draw.choice(sorted(k for k, v in config.items() if isinstance(v, int | float) and not isinstance(v, bool)))
    config[key] = config[key] * 2 or 3
    file.write_text(json.dumps(config))


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "a bit": flipped_bit, "scaled": of_tensors(scaled), "exchanged": of_tensors(exchanged),
    "zeroed": of_tensors(zeroed), "a setting": setting,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w4a16-rtn", "fp8-dynamic", "w4a16-gptq-sym-g64"])
def test_random_damage(recipe: str, tmp_path: Path, tell: Callable[[str], None]) -> None:
    model = runs.original(tmp_path / "model")
    whole = runs.make(recipe, model, tmp_path / "run") / "quantized"
    original = 0
    for kind, damage in KINDS.items():
        seen = {"checksums": 0, "itself": 0, "original": 0}
        for seed in range(EACH):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            damage(copy, random.Random(f"{kind} {seed}"))
            seen["checksums"] += bool(verify(copy).problems)
            document = json.loads((copy / "manifest.json").read_text())
            document["artifact"]["files"] = document["model"]["files"] = {}
            (copy / "manifest.json").write_text(json.dumps(document))
            seen["itself"] += bool(verify(copy).problems)
            seen["original"] += bool(verify(copy, original=model).problems)
        tell(f"{recipe}, {kind}: of {EACH} seen by checksums {seen['checksums']}, by itself {seen['itself']}, "
              f"beside the original {seen['original']}")  # fmt: skip
        assert seen["checksums"] == EACH
        assert seen["original"] >= seen["itself"]
        original += seen["original"] if kind != "a bit" else 0
    assert original >= 0.9 * EACH * (len(KINDS) - 1)
