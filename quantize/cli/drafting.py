"""`quantpress eval RUN --draft`: the artifact as the draft of its original in speculative decoding."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.files import write_json
from .options import cache_folder, out_console, progress_bar

if TYPE_CHECKING:
    from quantpress.eval.measure.divergence import Windows


def draft(original: Path, artifact: Path, text: "Windows", out: Path, as_json: bool) -> None:
    """Measure it, write `out`/eval/draft.json and print it."""
    from quantpress.eval.measure.draft import measure_draft

    done = 0
    with progress_bar("drafting", 0) as advance:

        def on_block(total: int) -> None:
            nonlocal done
            done += 1
            advance(done, "", total)

        found = measure_draft(original, artifact, text, cache_folder(), on_block)
    document = found.model_dump(mode="json", by_alias=True)
    (out / "eval").mkdir(parents=True, exist_ok=True)
    write_json(out / "eval" / "draft.json", document)
    if as_json:
        print(json.dumps(document))  # noqa: T201
        return
    for name, accepted in (("sampled", found.sampled), ("greedy", found.greedy)):
        passes = ", ".join(f"{tokens:.2f} with {n}" for n, tokens in accepted.tokens_a_pass.items())
        out_console.print(
            f"{name:<11} {accepted.rate:.1%} +- {accepted.stderr:.1%} of drafted tokens accepted; tokens a pass of the "
            f"original: {passes} drafted"
        )
    out_console.print(f"draft       {out / 'eval' / 'draft.json'}")
