"""The trade-off chart's geometry: labels, axes and the front."""

import math

import pytest

from quantpress.eval.report.tradeoff import Axes, Point, overlap, pareto, tradeoff

PERPLEXITY = Axes("Perplexity (lower is better)")


def point(label: str, x: float, y: float) -> Point:
    return Point(label, x, y, (y - 0.3, y + 0.3))


@pytest.mark.parametrize("count", [2, 5, 12])
@pytest.mark.parametrize("size", [(820, 400), (350, 340)])
@pytest.mark.parametrize("spread", [0.0, 0.3, 5.0])
def test_labels_do_not_overlap_and_stay_inside(count: int, size: tuple[int, int], spread: float) -> None:
    points = [Point("original", 269_000_000, 17.05, role="original")]
    points += [point(f"int4-gptq-g{i}", round(114e6 * (1 + 0.02 * spread * i)), 18 + spread * math.sin(i))
               for i in range(count)]  # fmt: skip
    plot = tradeoff(points, size, PERPLEXITY, lambda p: p.label, number_only=size[0] < 400)
    boxes = [mark.label.box for mark in plot.marks]
    assert len(boxes) == count + 1
    for i, box in enumerate(boxes):
        assert 0 <= box[0] < box[2] <= size[0]
        assert 0 <= box[1] < box[3] <= size[1]
        assert all(overlap(box, other) == 0 for other in boxes[:i])
    for mark in plot.marks:
        assert plot.frame[0] <= mark.x <= plot.frame[2]
        assert plot.frame[1] <= mark.y <= plot.frame[3]


def test_the_front_is_what_nothing_beats() -> None:
    points = [
        Point(str(i), size, perplexity)
        for i, (size, perplexity) in enumerate(
            [(269, 17.0), (100, 30.0), (114, 18.0), (114, 21.0), (120, 18.0), (90, math.nan), (163, 17.1), (114, 18.0)]
        )
    ]
    beaten = {
        i for i, p in enumerate(points)
        if not math.isfinite(p.y) or any(q.x <= p.x and q.y <= p.y and (q.x, q.y) != (p.x, p.y) for q in points)
    }  # fmt: skip
    assert set(pareto(points, PERPLEXITY)) == set(range(len(points))) - beaten == {0, 1, 2, 6, 7}


@pytest.mark.parametrize("perplexities", [(17.06, 17.07), (18.0, 494_300.0), (17.05, 17.05), (math.nan, math.inf)])
def test_axes_hold_any_perplexity(perplexities: tuple[float, float]) -> None:
    points = [Point("original", 269_000_000, 17.05, role="original")]
    points += [Point(f"r{i}", 100_000_000, p, (p - 0.3, p + 0.3)) for i, p in enumerate(perplexities)]
    plot = tradeoff(points, (820, 400), PERPLEXITY, lambda p: p.label)
    assert len(plot.marks) == 3
    assert 2 <= len(plot.y_ticks) <= 9
    assert 2 <= len(plot.x_ticks) <= 12
    assert len({text for _, text in plot.y_ticks}) == len(plot.y_ticks)
    assert all(plot.frame[1] - 1 <= y <= plot.frame[3] + 1 for y, _ in plot.y_ticks)


def test_a_broken_model_is_drawn_at_the_edge_and_leaves_the_others_room() -> None:
    axes = Axes("KL", limit=(0.1, "limit 0.1"))
    points = [Point("original", 269e6, 0.0, role="original"), Point("w8", 163e6, 0.008, (0.007, 0.009)),
              Point("w4", 114e6, 0.06, (0.05, 0.07)), Point("w2", 90e6, 7.2, (7.0, 7.4), "broken"),
              Point("w1", 80e6, math.inf, None, "broken")]  # fmt: skip
    plot = tradeoff(points, (940, 400), axes, lambda p: p.label)
    marks = {mark.title: mark for mark in plot.marks}
    edges = [marks[name].off_axis for name in ("original", "w8", "w4", "w2", "w1")]
    assert edges == ["right", None, None, "top", "top"]
    assert marks["w2"].y == marks["w1"].y == plot.frame[1]
    assert plot.limit is not None
    assert marks["w4"].y > plot.limit[0] > plot.frame[1] + 10  # the axis ends near the limit, not at 7.2
    assert marks["original"].y == plot.frame[3]
    whisker = marks["w8"].whisker
    assert whisker is not None
    assert whisker[0] > marks["w8"].y > whisker[1]


def test_of_recoveries_more_is_better_and_broken_is_below() -> None:
    axes = Axes("Recovery", rises=True, percent=True)
    points = [Point("original", 269, 1.0, role="original"), Point("a", 100, 0.9), Point("b", 120, 0.95),
              Point("c", 130, 0.92, None, "dominated"), Point("d", 90, 0.2, None, "broken")]  # fmt: skip
    assert [points[i].label for i in pareto(points[:4], axes)] == ["a", "b", "original"]
    plot = tradeoff(points, (940, 400), axes, lambda p: p.label)
    marks = {mark.title: mark for mark in plot.marks}
    assert marks["original"].y < marks["b"].y < marks["c"].y < marks["a"].y < marks["d"].y
    assert marks["d"].off_axis == "bottom"
