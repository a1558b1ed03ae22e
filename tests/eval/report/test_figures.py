"""The charts as files: the page's drawing in light colours, readable wherever it is opened."""

import math
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from quantpress.eval.report.figures import divergence_axis, png, svg
from quantpress.eval.report.measured_run import open_run
from quantpress.eval.report.page import templates
from quantpress.eval.report.tradeoff import Axes, Point, tradeoff

from .test_report import fake_manifest, write_run
from .test_sections import full_results

_SVG = "{http://www.w3.org/2000/svg}"


def drawing(*labels: str, caption: str = "") -> str:
    points = [Point("original", 269e6, 17.05, role="original")]
    points += [Point(label, 100e6 + i, 18.0 + i, (17.8 + i, 18.2 + i)) for i, label in enumerate(labels)]
    plot = tradeoff(points, (820, 400), Axes("Perplexity"), lambda p: p.label)
    return svg(templates(), "tradeoff", caption, plot=plot, heading="Size against quality")


def test_a_file_brings_its_colours_along() -> None:
    drawn = drawing("w4", "w8")
    assert "var(" not in drawn
    assert ".mark.front { fill: #2459c4; }" in drawn


def test_the_png_is_twice_the_size_and_shows_its_text_on_a_machine_without_fonts() -> None:
    named = drawing("w4a16-gptq")
    root, image = ElementTree.fromstring(named), png(named)
    assert struct.unpack(">II", image[16:24]) == (2 * int(root.attrib["width"]), 2 * int(root.attrib["height"]))
    for text in (">w4a16-gptq</text>", ">Size against quality</text>"):  # regular and bold
        assert text in named
        assert png(named.replace(text, "></text>")) != image


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>$\\frac|`", "a\x00b\x1b[31m", "\udc80", "模型"])
def test_any_name_gives_a_file_that_can_be_read(name: str) -> None:
    drawn = drawing(name, caption=name)
    assert not list(ElementTree.fromstring(drawn).iter(f"{_SVG}img"))
    assert png(drawn).startswith(b"\x89PNG")


def test_a_long_caption_is_wrapped_below_the_chart() -> None:
    short, long = (ElementTree.fromstring(drawing("w4", caption="word " * n)) for n in (1, 100))
    assert int(long.attrib["height"]) == int(short.attrib["height"]) + 3 * 14
    lowest = max(float(text.attrib["y"]) for text in long.findall(f"{_SVG}text"))
    assert int(long.attrib["height"]) - 14 < lowest < int(long.attrib["height"])


def test_a_bar_is_as_long_as_its_divergence_and_none_where_it_is_not_finite(tmp_path: Path) -> None:
    results = full_results()
    for bucket, kl in zip(results["divergence"]["confidence"], (0.5, 2.0, None), strict=True):
        bucket["kl_mean"] = kl
    run = open_run(write_run(tmp_path / "run", fake_manifest(blocks=2), results))
    length = divergence_axis([run])
    assert [length(value) for value in (0.5, 2.0, math.nan, math.inf)] == [0.25, 1.0, 0.0, 0.0]
    root = ElementTree.fromstring(svg(templates(), "divergence", "", runs=[run]))
    bars = [float(r.attrib["width"]) for r in root.iter(f"{_SVG}rect") if r.get("class") == "s0"]
    assert bars == [150.0, 600.0, 0.0]
    assert "not finite" in "".join(root.itertext())
