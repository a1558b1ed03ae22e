"""The trade-off chart's geometry: labels, axes and the front."""

import math

import pytest

from quantpress.eval.report.tradeoff import Point, overlap, pareto, tradeoff


@pytest.mark.parametrize("count", [2, 5, 12])
@pytest.mark.parametrize("size", [(820, 400), (350, 340)])
@pytest.mark.parametrize("spread", [0.0, 0.3, 5.0])
def test_labels_do_not_overlap_and_stay_inside(count: int, size: tuple[int, int], spread: float) -> None:
    points = [Point("original", 269_000_000, 17.05, 0.3, original=True)]
    points += [Point(f"int4-gptq-g{i}", round(114e6 * (1 + 0.02 * spread * i)), 18 + spread * math.sin(i), 0.3)
               for i in range(count)]  # fmt: skip
    plot = tradeoff(points, size, lambda p: p.label, number_only=size[0] < 400)
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
        Point(str(i), size, perplexity, 0.0)
        for i, (size, perplexity) in enumerate(
            [(269, 17.0), (100, 30.0), (114, 18.0), (114, 21.0), (120, 18.0), (90, math.nan), (163, 17.1), (114, 18.0)]
        )
    ]
    beaten = {
        i for i, p in enumerate(points)
        if not math.isfinite(p.perplexity) or any(
            q.size <= p.size and q.perplexity <= p.perplexity and (q.size, q.perplexity) != (p.size, p.perplexity)
            for q in points)
    }  # fmt: skip
    assert set(pareto(points)) == set(range(len(points))) - beaten == {0, 1, 2, 6, 7}


@pytest.mark.parametrize("perplexities", [(17.06, 17.07), (18.0, 494_300.0), (17.05, 17.05), (math.nan, math.inf)])
def test_axes_hold_any_perplexity(perplexities: tuple[float, float]) -> None:
    points = [Point("original", 269_000_000, 17.05, 0.3, original=True)]
    points += [Point(f"r{i}", 100_000_000, p, 0.3) for i, p in enumerate(perplexities)]
    plot = tradeoff(points, (820, 400), lambda p: p.label)
    assert len(plot.marks) == sum(map(math.isfinite, perplexities)) + 1
    assert 2 <= len(plot.y_ticks) <= 9
    assert 2 <= len(plot.x_ticks) <= 12
    assert len({text for _, text in plot.y_ticks}) == len(plot.y_ticks)
    assert all(plot.frame[1] - 1 <= y <= plot.frame[3] + 1 for y, _ in plot.y_ticks)
