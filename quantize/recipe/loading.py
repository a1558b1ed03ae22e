"""Reading a recipe: from its file, with overrides applied, validated. No torch here.

`load` reads a file (or the name of a shipped recipe), applies `--set key.path=value` overrides and validates the
result; all mistakes are reported in one BadInput line that names their places.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from ..core.errors import BadInput
from ..core.text import meant, shortened
from .document import Recipe
from .targets import Target

_BYTES, _NODES = 200_000, 10_000  # of a recipe; the longest shipped one has 3,000 and 60
_DIGITS, _DEPTH = 100, 50  # of a number; of nested brackets
_SHOWN, _PROBLEMS, _PARTS = 80, 8, 20  # characters of a wrong value, problems in one message, parts of a key of --set


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a duplicate key is an error instead of silently the last one; nested as recipes are at most."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= _DEPTH:  # each token takes time in proportion to it
            raise yaml.scanner.ScannerError(None, None, f"nested deeper than {_DEPTH} levels", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_GROUPS = ("start-here", "vllm-gpu", "vllm-cpu", "tensorrt-llm", "llama.cpp", "smallest")  # folders, as they are listed


def groups() -> dict[str, list[str]]:
    """Names of the recipes inside the package, by the folder they lie in: what they are for."""
    return {group: sorted(_files(group)) for group in _GROUPS}


def shipped() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(name for names in groups().values() for name in names)


def _files(group: str) -> dict[str, Traversable]:
    inside = resources.files("quantpress.recipes").joinpath(group).iterdir()
    return {file.name.removesuffix(".yaml"): file for file in inside if file.name.endswith(".yaml")}


def text_of(name: str) -> str:
    """The file of a shipped recipe, with its comments. Raises BadInput, with the nearest names, where there is none."""
    for group in _GROUPS:
        if name in (files := _files(group)):
            return files[name].read_text(encoding="utf-8")
    near = difflib.get_close_matches(name, shipped(), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "`quantpress recipes` lists them"
    raise BadInput(f"recipe {name!r}: no such file and no shipped recipe; {hint}")


def load(where: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in file `where`, or the shipped one of that name, with `key.path=value` overrides applied."""
    path, where = Path(where), shortened(where, 300)
    try:
        text = path.read_text(encoding="utf-8") if _is_recipe_file(path) else text_of(where)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name with a null byte
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"recipe {where}: cannot be read: {shortened(str(error), 300)}") from error
    document = _read_yaml(text, f"recipe {where}")
    if not isinstance(document, dict):
        found = "an empty file" if document is None else type(document).__name__
        raise BadInput(f"recipe {where}: expected a mapping of keys, found {found}")
    document.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "recipe")
    for override in overrides:
        apply_override(document, override)
    return parse(document, where)


def _is_recipe_file(path: Path) -> bool:
    """Whether there is such a file. Raises BadInput for one that is no recipe by its size."""
    if not path.is_file():
        return False
    if (size := path.stat().st_size) > _BYTES:
        raise BadInput(f"recipe {path}: {size} bytes; a recipe has at most {_BYTES}")
    return True


def _read_yaml(text: str, where: str) -> Any:
    """The document in a YAML text. Raises BadInput, also for one that aliases make large without end."""
    try:
        loader = _UniqueKeys(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > _NODES:
            raise BadInput(f"{where}: over {_NODES} values with its aliases written out; a recipe has some hundreds")
        return loader.construct_document(node)
    except BadInput:
        raise
    except Exception as error:  # PyYAML's own kinds, and what Python says of its dates, numbers and depth
        raise BadInput(f"{where}: not YAML: {shortened(' '.join(str(error).split()), 300)}") from error


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The values in a document with every alias written out. Raises ValueError for one that holds itself."""
    if known.setdefault(id(node), 0):
        return known[id(node)]
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and len(node.value) > _DIGITS:
        raise ValueError(f"a number of {len(node.value)} digits")
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    if any(known.get(id(part)) == 0 for part in parts):
        raise ValueError("an alias stands inside of what it means")
    known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]


def parse(document: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe document; raises BadInput, one line with every problem and its place."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise BadInput(f"recipe {where}: {_problems(error, Recipe)}") from None


def parse_target(document: Any, where: str) -> Target:
    """Validate one target, a name or a mapping, as in `targets` of a recipe."""
    try:
        target: Target = TypeAdapter(Target).validate_python(document)
    except ValidationError as error:
        raise BadInput(f"{where}: {_problems(error, Target)}") from None
    return target


def _problems(error: ValidationError, root: Any) -> str:
    errors = error.errors(include_url=False)
    inner = [e["loc"] for e in errors]
    # A list with a wrong item is reported as too short, too: report only the item.
    errors = [e for e in errors if e["type"] != "too_short" or not any(_inside(place, e["loc"]) for place in inner)]
    told = [_problem(e, root) for e in errors[:_PROBLEMS]]
    return "; ".join([*told, *([f"and {len(errors) - _PROBLEMS} more"] if len(errors) > _PROBLEMS else [])])


_GONE = {  # removed keys, by section: what to write instead
    ("gptq", "correction"): "GPTAQ was removed, QEP being better wherever both were measured; drop this key, "
    "error_correction sets the strength of QEP",
}
_PLAIN = {
    "model_type": "has to be a mapping",
    "model_attributes_type": "has to be a mapping",
    "tuple_type": "has to be a list",
}


def _inside(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def _problem(error: Any, root: Any) -> str:
    place = ".".join(shortened(str(part), 40) for part in error["loc"][:_PARTS])
    message = shortened(_PLAIN.get(error["type"], error["msg"].removeprefix("Value error, ")), 600)
    if error["type"] == "extra_forbidden" and error["loc"][-2:] in _GONE:
        message = _GONE[error["loc"][-2:]]
    elif error["type"] == "extra_forbidden":
        known = _keys_at(root, error["loc"][:-1])
        message = f"unknown key{meant(shortened(str(error['loc'][-1]), _SHOWN), known)} (known: {', '.join(known)})"
    elif error["type"] == "union_tag_invalid":
        known = [tag.strip(" '") for tag in error["ctx"]["expected_tags"].split(",")]
        tag = shortened(error["ctx"]["tag"], _SHOWN)
        message = f"unknown name {tag!r}{meant(tag, known)} (known: {', '.join(known)})"
    elif not isinstance(error["input"], dict | Recipe):
        message += f", not {shortened(repr(error['input']), _SHOWN)}"
        if error["type"] == "literal_error":
            message += meant(shortened(str(error["input"]), _SHOWN), re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return f"{place}: {message}" if place else message


def _keys_at(root: Any, place: Iterable[int | str]) -> list[str]:
    """The keys of the mapping at `place`, a location in a pydantic error of the type `root`."""
    models = _models(root)
    for part in place:
        if tagged := [model for model in models if part in _names(model)]:
            models = tagged  # the tag of a union
        elif fields := [model.model_fields[part] for model in models if part in model.model_fields]:
            models = [inner for field in fields for inner in _models(field.annotation)]
    return list(dict.fromkeys(key for model in models for key in model.model_fields))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation: through unions, lists and mappings, but not in the models' own fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _names(model: type[BaseModel]) -> tuple[Any, ...]:
    """The tags of this model in a union: the literal values of its `name`."""
    field = model.model_fields.get("name")
    return () if field is None or get_origin(field.annotation) is not Literal else get_args(field.annotation)


def apply_override(document: dict[str, Any], override: str) -> None:
    """Apply one `key.path=value` to the document; the value is read as YAML."""
    key, equals, value = override.partition("=")
    shown = shortened(repr(override), _SHOWN)
    if not equals or not key:
        raise BadInput(f"--set {shown}: write key.path=value, such as method.damp=0.02")
    *parents, last = key.split(".")
    if len(parents) >= _PARTS:
        raise BadInput(f"--set {shown}: a key of {len(parents) + 1} parts; none has more than {_PARTS}")
    node = document
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise BadInput(f"--set {shown}: {shortened(parent, _SHOWN)!r} is not a mapping in this recipe")
        node = child
    node[last] = _read_yaml(value, f"--set {shown}")
