"""eval/results.json, and what a notebook shows of it."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantpress.core.errors import BadInput
from quantpress.core.notebook import table
from quantpress.core.schema import first_problem

from .lines import lines
from .sections import Figures

RESULTS_SCHEMA = 2


class Results(Figures):
    """The figures as eval/results.json has them."""

    def document(self) -> dict[str, Any]:
        """The JSON values that are written."""
        return self.model_dump(mode="json", by_alias=True)

    def _repr_html_(self) -> str:
        rows = [*lines(self), *((f"gate {check.verdict}", check.reason) for check in self.gates.checks)]
        return table(self.gates.verdict if self.gates.checks else "Measured", rows, (*self.warnings, *self.notes))


def read_results(folder: Path) -> Results:
    """FOLDER/eval/results.json. Raises BadInput when it is missing, no JSON or of another schema."""
    again = f"evaluate the run first (quantpress eval {folder})"
    path = folder / "eval" / "results.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{folder}: no eval/results.json; {again}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != RESULTS_SCHEMA:
        raise BadInput(f"{path}: schema {schema!r} is not {RESULTS_SCHEMA}; this quantpress cannot read it; {again}")
    try:
        return Results.model_validate(document)
    except ValidationError as error:
        raise BadInput(f"{path}: {first_problem(error)}") from None
