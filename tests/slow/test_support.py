"""The support table says of each family what is so."""

import json
from pathlib import Path

import pytest

from .. import families, support

ROWS = json.loads(support.TABLE.read_text())


def test_the_table_has_all_families() -> None:
    assert set(ROWS) == set(families.FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_row_of_a_family_is_what_is_proved(family: str, tmp_path: Path) -> None:
    assert support.prove(family, tmp_path) == ROWS[family]
