"""Numbers as the page writes them."""

import pytest
import yaml

from quantpress.eval.measure.formatting import change, number, points, seconds, share, size, small
from quantpress.eval.measure.gates import limit_name, show_limit
from quantpress.eval.report.page_text import program, sentence, unbroken, without_defaults
from quantpress.recipe import loading as recipes


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (size(0), "0 bytes"), (size(999), "999 bytes"), (size(62_800_000), "62.8 MB"),
        (size(1_234_000_000), "1.23 GB"), (number(17.049), "17.05"), (number(494_300), "494,300"),
        (change(0.051), "+5.1 %"), (change(-0.0004), "−0.04 %"), (change(2_899), "2,900× as high"),
        (share(0.942), "94.2 %"), (share(0.99944), "99.94 %"),
        (share(1.132), "113 %"), (points(-0.0412), "−4.1"), (points(0.03), "+3.0"),
        (sentence(program("vllm")), "vLLM"), (sentence(program("url")), "A running server"),
        (limit_name("min_recovery.arc_easy"), "recovery of arc_easy"), (limit_name("max_kl"), "KL"),
        (share(1.0), "100 %"), (share(0.99999), "99.99 %"),
        (share(0.0083), "0.830 %"), (share(0.0), "0.00 %"), (small(0.03127), "0.0313"),
        (seconds(95.2), "95 s"), (seconds(600), "10.0 min"), (seconds(9000), "2.5 h"),
        (show_limit(1e8, "max_bytes"), "100 MB"), (show_limit(0.05, "max_kl"), "0.0500"),
    ],
)  # fmt: skip
def test_numbers_read_well(said: str, expected: str) -> None:
    assert said.replace("\u00a0", " ") == expected


@pytest.mark.parametrize("name", recipes.shipped())
def test_a_recipe_without_its_defaults_is_the_same_recipe(name: str) -> None:
    whole = recipes.load(name)
    short = without_defaults(whole.model_dump(mode="json"))
    assert recipes.parse(short) == whole
    assert "null" not in yaml.safe_dump({k: v for k, v in short.items() if k != "method"})


def test_no_line_ends_inside_a_name() -> None:
    told = unbroken("Take w4-b, not w4 or <w4>: w4/README.md, w4-bits", ["w4", "w4-b"])
    whole = '<span class="name">w4</span>'
    assert told == f'Take <span class="name">w4-b</span>, not {whole} or &lt;{whole}&gt;: w4/README.md, w4-bits'
    assert unbroken("class --x", ["class", "span"]).count("<span") == 2
    assert unbroken("<a> --set b=1", []) == '&lt;a&gt; <span class="option">--set</span> b=1'
