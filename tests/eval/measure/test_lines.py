"""The terminal and a notebook say the same, in the figures of the page."""

from pathlib import Path
from typing import Any

from quantpress.eval.measure.lines import lines
from quantpress.eval.measure.results import Results
from quantpress.eval.report.page import write_report

from ..report.test_report import fake_manifest, write_run
from ..report.test_sections import full_results, words

PROMPTS: list[dict[str, Any]] = [
    {"kind": "raw", "positions": 21, "kl_mean": 0.05, "kl_interval": [0.01, 0.09], "top1_agreement": 0.9,
     "top1_interval": [0.8, 1.0]},
    {"kind": "chat", "positions": 1111, "kl_mean": 3.6, "kl_interval": [2.9, 4.3], "top1_agreement": 0.2,
     "top1_interval": [0.1, 0.3]},
]  # fmt: skip


def test_every_figure_is_a_line_for_the_terminal_and_a_row_of_the_notebook() -> None:
    results = Results.model_validate(full_results() | {"prompts": PROMPTS})
    said = list(lines(results))
    for line in (
        ("Perplexity", "17.05 → 18.40 (+7.9 %, 95 %: +5.0 to +11.0 %)"),
        ("noise floor of the divergence", "KL 0.00134"),
        ("on chats in the template", "KL 3.60 (2.90 to 4.30), same next token 20.0 % of 1,111"),
        ("speed of the artifact", "batch 1, context 128: prefill 1,535, decode 40.0 tokens/s"),
        ("continued", "'The capital <b>': different from token 3"),
    ):
        assert line in said
    (piqa,) = (told for name, told in said if name == "piqa acc")
    assert piqa.startswith("70.0 → 71.0 ± ")
    assert "+1.0 (−5.0 to +1.0) points, recovery " in piqa
    shown = results._repr_html_()
    assert all(told.replace("'", "&#x27;").replace("<b>", "&lt;b&gt;") in shown for _, told in said)
    assert not any("\u00a0" in told for _, told in said)


def test_the_page_shows_prompts_and_what_could_not_be_measured(tmp_path: Path) -> None:
    more = {"prompts": PROMPTS, "notes": ["timing: it does not fit"], "domains": []}
    text = words(write_report(write_run(tmp_path / "run", fake_manifest(), full_results() | more)).parent)
    assert "chats in the template3.60 2.90 to 4.3020.0 % 10.0 to 30.0 %" in text
    assert "chats in the template: 1,111 tokens of the original's greedy answers" in text
    assert "chats: KL 3.60 from the original" in text.split("Warnings and fallbacks")[1]
    assert "timing: it does not fit" in text
    assert "Look closer: " in text  # its text alone is fine
