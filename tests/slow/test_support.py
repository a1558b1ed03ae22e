"""The support table says of each family what is so."""

import json
from pathlib import Path

import pytest

from .. import families, support

ROWS = json.loads(support.TABLE.read_text())


def test_every_row_is_of_a_family_that_is_built() -> None:
    assert set(ROWS) <= set(families.FAMILIES)
    assert len(ROWS) > 20


@pytest.mark.slow
@pytest.mark.parametrize("family", ROWS)
def test_the_row_of_a_family_is_what_is_proved(family: str, tmp_path: Path) -> None:
    assert support.prove(family, tmp_path) == ROWS[family]
