"""The arrows between the rooms, read off the source: each folder is a layer of its own, and none knows a later one."""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("quantize", "eval", "export", "recipes")
PACKAGES = {"quantize": "quantpress", "eval": "quantpress.eval", "export": "quantpress.exports",
            "recipes": "quantpress.recipes"}  # fmt: skip

# Every folder that holds code, from the ground up, and what each may know. A file at the top of quantize/ is the public
# API. The order of this table is the order of the arrows: a folder may only name folders above it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "recipes": (),
    "core": (),
    "numbers": ("core",),
    "plugin": ("core", "numbers"),
    "exports.servers": ("core", "numbers"),
    "recipe": ("core", "numbers", "plugin", "exports.servers"),
    "methods": ("core", "numbers", "plugin", "recipe"),
    "formats": ("core", "numbers", "plugin", "recipe"),
    "models": ("core", "numbers", "methods"),
    "calibrate": ("core", "numbers", "recipe", "methods", "models"),
    "gguf": ("core", "numbers", "recipe", "methods", "formats", "models", "calibrate"),
    "artifact": ("core", "numbers", "recipe", "formats", "models", "calibrate", "gguf"),
    "engine": ("core", "numbers", "recipe", "methods", "formats", "models", "calibrate", "gguf", "artifact"),
    "exports": ("core", "numbers", "recipe", "formats", "models", "calibrate", "gguf", "artifact", "engine",
                "exports.servers", "exports.serving"),
    "exports.serving": ("core", "recipe", "models", "calibrate", "gguf", "artifact", "engine", "exports.servers"),
    "eval.measure": ("core", "numbers", "recipe", "models", "calibrate", "gguf", "artifact", "engine",
                     "exports.serving"),
    "eval.report": ("core", "recipe", "artifact", "exports", "exports.servers", "exports.serving", "eval.measure"),
    "eval.release": ("core", "numbers", "recipe", "models", "calibrate", "gguf", "artifact", "engine", "exports",
                     "exports.servers", "exports.serving", "eval.measure", "eval.report"),
    "api": ("core", "recipe", "artifact", "engine", "exports", "exports.serving", "eval.measure", "eval.report",
            "eval.release"),
    "cli": ("api", "core", "recipe", "engine", "exports.servers", "exports.serving", "eval.measure", "eval.report",
            "eval.release"),
}  # fmt: skip
RECIPE_NEEDS = {
    "collections",
    "dataclasses",
    "difflib",
    "fnmatch",
    "importlib",
    "pathlib",
    "pydantic",
    "re",
    "typing",
    "yaml",
}
# What a method must not reach for: files, the network, processes, logs, clocks, whole models.
IO_MODULES = {
    "datasets", "httpx", "huggingface_hub", "io", "json", "logging", "os", "pathlib", "pickle", "requests", "rich",
    "safetensors", "shutil", "socket", "subprocess", "sys", "tempfile", "time", "transformers", "urllib", "warnings",
}  # fmt: skip
IO_CALLS = {"open", "print", "input", "torch.load", "torch.save"}


def layer(module: str) -> str:
    """The layer of a dotted module such as quantpress.methods.gptq."""
    parts = module.split(".")[1:]
    for length in (2, 1):
        if ".".join(parts[:length]) in MAY_IMPORT:
            return ".".join(parts[:length])
    if parts[:1] == ["__main__"]:
        return "cli"
    return "eval" if parts[:1] == ["eval"] else "api"


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str, int]]:
    """Line, absolute dotted name and relative level of every import in a file of `package`, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from . import grid` names a module; `from .grid import fit` names one already.
            names = (f"{base}.{alias.name}" for alias in node.names) if not node.module or _is_package(base) else [base]
            yield from ((node.lineno, name, node.level) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(a.value), 0) for a in node.args[:1] if isinstance(a, ast.Constant))


def _is_package(module: str) -> bool:
    return module in PACKAGES.values()


def violations(path: str, source: str) -> list[str]:
    """Every rule that the file at `path` (relative to the repository) breaks, one line each."""
    tree = ast.parse(source)
    top_folder, *inner = path.removesuffix(".py").split("/")
    if top_folder not in FOLDERS:
        inside_tests = ".".join([top_folder, *inner[:-1]])
        return [f"{path}:{line}: bare import of {n}" for line, n, _ in imports(tree, inside_tests) if _bare(n)]
    package = ".".join([PACKAGES[top_folder], *inner[:-1]])
    own = layer(package if inner[-1] == "__init__" else f"{package}.{inner[-1]}")
    found = []
    for line, name, level in imports(tree, package):
        top = name.split(".")[0]
        inside = top == "quantpress" and _folder(name) == top_folder
        if level and not inside:
            found.append(f"{path}:{line}: relative import leaves {top_folder}/ ({name})")
        elif not level and inside:
            found.append(f"{path}:{line}: absolute import inside {top_folder}/ ({name})")
        elif _bare(name):
            found.append(f"{path}:{line}: bare import of {name}")
        elif top == "quantpress" and layer(name) not in (own, *MAY_IMPORT.get(own, ())):
            found.append(f"{path}:{line}: {own} must not know {layer(name)} ({name})")
        elif own == "recipe" and top not in RECIPE_NEEDS and top != "quantpress":
            found.append(f"{path}:{line}: the recipe must load without {top}")
        elif own == "methods" and top in IO_MODULES:
            found.append(f"{path}:{line}: a method does no I/O ({name})")
    if own == "methods":
        calls = [(node.lineno, ast.unparse(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found += [f"{path}:{line}: a method does no I/O ({call}())" for line, call in calls if call in IO_CALLS]
    return found


def _folder(module: str) -> str:
    """The folder of the repository that a module of quantpress lies in."""
    second = module.split(".")[1:2]
    return {"eval": "eval", "exports": "export", "recipes": "recipes"}.get(second[0] if second else "", "quantize")


def _bare(name: str) -> bool:
    return name.split(".")[0] in FOLDERS


def sources() -> list[str]:
    return [str(p.relative_to(ROOT)) for folder in (*FOLDERS, "tests") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", sources())
def test_no_arrow_runs_back(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_folder_is_read() -> None:
    assert {"quantize/recipe/text.py", "quantize/methods/gptq.py", "tests/test_boundaries.py"} <= set(sources())
    assert {path.split("/")[0] for path in sources()} == {*FOLDERS, "tests"}


def test_every_folder_is_a_layer_and_the_layers_have_no_circle() -> None:
    folders = {str(Path(path).parent) for path in sources() if not path.startswith("tests")}
    names = {
        folder: layer(".".join([PACKAGES[folder.split("/")[0]], *folder.split("/")[1:], "x"])) for folder in folders
    }
    assert set(names.values()) - {"eval"} == set(MAY_IMPORT) - {"plugin"}  # eval/ holds nothing; plugin.py is a file
    seen: set[str] = set()
    for name, known in MAY_IMPORT.items():
        assert set(known) <= seen | {"exports.serving"}, name
        seen.add(name)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("quantize/recipe/text.py", "import torch", "the recipe must load without torch"),
        ("quantize/recipe/text.py", "from torch import Tensor", "the recipe must load without torch"),
        ("quantize/recipe/text.py", "def f():\n    import torch.nn", ":2: the recipe must load without torch"),
        ("quantize/recipe/text.py", "from ..models.skeleton import x", "recipe must not know models"),
        ("quantize/numbers/grid.py", "from ..methods import ROUNDERS", "numbers must not know methods"),
        ("quantize/core/errors.py", "from ..recipe import Recipe", "core must not know recipe"),
        ("quantize/methods/gptq.py", "from ..engine.pipeline import run", "methods must not know engine"),
        ("quantize/methods/gptq.py", "from ..engine import pipeline", "methods must not know engine"),
        ("quantize/methods/gptq.py", "from .. import models", "methods must not know models"),
        ("quantize/methods/gptq.py", "from ..formats import FORMATS", "methods must not know formats"),
        ("quantize/methods/new/deep.py", "from ...cli import main", "methods must not know cli"),
        ("quantize/methods/gptq.py", "import safetensors.torch", "does no I/O"),
        ("quantize/methods/gptq.py", "import logging", "does no I/O"),
        ("quantize/methods/rtn.py", "def rtn(w):\n    print(w)", ":2: a method does no I/O (print())"),
        ("quantize/methods/rtn.py", "torch.save(w, 'w')", "does no I/O"),
        ("quantize/formats/gptq.py", "from ..methods import ROUNDERS", "formats must not know methods"),
        ("quantize/formats/__init__.py", "from ..cli import main", "formats must not know cli"),
        ("quantize/gguf/reader.py", "from ..engine.job import Job", "gguf must not know engine"),
        ("quantize/gguf/reader.py", "if TYPE_CHECKING:\n    from ..engine.job import Job", "gguf must not know engine"),
        ("quantize/models/skeleton.py", "from ..calibrate.stages import x", "models must not know calibrate"),
        ("quantize/engine/job.py", "from quantpress.eval.measure import x", "engine must not know eval.measure"),
        ("quantize/engine/job.py", "import quantpress.exports.package", "engine must not know exports"),
        ("quantize/engine/job.py", "from quantpress import eval", "engine must not know eval"),
        ("quantize/engine/job.py", "import_module('quantpress.eval.report')", "engine must not know eval.report"),
        ("quantize/engine/job.py", "from ..cli import main", "engine must not know cli"),
        ("quantize/engine/job.py", "from ..api import plan", "engine must not know api"),
        ("export/package.py", "from quantpress.eval.measure.speed import x", "exports must not know eval.measure"),
        ("export/package.py", "from quantpress.cli import main", "exports must not know cli"),
        ("export/servers/vllm.py", "from ..package import x", "exports.servers must not know exports"),
        ("eval/measure/speed.py", "from ..report.page import x", "eval.measure must not know eval.report"),
        ("eval/report/page.py", "from ..release.sweep import x", "eval.report must not know eval.release"),
        ("eval/report/page.py", "from quantpress import cli", "eval.report must not know cli"),
        ("recipes/__init__.py", "from quantpress.recipe import load", "recipes must not know recipe"),
        ("eval/report/page.py", "from ...numbers.grid import Grid", "relative import leaves eval/"),
        ("quantize/models/skeleton.py", "from quantpress.core.errors import x", "absolute import inside quantize/"),
        ("eval/report/page.py", "import quantpress.eval.report.card", "absolute import inside eval/"),
        ("eval/report/page.py", "import quantize", "bare import of quantize"),
        ("quantize/cli/making.py", "from eval import report", "bare import of eval"),
        ("quantize/cli/making.py", "from export.vllm import check", "bare import of export"),
        ("tests/test_x.py", "import quantize.grid", "bare import of quantize"),
        ("tests/eval/test_x.py", "def f():\n    from recipes import x", "bare import of recipes"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str, complaint: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quantize/recipe/text.py", "import yaml\nfrom pydantic import BaseModel\nfrom ..core.errors import BadInput"),
        ("quantize/numbers/grid.py", "import torch\nfrom .types import Grid"),
        ("quantize/methods/gptq.py", "import torch\nfrom ..numbers.grid import fit\nfrom .rtn import rtn"),
        ("quantize/formats/gptq.py", "import json, safetensors\nfrom ..numbers.grid import QuantizedLinear"),
        ("quantize/engine/pipeline.py", "from ..methods import ROUNDERS\nfrom ..models.skeleton import Skeleton"),
        ("quantize/cli/making.py", "from quantpress.eval.report.page import page\nfrom ..engine.plan import x"),
        ("quantize/recipe/targets.py", "from quantpress.exports.servers.vllm import Vllm"),
        ("export/package.py", "from quantpress.numbers.types import Grid\nfrom .servers import vllm"),
        ("eval/report/page.py", "from quantpress.exports.serving import record\nfrom ..measure.results import x"),
        ("tests/test_x.py", "from quantpress.eval import report\nimport evaluate"),
    ],
)
def test_an_arrow_that_runs_forward_is_not(path: str, source: str) -> None:
    assert violations(path, source) == []


def circles(files: dict[str, str]) -> set[str]:
    """The modules {dotted name: source} that need, through any number of others, one that needs them."""
    needed = {name: _needed(ast.parse(source), name, files.keys()) for name, source in files.items()}
    while free := {name for name, known in needed.items() if not known & needed.keys()}:
        needed = {name: known for name, known in needed.items() if name not in free}
    return set(needed)


def _needed(tree: ast.AST, module: str, files: Collection[str]) -> set[str]:
    """The other modules that `module` imports, those for type checkers only and inside functions included."""
    is_package = any(other.startswith(f"{module}.") for other in files)
    package = module if is_package else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in files else base for name in names}
    return {name for name in found if name in files and name != module}


def test_no_circle_of_files() -> None:
    files = {}
    for path in sources():
        top_folder, *inner = path.removesuffix(".py").split("/")
        if top_folder in PACKAGES:
            name = ".".join([PACKAGES[top_folder], *inner]).removesuffix(".__init__")
            files[name] = (ROOT / path).read_text(encoding="utf-8")
    assert circles(files) == set()


def test_a_planted_circle_of_files_is_found() -> None:
    files = {
        "q.engine": "",
        "q.engine.job": "from .sharing import Shared\nfrom ..gguf import reader",
        "q.engine.sharing": "if TYPE_CHECKING:\n    from .job import Job",
        "q.gguf": "",
        "q.gguf.reader": "def f():\n    from . import writer",
        "q.gguf.writer": "import torch",
    }
    assert circles(files) == {"q.engine.job", "q.engine.sharing"}
