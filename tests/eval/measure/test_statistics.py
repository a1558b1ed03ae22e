"""Standard errors and intervals against their definitions and against simulation."""

import math

import numpy as np
import pytest

from quantpress.eval.measure.statistics import (
    around,
    paired_difference,
    quantile_interval,
    recovery,
    runs,
    standard_error,
)


@pytest.mark.parametrize(("tokens", "length"), [(16 * 1023, 1023), (100, 16), (64 * 16 * 4, 256)])
def test_a_text_is_cut_into_about_sixteen_runs(tokens: int, length: int) -> None:
    run = runs(tokens)
    assert np.bincount(run)[:-1].tolist() == [length] * int(run[-1])
    assert len(run) == tokens


def test_few_values_know_their_spread_badly() -> None:
    low, high = around(1.0, 0.1, 3) or (0, 0)
    assert (low, high) == pytest.approx((1 - 0.4302652730, 1 + 0.4302652730))  # Student's t, 2 degrees of freedom
    assert around(1.0, 0.1, 10**6) == pytest.approx(around(1.0, 0.1))
    assert around(1.0, math.nan, 3) is None


def test_of_independent_values_it_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(size=500)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / math.sqrt(500))
    assert math.isnan(standard_error(values[:1]))


def test_of_dependent_tokens_it_is_what_repeating_the_measurement_shows() -> None:
    generator = np.random.default_rng(0)
    run = np.repeat(np.arange(100), 16)
    draws = [np.repeat(generator.normal(size=100), 16) + 0.5 * generator.normal(size=1600) for _ in range(300)]
    truth = np.std([draw.mean() for draw in draws])
    said = np.mean([standard_error(draw, run) for draw in draws])
    assert said == pytest.approx(truth, rel=0.1)
    assert np.mean([standard_error(draw) for draw in draws]) < 0.5 * truth


def test_the_interval_of_a_quantile_holds_it_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    run = np.arange(600)
    hits = 0
    for _ in range(60):
        ends = quantile_interval(generator.exponential(size=600), 0.9, run)
        assert ends is not None
        hits += ends[0] <= math.log(10) <= ends[1]
    assert 51 <= hits <= 60
    assert quantile_interval(np.array([1.0, math.nan]), 0.5, np.arange(2)) is None
    assert quantile_interval(np.array([1.0, 2.0]), 0.5, np.zeros(2, dtype=np.int64)) is None
    assert quantile_interval(np.array([1.0, 2.0]), 0.5, np.arange(2)) == (1.0, 2.0)


def test_a_difference_is_paired_by_document() -> None:
    before = np.array([1, 1, 0, 0] * 50, dtype=float)
    after = np.array([1, 0, 0, 0] * 50, dtype=float)
    mean, error, interval = paired_difference(before, after)
    assert mean == -0.25
    assert error == pytest.approx((after - before).std(ddof=1) / math.sqrt(200))
    # Agresti & Min, by hand: 0.5 won, 50.5 lost of 202
    middle, spread = -50 / 202, math.sqrt(51 - 50**2 / 202) / 202
    assert interval == pytest.approx((middle - 1.959964 * spread, middle + 1.959964 * spread))


def test_few_documents_alike_are_not_certainty() -> None:
    same = np.ones(5)
    mean, error, interval = paired_difference(same, same)
    assert (mean, error) == (0, 0)
    assert interval is not None
    assert interval[0] < -0.2
    assert interval[1] > 0.2


def test_scores_that_are_not_right_or_wrong_have_a_plain_interval() -> None:
    before, after = np.array([0.5, 0.25, 0.75, 0.1]), np.array([0.4, 0.2, 0.8, 0.1])
    mean, error, interval = paired_difference(before, after)
    assert interval == around(mean, error)


def test_recovery_is_the_share_that_is_left() -> None:
    before = np.array([1.0] * 80 + [0.0] * 20)
    after = np.array([1.0] * 70 + [0.0] * 30)
    left, interval = recovery(before, after)
    assert left == pytest.approx(0.875)
    assert interval is not None
    assert interval[0] < 0.875 < interval[1] < 1.0
    assert recovery(np.zeros(3), np.ones(3)) == (None, None)


def test_the_interval_of_a_recovery_is_that_of_the_difference_over_the_base() -> None:
    """By hand, of an original that scores far from 1: dividing nothing, or by the wrong score, shows at once."""
    before = np.array([0.2, 0.1, 0.3, 0.2])  # mean 0.2
    after = np.array([0.1, 0.1, 0.2, 0.2])  # mean 0.15
    left, interval = recovery(before, after)
    error = math.sqrt(np.var(after - before, ddof=1) / 4)
    assert left == pytest.approx(0.75)
    assert interval == pytest.approx((1 + (-0.05 - 1.959964 * error) / 0.2, 1 + (-0.05 + 1.959964 * error) / 0.2))


def test_scores_between_0_and_1_get_the_interval_of_a_mean_even_beside_zeros_and_ones() -> None:
    before, after = np.array([0.0, 1.0, 0.25, 0.5] * 10), np.array([0.0, 1.0, 0.5, 0.5] * 10)
    mean, error, interval = paired_difference(before, after)
    assert interval == pytest.approx((mean - 1.959964 * error, mean + 1.959964 * error))
