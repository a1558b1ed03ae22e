"""What others have made and we read: folders of plain files, JSON and regular expressions of bounded cost. No torch."""

import codecs
import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import BadInput

_FILES = (".json", ".safetensors", ".gguf", ".jinja", ".model", ".bin", ".pt", ".pth")  # never names of folders
_JSON_BYTES = 1 << 28  # the index of the largest models has 10 MB, the largest tokenizer.json 40
_SECONDS = 0.5  # for one name; an honest pattern takes microseconds
_POINTER = b"version https://git-lfs.github.com/spec"  # how the small file begins that stands for a large one


def check_files(folder: Path, entries: Iterable[Path] | None = None) -> None:
    """Raise BadInput for what is no plain file among the `entries` of a folder: by default all but hidden ones.

    A link that leaves the folder would have what it points to read, copied into artifacts and published, and a
    repository can bring such a link along. Those of the hub's cache point to its blobs. A pipe would be waited for.
    """
    root = folder.resolve()
    if entries is None:
        entries = (entry for entry in sorted(folder.iterdir()) if not entry.name.startswith("."))
    for entry in entries:
        try:
            target, mode = entry.resolve(strict=True), entry.stat().st_mode
        except PermissionError:
            raise
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            raise BadInput(f"{entry}: a link to nothing; remove it, or put the file in its place") from error
        if stat.S_ISDIR(mode):
            if entry.suffix in _FILES:
                raise BadInput(f"{entry}: a folder, where a file belongs")
            continue
        if not stat.S_ISREG(mode):
            raise BadInput(f"{entry}: not a file but a pipe, socket or device; remove it, or put the file in its place")
        if root not in target.parents and not _is_blob(target):
            raise BadInput(
                f"{entry}: a link out of the folder, to {target}, which would be read and published as part of the "
                "model; put a copy in its place if it is"
            )


def _is_blob(target: Path) -> bool:
    """Whether a file lies in the hub's cache: …/models--org--name/blobs/<hash>."""
    return target.parent.name == "blobs" and target.parent.parent.name.startswith(("models--", "datasets--"))


def read_json(path: Path, why: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises BadInput when there is none; `why` says what it is needed for."""
    try:
        check_content(path)
        if path.stat().st_size > _JSON_BYTES:
            raise BadInput(
                f"{path}: {path.stat().st_size} bytes, more than any file of this kind; is it the right one?"
            )
        raw = path.read_bytes()
        if raw.startswith(codecs.BOM_UTF8):
            raise BadInput(f"{path}: begins with a byte order mark, which no reader of JSON takes; save it without")
        content = json.loads(raw)
    except BadInput:  # a ValueError, too
        raise
    except FileNotFoundError:
        raise BadInput(f"{path.parent}: no {path.name}; {why}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def check_content(path: Path) -> None:
    """Raise BadInput for a file that is only Git LFS's pointer to the content; OSError when it cannot be read."""
    if not path.is_file() and path.exists():
        raise BadInput(f"{path}: not a file")  # opening a pipe would wait for a writer
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise BadInput(f"{path}: a Git LFS pointer, not the file; run `git lfs pull` there, or download it again")
