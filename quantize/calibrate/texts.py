"""Text to calibrate on and text to evaluate on, from the embedded default, a local file or a hub dataset.

A source gives exactly the text it names or fails; a failed download is never replaced by another text.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import BadInput
from ..core.files import expanded
from ..models.hub import commit, fetch_wheel, hub_errors, near
from ..recipe import Text

Role = Literal["calibration", "evaluation"]

_WHEEL = ("exllamav3", "1.6.5", "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded")
_FOLDER = "exllamav3/conversion/standard_cal_data"
_WHEEL_FILES: dict[Role, str] = {"calibration": "c4.utf8", "evaluation": "wiki.utf8"}  # never the same text
_NAMED = ("code", "multilingual", "technical")  # further texts of the wheel, by their names
_WIKI_DOCUMENT = re.compile(r"^<doc [^>\n]*>\n(.*?)\n</doc>$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Documents:
    """Texts in order. source: a description of where they came from; sha256: of the texts, not of their file."""

    documents: tuple[str, ...]
    source: str
    sha256: str


def load_documents(text: Text, *, cache: Path, role: Role) -> Documents:
    """The documents of `text`, without empty ones.

    `default` is C4 for calibration and Wikipedia for evaluation; `code`, `multilingual` and `technical` are of the same
    package. A .txt file is one document, as is each line of a
    JSONL file and each row of a dataset; WikiText's paragraphs are joined by blank lines into one, as is customary.
    Raises BadInput for text that is missing, empty or cannot be fetched, and for a column that is not there.
    """
    assert text.source != "self", "the model's own text comes from generated_tokens"
    path = expanded(text.source)
    if text.source == "default" or text.source in _NAMED:
        documents, source = _default(role, text.source, cache)
    elif path.suffix.lower() == ".txt":
        documents, source = [_read(path)], path.name
    elif path.suffix.lower() == ".jsonl":
        documents, source = _jsonl(path, text.column), path.name
    elif path.exists():
        raise BadInput(f"{role} text {path}: give a .txt or .jsonl file, or the id of a hub dataset")
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text.source) and not text.source.startswith("."):
        documents, source = _dataset(text, role)
    else:
        raise BadInput(f"{role} text {path}: no such file{near(path)}")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise BadInput(f"{role} text {source}: empty")
    return Documents(tuple(documents), source, _sha256(documents))


def _default(role: Role, wanted: str, cache: Path) -> tuple[list[str], str]:
    name, version, sha256 = _WHEEL
    file = _WHEEL_FILES[role] if wanted == "default" else f"{wanted}.utf8"
    with zipfile.ZipFile(fetch_wheel(name, version, sha256, cache)) as archive:
        content = archive.read(f"{_FOLDER}/{file}").decode()
    documents = _WIKI_DOCUMENT.findall(content) if file == _WHEEL_FILES["evaluation"] else content.split("\n")
    return [document.strip() for document in documents], f"{file} of {name} {version}"


def _read(path: Path) -> str:
    """UTF-8 text with \\n line endings on every platform."""
    if not path.is_file():
        raise BadInput(f"text {path}: no such file{near(path)}")
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"text {path}: cannot be read as UTF-8: {error}") from error


def _jsonl(path: Path, column: str) -> list[str]:
    documents: list[str] = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInput(f"text {path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadInput(f"text {path}, line {number}: expected an object, found {type(row).__name__}")
        if column not in row:
            raise BadInput(f"text {path}, line {number}: no column {column!r}; there are {', '.join(row) or 'none'}")
        documents.append(_string(row[column], f"text {path}, line {number}: column {column!r}"))
    return documents


def _dataset(text: Text, role: Role) -> tuple[list[str], str]:
    """The documents of a hub dataset and its description with the commit they were read at."""
    from huggingface_hub import HfApi

    what = f"dataset {text.source}"
    try:
        import datasets
    except ImportError:
        raise BadInput(
            f"{role} text {text.source}: datasets of the hub need `pip install 'quantpress[datasets]'`; "
            "or give a .txt or .jsonl file"
        ) from None
    with hub_errors(what, text.revision):
        at = commit(HfApi().dataset_info, text.source, text.revision)
        rows = datasets.load_dataset(text.source, text.config, split=text.split, revision=at)
    return _rows(rows, text, role), f"{text.source}{f' {text.config}' if text.config else ''} {text.split}@{at}"


def _rows(rows: Any, text: Text, role: Role) -> list[str]:
    columns: Sequence[str] = rows.column_names
    if text.column not in columns:
        raise BadInput(f"{role} text {text.source}: no column {text.column!r}; there are {', '.join(columns)}")
    place = f"{role} text {text.source}: column {text.column!r}"
    documents = [_string(value, place) for value in rows[text.column]]
    if text.source.lower().rsplit("/", 1)[-1] == "wikitext":
        return ["\n\n".join(documents)]
    return documents


def _string(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{place} holds {type(value).__name__}, not text")
    return value


def _sha256(documents: Sequence[str]) -> str:
    """Of the documents with their lengths: ["ab"] and ["a", "b"] differ."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()
