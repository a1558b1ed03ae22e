"""Finished runs of recipes on a tiny model, for tests of what is said of their artifacts."""

from pathlib import Path
from typing import Any

import torch
import yaml

from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.recipe.loading import parse

from ...quantize.gguf import models
from ...tiny import text

ROOT = Path(__file__).parents[3]
RECIPES = {
    path.stem: path for folder in ("recipes", "tests/recipes") for path in sorted((ROOT / folder).rglob("*.yaml"))
}
SHIPPED = sorted(path.stem for path in (ROOT / "recipes").rglob("*.yaml"))
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
_SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip


def original(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """A tiny model, wide enough for every recipe, with norms of its own and a chat template."""
    models.build(family, folder, dtype=torch.bfloat16, **(_SIZES | {"tie_word_embeddings": False} | settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def make(recipe: str, model: Path, out: Path, **changes: Any) -> Path:
    """The run of a recipe on `model`, with little calibration, nothing exported and nothing measured."""
    document: dict[str, Any] = yaml.safe_load(RECIPES[recipe].read_text(encoding="utf-8"))
    words = out.with_suffix(".txt")
    words.parent.mkdir(parents=True, exist_ok=True)
    words.write_text(text())
    kept = {key: document[key] for key in document if key not in ("targets", "evaluation", "gates", "smoke")}
    calibration = {"samples": 4, "seq_len": 32, "source": str(words), "chat_template": False}
    asked = kept | {"name": recipe, "model": str(model), "evaluation": None} | changes
    if "calibration" in kept or _calibrated(kept):
        asked["calibration"] = {k: v for k, v in kept.get("calibration", {}).items() if k == "bos"} | calibration
    parsed = parse(asked)
    cache = out.parent / "cache"
    quantize(prepare(parsed, resolve(parsed.model, cache=cache)), Settings(out, cache, ignore_limits=True))
    return out


def _calibrated(document: dict[str, Any]) -> bool:
    return parse(document | {"model": "x/y"}).calibrated
