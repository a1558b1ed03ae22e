"""A mkdocs hook: the parts of pages that the code knows best are generated from it, at each `<!-- name -->` line.

recipe: the keys of a recipe, from its schema. commands: the command line. api: the public functions, from their
docstrings. recipes: those that ship. models: families and what works with each. fits: what `fit` proposes for known
models. loads SERVER, settings SERVER: what a server's file says. No torch is imported.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from quantpress.cli import main as _main  # noqa: F401  adds the commands to the app
from quantpress.cli.app import app
from quantpress.exports.servers import SERVERS
from quantpress.exports.servers.loader import Loadable, Loader
from quantpress.models.families import FAMILIES, family_of
from quantpress.recipe import Recipe
from quantpress.recipe import loading as recipes

ROOT = Path(__file__).parent.parent
SUPPORT = ROOT / "tests" / "support.json"  # what a test has proved of each family
SCHEMA = Recipe.model_json_schema()
_SECTIONS = (  # of the reference: the key, and the models that it may hold
    ("calibration", ("Calibration",)),
    ("transforms", ("SmoothQuant", "Awq", "Hadamard")),
    ("method", ("Rtn", "Gptq", "AutoRound", "Qat", "EndToEnd", "LlamaCppQuantizer")),
    ("weights", ("Grid",)),
    ("activations", ("Activations",)),
    ("budget", ("Budget",)),
    ("overrides", ("Override",)),
    ("gguf", ("Gguf", "GgufBudget")),
    ("targets", tuple(server.settings.__name__ for server in SERVERS.values() if server.settings is not None)),
    ("evaluation", ("Evaluation", "Domain", "UntilClear", "Task", "EfficiencySettings", "Timing")),
    ("gates", ("Gates",)),
    ("smoke", ("Smoke",)),
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page."""
    return re.sub(r"^<!-- ([a-z]+)(?: (\S+))? -->$", lambda m: _PARTS[m[1]](*filter(None, m.groups()[1:])), markdown,
                  flags=re.M)  # fmt: skip


# ---- recipe ----------------------------------------------------------------------------------------------------------


def recipe_reference() -> str:
    """All keys of a recipe, a table for each section."""
    lines = ["## The document", "", *_keys(SCHEMA)]
    for key, models in _SECTIONS:
        lines += ["", f"## {key}", ""]
        for name in models:
            model = SCHEMA["$defs"][name]
            tag = model["properties"].get("name", {}).get("const")
            if len(models) > 1:
                title = f"{key}: {tag}" if tag else {"EndToEnd": "method.end_to_end", "GgufBudget": "gguf.budget",
                        "Task": "evaluation.tasks", "EfficiencySettings": "evaluation.efficiency",
                        "Timing": "evaluation.efficiency.timing", "Domain": "evaluation.domains",
                        "UntilClear": "evaluation.until_clear"}.get(name, key)  # fmt: skip
                lines += ["", f"### {title} {{ #{name.lower()} }}", ""]
            lines += [_cell(model.get("description", "")), "", *_keys(model)]
    return "\n".join(lines)


def _keys(model: dict[str, Any]) -> Iterator[str]:
    yield "| key | value | default | |"
    yield "|---|---|---|---|"
    for key, said in model["properties"].items():
        required = key in model.get("required", ())
        default = "required" if required else _default(said.get("default"))
        yield f"| `{key}` | {_value(said)} | {default} | {_cell(said['description'])} |"


def _cell(text: str) -> str:
    """One line of text, in which no < or | is markup; what stands between backticks stays as it is."""
    words = " ".join(text.split()).split("`")
    words[::2] = [word.replace("|", "&#124;").replace("<", "&lt;") for word in words[::2]]
    return "`".join(words)


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return f"`{value['name']}`" if "name" in value else ""
    if isinstance(value, list):
        return "`[]`" if not value else ", ".join(f"`{item!r}`".replace("'", '"') for item in value)
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    return f"`{value}`" if value != "" else '`""`'


def _value(said: dict[str, Any]) -> str:
    """The values that a key takes, in words."""
    if "$ref" in said:
        name = said["$ref"].rsplit("/", 1)[1]
        keys = [key for key, models in _SECTIONS if name in models]
        alone = any(models == (name,) for _, models in _SECTIONS)
        return f"[mapping](#{keys[0] if alone else name.lower()})" if keys else "mapping"
    if "const" in said:
        return f"`{said['const']}`"
    if said.get("anyOf", [{}])[0].get("discriminator") or "discriminator" in said:
        return "name or mapping"
    if "enum" in said:
        return ", ".join(f"`{value}`" for value in said["enum"])
    for key in ("anyOf", "oneOf"):
        if key in said:
            found = dict.fromkeys(_value(one) for one in said[key] if one.get("type") != "null")
            if sum(one.startswith("[mapping]") for one in found) > 1:  # one of a section's models, by its name
                return "name or mapping"
            return " or ".join(found)
    kind = said.get("type")
    if kind == "array":
        return f"list of {_value(said.get('items') or {})}"
    if kind == "object":
        return "mapping"
    word = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}.get(kind, "")
    marks = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{mark} {said[name]:g}" for name, mark in marks.items() if name in said]
    return " ".join([word, ", ".join(limits)]).strip()


def shipped() -> str:
    """The recipes inside the package, by what they are for."""
    lines = []
    for group, names in recipes.groups().items():
        lines += ["", f"### {group}", "", "| recipe | |", "|---|---|"]
        for name in names:
            lines.append(f"| [`{name}`](#{name}) | {recipes.load(name).description} |")
        for name in names:
            text = (ROOT / "recipes" / group / f"{name}.yaml").read_text(encoding="utf-8")
            comment, _, body = text.partition("\n\n")
            prose = " ".join(line.removeprefix("#").strip() for line in comment.splitlines())
            lines += [
                "",
                f"#### {name} {{ #{name} }}",
                "",
                prose,
                "",
                f'```yaml title="{name}.yaml"',
                body.strip(),
                "```",
            ]
    return "\n".join(lines)


# ---- models ----------------------------------------------------------------------------------------------------------


def models() -> str:
    """What works with each model family: what tests/support.json says is proved, and what the code has rows for."""
    proved: dict[str, dict[str, str]] = json.loads(SUPPORT.read_text(encoding="utf-8")) if SUPPORT.is_file() else {}
    columns = tuple(dict.fromkeys(key for row in proved.values() for key in row))
    shown = [*(column for column in columns if column != "transforms"), "AWQ, SmoothQuant", "Hadamard", "GGUF"]
    lines = [f"| `model_type` | {' | '.join(shown)} |", "|---|" + ":-:|" * len(shown)]
    reasons: dict[str, int] = {}
    for name in sorted({*proved, *FAMILIES}):
        family = family_of(name)
        cells = [_mark(proved.get(name, {}).get(column, ""), reasons) for column in columns if column != "transforms"]
        cells += ["●" if family.feeds else "", "●" if family.no_hadamard is None else "", "●" if family.gguf else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {_cell(reason)}" for reason, number in reasons.items())]
    return "\n".join(lines)


def _mark(said: str, reasons: dict[str, int]) -> str:
    """A dot for yes, and for a refusal the number of its reason."""
    if said in ("", "no", "yes", "servers only"):
        return {"yes": "●", "no": ""}.get(said, said)
    return str(reasons.setdefault(said, len(reasons) + 1))


# ---- what fits -------------------------------------------------------------------------------------------------------


def fits() -> str:
    """What `fit` proposes for known models, from docs/fits.json, which `make fit-table` writes."""
    rows: dict[str, dict[str, Any]] = json.loads((ROOT / "docs" / "fits.json").read_text(encoding="utf-8"))["rows"]
    cards = [key for key in next(iter(rows.values())) if key != "original"]
    lines = [f"| model | 16 bit | {' | '.join(cards)} |", f"|---|--:|{'---|' * len(cards)}"]
    for model, row in rows.items():
        cells = [_proposed(row[card]) for card in cards]
        lines.append(f"| [{model}](configs/{model}.json) | {row['original'] / 1e9:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _proposed(cell: dict[str, Any]) -> str:
    if "name" not in cell:
        return "nothing fits"
    word = "at most " if cell["name"] == "mixed" else ""
    return f"{cell['name']}, {word}{cell['bytes'] / 1e9:.1f}"


# ---- servers ---------------------------------------------------------------------------------------------------------


def loads(server: str) -> str:
    """The files that a server's loaders take."""
    found = SERVERS[server]
    lines: list[str] = []
    for variant in found.variants:
        if len(found.variants) > 1:
            lines += ["", f"**{variant.loader.label}**", ""]
        lines += _loader(variant.loader)
    return "\n".join(lines)


def _loader(loader: Loader) -> Iterator[str]:
    yield "| format | weights | group sizes | zero points | inputs | |"
    yield "|---|---|---|---|---|---|"
    for row in loader.rows:
        cells = (row.format, _weights(row), _groups(row), _zeros(row), ", ".join(row.inputs), row.note)
        yield f"| {' | '.join(cells)} |"


def _weights(row: Loadable) -> str:
    if not row.types:
        return "every type of GGUF files"
    return ", ".join(f"int{bits}" for bits in row.bits) if row.types == ("int",) and row.bits else ", ".join(row.types)


def _groups(row: Loadable) -> str:
    if not row.types or (row.types != ("int",) and not row.groups):
        return "the type's own"
    return ", ".join({-1: "per channel", 0: "per tensor"}.get(size, str(size)) for size in row.groups) or "any"


def _zeros(row: Loadable) -> str:
    return (
        "with or without"
        if False in row.symmetric and row.types == ("int",)
        else ""
        if row.types != ("int",)
        else "none"
    )


def versions() -> str:
    """Which formats the release that is pinned of each server takes, and the libraries it reads their configs with."""
    lines = ["| | release | transformers | compressed-tensors | formats |", "|---|---|---|---|---|"]
    for server in SERVERS.values():
        for loader in (variant.loader for variant in server.variants):
            old = {bits for row in loader.rows if not row.since for bits in row.bits}
            young = {row.since: [f"int{bits}" for bits in row.bits if bits not in old]
                     for row in loader.rows if row.since}  # fmt: skip
            first = "".join(f"; {', '.join(kinds)} from {since} on" for since, kinds in young.items())
            formats = ", ".join(loader.formats) + first
            held = (loader.inside.get(name, "") for name in ("transformers", "compressed_tensors"))
            lines.append(f"| {' | '.join((loader.label, loader.version, *held, formats))} |")
    return "\n".join(lines)


def settings(server: str) -> str:
    """What a recipe's target of this server may set."""
    chosen = SERVERS[server].settings
    assert chosen is not None
    return "\n".join(_keys(SCHEMA["$defs"][chosen.__name__]))


# ---- command line and Python -----------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its arguments and options."""
    lines = []
    group: Any = typer.main.get_command(app)
    context = group.make_context("quantpress", [], resilient_parsing=True)
    for name in group.list_commands(context):
        command = group.commands[name]
        words = [
            f"{p.name.upper()}{'…' if p.nargs == -1 else ''}" for p in command.params if p.param_type_name == "argument"
        ]
        lines += [
            "",
            f"## {name}",
            "",
            f"    quantpress {' '.join([name, *words])}",
            "",
            " ".join(command.help.split()),
            "",
        ]
        rows = [(p, p.param_type_name == "argument") for p in command.params if not getattr(p, "hidden", False)]
        if rows:
            lines += ["| | |", "|---|---|"]
        for parameter, argument in rows:
            shown = parameter.name.upper() if argument else ", ".join(parameter.opts)
            lines.append(f"| `{shown}` | {_cell(parameter.help or '')} |")
    return "\n".join(lines)


def api() -> str:
    """The public functions: signature and docstring, read without importing them."""
    tree = ast.parse((ROOT / "quantize" / "api.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    public = ("run", "plan", "quantize", "evaluate", "draft", "export", "verify", "smoke", "check", "load_model",
              "convert", "report", "compare", "card", "sweep", "reproduce")  # fmt: skip
    lines = []
    for name in public:
        node = functions[name]
        shown = name.removesuffix("_model")
        lines += ["", f"### {shown}", "", "```python", _signature(shown, node), "```", "", *_prose(node)]
    return "\n".join(lines)


def _signature(name: str, node: ast.FunctionDef) -> str:
    whole = f"{name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else 'None'}"
    if len(whole) <= 88:
        return whole
    positional = [ast.unparse(argument) for argument in node.args.args]
    defaults = [""] * (len(positional) - len(node.args.defaults)) + [f" = {ast.unparse(d)}" for d in node.args.defaults]
    lines = [f"    {argument}{default}," for argument, default in zip(positional, defaults, strict=True)]
    lines += ["    *,"] if node.args.kwonlyargs else []
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        lines.append(f"    {ast.unparse(argument)}{f' = {ast.unparse(default)}' if default else ''},")
    return "\n".join([f"{name}(", *lines, f") -> {ast.unparse(node.returns) if node.returns else 'None'}"])


def _prose(node: ast.FunctionDef) -> Iterator[str]:
    """The docstring, its arguments (`name: what`) set off, its example as code."""
    for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
        if paragraph.startswith("    "):
            yield from ("```python", *(line.removeprefix("    ") for line in paragraph.splitlines()), "```", "")
        else:
            known = "|".join(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
            text = _cell(paragraph)
            yield re.sub(rf"(?:(?<=^)|(?<=\. ))((?:(?:{known})(?:, )?)+):", r"**\1**:", text)
            yield ""


_PARTS: dict[str, Callable[..., str]] = {
    "recipe": recipe_reference, "recipes": shipped, "loads": loads, "settings": settings, "commands": commands,
    "api": api, "models": models, "fits": fits, "versions": versions,
}  # fmt: skip
