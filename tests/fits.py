"""What `fit` proposes for well-known models on several cards, from their configs alone: docs/fits.json, for a page.

    make fit-table

Run again where fit, a server's contract or the configs change; a test compares one row.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantpress.eval.release.fit import fit

DOCS = Path(__file__).parent.parent / "docs"
CONFIGS, TABLE = DOCS / "configs", DOCS / "fits.json"
MODELS = ("Llama-3.1-8B", "Mistral-Small-24B", "Gemma-3-27B", "Qwen3-30B-A3B", "Qwen3-32B", "Llama-3.3-70B")
CARDS = ("RTX 4090", "RTX 5090", "L40S", "A100 80GB", "B200")
CONTEXT, CONCURRENCY = 8192, 8


def row(model: str, cards: Sequence[str] = CARDS) -> dict[str, Any]:
    """What is proposed for each card, with the bytes of its weights and those that they may take."""
    found: dict[str, Any] = {}
    for card in cards:
        proposal = fit(
            str(CONFIGS / f"{model}.json"), gpu=card, context=CONTEXT, concurrency=CONCURRENCY, config_only=True
        )
        choice = proposal.choice
        found["original"] = proposal.original_bytes
        found[card] = {"room": proposal.room} | ({} if choice is None else {"name": choice.name, "bytes": choice.bytes})
    return found


def main() -> None:
    table: dict[str, Any] = {"context": CONTEXT, "concurrency": CONCURRENCY, "rows": {}}
    for model in MODELS:
        table["rows"][model] = row(model)
        sys.stdout.write(f"{model}: {json.dumps(table['rows'][model])}\n")
        sys.stdout.flush()
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
