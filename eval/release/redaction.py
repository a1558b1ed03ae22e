"""What is published names no path of the machine it was made on: such paths become the last part of their names."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

_TEXT = (".json", ".jsonl", ".md", ".yaml", ".yml", ".txt")
_LARGE = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")  # vocabularies, which hold no paths
_MANIFEST = "manifest.json"


def redacted(folder: Path, recipe: Mapping[str, Any]) -> dict[str, bytes]:
    """The text files of an artifact that name local paths, by name, as they may be published.

    recipe: its own paths are looked for, beside the home folder and where the artifact lies. The manifest has the
    checksums of the files as they are published.
    """
    places = _places(folder, recipe)
    out: dict[str, bytes] = {}
    digests: dict[str, str] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix not in _TEXT or file.name in _LARGE or not file.is_file():
            continue
        before = file.read_bytes()
        after = _without(before.decode("utf-8", "surrogateescape"), places).encode("utf-8", "surrogateescape")
        if after != before:
            out[file.relative_to(folder).as_posix()] = after
            digests[hashlib.sha256(before).hexdigest()] = hashlib.sha256(after).hexdigest()
    if digests and (folder / _MANIFEST).is_file():
        listed = out.get(_MANIFEST, (folder / _MANIFEST).read_bytes()).decode("utf-8")
        for old, new in digests.items():
            listed = listed.replace(old, new)
        if listed.encode() != (folder / _MANIFEST).read_bytes():
            out[_MANIFEST] = listed.encode()
    return out


def _places(folder: Path, recipe: Mapping[str, Any]) -> list[str]:
    """Absolute paths that would tell of this machine, the longest first."""
    home = os.path.expanduser("~")
    here = folder.resolve().parent.parent
    found = {str(here), home, *(value for value in _strings(recipe) if os.path.isabs(value))}
    return sorted(found - {"/", os.sep}, key=len, reverse=True)


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _without(text: str, places: Iterable[str]) -> str:
    """The text with every path that begins with one of `places` cut to its last part."""
    for place in places:
        pattern = re.escape(place) + r"(?![\w.-])(?:[\\/][^\s\"'`,;:)\]}]*)?"
        text = re.sub(pattern, lambda found: PurePath(found.group().rstrip("/\\")).name, text)
    return text
