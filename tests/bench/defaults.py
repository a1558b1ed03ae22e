"""Model and texts as plain files, for the side that does not know the embedded ones. A child of peers.py.

    python defaults.py FOLDER [--model M] [--calibration FILE] [--evaluation FILE]

Prints one JSON line of the three, each as given or, when not given, what the package brings.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Literal

from fetch import text

from quantpress.calibrate.texts import load_documents
from quantpress.engine.sources import default_cache, resolve
from quantpress.recipe import Text

Role = Literal["calibration", "evaluation"]


def embedded(role: Role, folder: Path, cache: Path) -> str:
    """The default text of that role, its documents joined, as a file in `folder`."""
    path = folder / f"{role}.txt"
    documents = load_documents(Text(), cache=cache, role=role).documents
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation", nargs="+")
    args = parser.parse_args()
    cache = Path(os.environ.get("QUANTPRESS_CACHE") or default_cache())
    given = [text(name, cache / "bench") for name in args.evaluation or ()]
    found = {
        "model": str(resolve(args.model, cache=cache).path),
        "calibration": str(text(args.calibration, cache / "bench"))
        if args.calibration
        else embedded("calibration", args.folder, cache),
        "evaluation": [str(file) for file in given] or [embedded("evaluation", args.folder, cache)],
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
