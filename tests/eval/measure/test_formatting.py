"""Numbers as text, on both sides of every change of unit and of digits."""

import math

import pytest

from quantpress.eval.measure.formatting import (
    change,
    confidence,
    interval,
    number,
    points,
    score,
    seconds,
    share,
    size,
    small,
    spread,
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (size(999), "999 bytes"), (size(1000), "1.00 kB"), (size(9994), "9.99 kB"), (size(10_000), "10.0 kB"),
        (size(99_900), "99.9 kB"), (size(100_000), "100 kB"), (size(1_500_000), "1.50 MB"), (size(1e6), "1.00 MB"),
        (size(1e9), "1.00 GB"), (size(1.5e9), "1.50 GB"), (size(1e12), "1.00 TB"), (size(1.5e12), "1.50 TB"),
        (number(999.99), "999.99"), (number(1000), "1,000"), (number(-999.5), "-999.50"),
        (number(9_999_999), "9,999,999"), (number(1e7), "1.0e+07"),
        (small(0), "0.00"), (small(1), "1.00"), (small(12.34), "12.3"), (small(123_456), "123456"),
        (small(0.001234), "0.00123"), (small(1e-5), "0.0000100"), (small(9.9e-6), "9.9e-06"),
        (small(-0.001234), "-0.00123"),
        (spread(0), "0"), (spread(0.0123), "0.012"), (spread(1.26), "1.3"), (spread(12.6), "13"),
        (change(0.001), "+0.1 %"), (change(0.0009), "+0.09 %"), (change(-0.5), "−50.0 %"), (change(9.99), "+999.0 %"),
        (change(10), "11× as high"),
        (share(0.9), "90.0 %"), (share(0.999), "99.9 %"), (share(0.9995), "99.95 %"), (share(1), "100 %"),
        (confidence(0.25, 0.5), "25 to 50 %"), (score(0.613), "61.3"), (points(0.1), "+10.0"), (points(-0.1), "−10.0"),
        (seconds(9.94), "9.9 s"), (seconds(10), "10 s"), (seconds(119), "119 s"), (seconds(120), "2.0 min"),
        (seconds(7198), "120.0 min"), (seconds(7200), "2.0 h"),
        (interval((0.1, 0.2), share), "10.0 to 20.0 %"), (interval((0.1, 0.2), small), "0.100 to 0.200"),
    ],
)  # fmt: skip
def test_units_and_digits_change_where_they_should(said: str, expected: str) -> None:
    assert said.replace("\u00a0", " ") == expected


@pytest.mark.parametrize("write", [number, small, spread, change, share, score])
def test_what_is_no_number_is_said_in_words(write: object) -> None:
    assert callable(write)
    assert [write(value) for value in (math.nan, math.inf)] == ["not finite"] * 2
