"""Texts for people."""

import pytest

from quantpress.core.text import duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 minute"),
        (89, "1 minute"),
        (91, "2 minutes"),
        (1320, "22 minutes"),
        (7300, "2 hours"),
        (9000, "2.5 hours"),
        (93300, "26 hours"),
        (5.7 * 86400, "5.7 days"),
        (1234 * 86400, "1,234 days"),
    ],
)
def test_a_duration_is_said_in_the_unit_a_person_would_use(seconds: float, words: str) -> None:
    assert duration(seconds) == words
