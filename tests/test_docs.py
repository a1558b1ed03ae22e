"""What the documents show can be done: commands parse, their recipes load, messages exist, pages are whole."""

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from quantpress.cli.app import app
from quantpress.recipe import Recipe
from quantpress.recipe.loading import load, parse, shipped

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: (?P<options>[^\n]*))?\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S
)
_NEW = ("recipe.yaml", "chat.yaml")  # files that a reader is taken to have


def blocks(page: str, language: str) -> Iterator[tuple[str, str]]:
    """(title, code) of each fenced block of a language, without its indent."""
    for found in _FENCE.finditer(PAGES[page]):
        if found["language"] == language:
            title = re.search(r'title="([^"]+)"', found["options"] or "")
            yield title[1] if title else "", re.sub(rf"^{found['indent']}", "", found["body"], flags=re.M)


def shell_lines(page: str) -> list[str]:
    """Each command of a page, from fenced blocks or, as in README and CONTRIBUTING, indented ones."""
    text = "\n".join(code for _, code in blocks(page, "sh")) if page.startswith("docs") else PAGES[page]
    text = text.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if page.startswith("docs") or line.startswith("    ")]
    return [part for line in lines for part in re.split(r" && ", re.sub(r"\s+#.*$", "", line))]


@cache
def recipe_files() -> dict[str, str]:
    """The recipes that pages show, by file name."""
    return {title: code for page in PAGES for title, code in blocks(page, "yaml") if title in _names_of_recipes()}


def _names_of_recipes() -> set[str]:
    titles = {title for page in PAGES for title, _ in blocks(page, "yaml")}
    return {title for title in titles if title.endswith(".yaml") and not title.startswith(".")}


QUANTPRESS = [
    (page, line) for page in PAGES for line in shell_lines(page) if re.match(r"(\.venv/bin/)?quantpress ", line)
]


@pytest.mark.parametrize(("page", "line"), QUANTPRESS, ids=lambda value: value.replace("/", "-"))
def test_a_command_of_the_documents_parses(page: str, line: str, tmp_path: Path) -> None:
    """Its command, options and values are known to the real command line, and its recipe loads with its overrides."""
    _, name, *words = shlex.split(line.split(" > ")[0])
    if name.startswith("--"):  # an option of quantpress itself
        assert name in {option for parameter in GROUP.params for option in parameter.opts}
        return
    context = COMMANDS[name].make_context(name, list(words))
    given = context.params
    named = given.get("recipe") or (given.get("names") if not given.get("check") else None)
    for recipe in [named] if isinstance(named, str) else named or []:
        where = recipe
        if recipe in recipe_files():
            (tmp_path / recipe).write_text(recipe_files()[recipe])
            where = str(tmp_path / recipe)
        elif recipe in _NEW:
            continue
        sets = list(given.get("sets") or ())
        if page == "docs/choosing.md" and where == "w3a16-gptq":
            sets = []  # the page shows that this target is refused
        load(where, sets)


def test_the_refusal_that_a_page_shows_is_what_is_said() -> None:
    with pytest.raises(ValueError, match="SGLang") as error:
        load("w3a16-gptq", ["targets=[sglang]"])
    assert f"quantpress: {error.value}\n" in PAGES["docs/choosing.md"]


def test_every_command_and_every_target_of_make_is_documented() -> None:
    shown = {line.split()[1] for _, line in QUANTPRESS}
    assert set(COMMANDS) - shown - {"doctor", "schema", "gguf", "convert", "report", "quantize"} == set()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    used = {found for page in PAGES for line in shell_lines(page) for found in re.findall(r"^make ([a-z][\w-]*)", line)}
    used |= {found for text in PAGES.values() for found in re.findall(r"`make ([a-z][\w-]*)", text)}
    assert used <= targets


RECIPES = sorted(
    (page, title, code) for page in PAGES for title, code in blocks(page, "yaml") if title in _names_of_recipes()
)


@pytest.mark.parametrize(("page", "title", "code"), RECIPES, ids=lambda value: value[:24].strip())
def test_a_recipe_of_the_documents_is_valid_for_us_and_for_editors(page: str, title: str, code: str) -> None:
    document = yaml.safe_load(code)
    parse(dict(document))
    jsonschema.Draft202012Validator(Recipe.model_json_schema()).validate(document)


def _readme_recipe() -> str:
    block = re.search(r"\n((?:    .*\n)*?    name: .*\n(?:    .*\n)+)", README)
    assert block is not None
    return block[1]


def test_the_recipe_of_the_readme_is_valid_and_the_tutorials() -> None:
    assert parse(yaml.safe_load(_readme_recipe())).gates.limits()
    assert yaml.safe_load(_readme_recipe()) == yaml.safe_load(recipe_files()["support-bot.yaml"])


def test_editors_accept_what_loads_and_refuse_what_does_not() -> None:
    schema = jsonschema.Draft202012Validator(Recipe.model_json_schema())
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").rglob("*.yaml"))]
    for text in (*texts, "{method: rtn, transforms: [awq], gates: {max_kl: 0.1}, evaluation: {tasks: [a]}}"):
        schema.validate(yaml.safe_load(text))
    for wrong in ("{method: {name: gtpq}}", "{methud: rtn}", "{weights: {bits: 9}}", "{calibration: {samples: many}}"):
        assert not schema.is_valid(yaml.safe_load(wrong)), wrong


def test_every_key_of_a_recipe_has_a_description() -> None:
    schema = Recipe.model_json_schema()
    models = {"Recipe": schema, **schema["$defs"]}
    bare = [f"{name}.{key}" for name, model in models.items() for key, said in model.get("properties", {}).items()
            if not said.get("description")]  # fmt: skip
    assert bare == []


# ---- pages that are generated ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_key_command_and_recipe(generate: Any) -> None:
    reference, schema = generate.recipe_reference(), Recipe.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        for key in model.get("properties", ()):
            assert f"| `{key}` |" in reference
    assert all(f"\n## {name}\n" in generate.commands() for name in COMMANDS)
    assert all(f"#### {name} {{" in generate.shipped() for name in shipped())
    functions = {node.name for node in ast.parse((ROOT / "quantize/api.py").read_text()).body
                 if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}  # fmt: skip
    shown = set(re.findall(r"^### (\w+)$", generate.api(), re.M))
    assert shown == {name.removesuffix("_model") for name in functions - {"write_gguf", "run_folder"}}


def test_a_page_is_filled_in_where_it_asks_for_it(generate: Any) -> None:
    for page, text in PAGES.items():
        assert not re.search(r"--8 < -|--8<--\S", text), page  # a formatter took it for Python
        filled = generate.on_page_markdown(text)
        assert "\n<!-- " not in filled, page
    assert "| gptq | int4, int8 | per channel, 32, 64, 128 | none | 16 bit |  |" in generate.loads("vllm")


# ---- messages --------------------------------------------------------------------------------------------------------


def said_by_the_code() -> list[str]:
    """Every text of the code, with … where a value is filled in."""
    found = []
    for top in ("quantize", "eval", "export"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_troubleshooting_explains_messages_that_exist() -> None:
    text = "\n".join(said_by_the_code())
    messages = re.findall(r"^### (.*)$", PAGES["docs/troubleshooting.md"].split("\n## Results")[0], re.M)
    assert len(messages) > 25
    for message in messages:
        for part in message.split("…"):
            words = part.strip(" ;:()")
            assert words in text, message


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    """Anchors and generated pages are checked by `make docs`, which is strict."""
    for target in re.findall(r"\]\(([^)#\s]+)", PAGES[page]):
        if not re.match(r"https?:|mailto:", target):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_navigation_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    listed = set(re.findall(r"[\w/-]+\.md", text))
    assert listed == {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}


def test_the_repository_layout_has_every_folder() -> None:
    layout = PAGES["CONTRIBUTING.md"].split("## Repository layout")[1].split("\n## ")[0]
    there = {
        path.parent.name for top in ("quantize", "eval", "export", "recipes") for path in ROOT.glob(f"{top}/**/*.py")
    }
    assert {name for name in there if f" {name}/" not in layout} == set()


def test_each_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[>=<!\[; ]", requirement)[0] for requirement in project["dependencies"]}
    table = PAGES["CONTRIBUTING.md"].split("## Dependencies")[1].split("What is written by hand")[0]
    given = {name for row in re.findall(r"^\| ([^|]+) \|", table, re.M) for name in re.findall(r"[\w-]+", row)}
    assert names - given == set()
