"""The arrows: `recipe, grid <- methods, formats <- pipeline <- export <- eval <- cli`, read off the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("quantize", "eval", "export", "recipes")

# Who may know whom. A file of quantize/ that is not named here is a part of the engine, below the pipeline.
MAY_IMPORT = {
    "errors": (),
    "recipe": ("errors",),
    "ggml": ("errors", "recipe"),
    "grid": ("errors", "recipe", "ggml"),
    "methods": ("errors", "recipe", "ggml", "grid"),
    "activations": ("errors", "recipe", "grid"),
    "formats": ("errors", "recipe", "ggml", "grid", "activations"),
    "engine": ("errors", "recipe", "ggml", "grid", "methods", "activations", "formats"),
    "pipeline": ("errors", "recipe", "ggml", "grid", "methods", "activations", "formats", "engine"),
    "reproduce": ("errors", "recipe", "engine", "pipeline"),
    "export": ("errors", "recipe", "grid", "activations", "formats", "engine", "pipeline"),
    "eval": ("errors", "recipe", "grid", "activations", "formats", "engine", "pipeline", "export"),
    "cli": ("errors", "recipe", "engine", "pipeline", "reproduce", "export", "eval"),
    "recipes": (),
}
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
    """The layer of a dotted module such as quantpress.quantize.methods.gptq."""
    folder, *rest = module.split(".")[1:]
    if folder != "quantize":
        return folder
    first = rest[0] if rest else "engine"
    return first if first in MAY_IMPORT else "engine"


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
    return module in {"quantpress", *(f"quantpress.{folder}" for folder in FOLDERS)}


def violations(path: str, source: str) -> list[str]:
    """Every rule that the file at `path` (relative to the repository) breaks, one line each."""
    tree = ast.parse(source)
    parts = path.removesuffix(".py").split("/")
    if parts[0] not in FOLDERS:
        return [f"{path}:{line}: bare import of {n}" for line, n, _ in imports(tree, "tests") if _bare(n)]
    package = ".".join(["quantpress", *parts[:-1]])
    own = layer(".".join(["quantpress", *(parts[:-1] if parts[-1] == "__init__" else parts)]))
    found = []
    for line, name, level in imports(tree, package):
        top = name.split(".")[0]
        inside = name.startswith(f"quantpress.{parts[0]}.") or name == f"quantpress.{parts[0]}"
        if level and not inside:
            found.append(f"{path}:{line}: relative import leaves {parts[0]}/ ({name})")
        elif not level and inside:
            found.append(f"{path}:{line}: absolute import inside {parts[0]}/ ({name})")
        elif _bare(name):
            found.append(f"{path}:{line}: bare import of {name}")
        elif top == "quantpress" and layer(name) not in (own, *MAY_IMPORT[own]):
            found.append(f"{path}:{line}: {own} must not know {layer(name)} ({name})")
        elif own == "recipe" and top not in RECIPE_NEEDS and top != "quantpress":
            found.append(f"{path}:{line}: the recipe must load without {top}")
        elif own == "methods" and top in IO_MODULES:
            found.append(f"{path}:{line}: a method does no I/O ({name})")
    if own == "methods":
        calls = [(node.lineno, ast.unparse(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found += [f"{path}:{line}: a method does no I/O ({call}())" for line, call in calls if call in IO_CALLS]
    return found


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


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("quantize/recipe/text.py", "import torch", "the recipe must load without torch"),
        ("quantize/recipe/text.py", "from torch import Tensor", "the recipe must load without torch"),
        ("quantize/recipe/text.py", "def f():\n    import torch.nn", ":2: the recipe must load without torch"),
        ("quantize/recipe/text.py", "from ..grid import fit", "recipe must not know grid"),
        ("quantize/grid.py", "from .methods import ROUNDERS", "grid must not know methods"),
        ("quantize/errors.py", "from .recipe import Grid", "errors must not know recipe"),
        ("quantize/methods/gptq.py", "from ..pipeline import run", "methods must not know pipeline"),
        ("quantize/methods/gptq.py", "from .. import pipeline", "methods must not know pipeline"),
        ("quantize/methods/gptq.py", "from ..model import Block", "methods must not know engine"),
        ("quantize/methods/gptq.py", "from ..formats import FORMATS", "methods must not know formats"),
        ("quantize/methods/new/deep.py", "from ...cli import main", "methods must not know cli"),
        ("quantize/methods/gptq.py", "import safetensors.torch", "does no I/O"),
        ("quantize/methods/gptq.py", "import logging", "does no I/O"),
        ("quantize/methods/rtn.py", "def rtn(w):\n    print(w)", ":2: a method does no I/O (print())"),
        ("quantize/methods/rtn.py", "torch.save(w, 'w')", "does no I/O"),
        ("quantize/formats/gptq.py", "from ..methods import ROUNDERS", "formats must not know methods"),
        ("quantize/formats/gptq.py", "from ..checkpoint import Reader", "formats must not know engine"),
        ("quantize/formats/__init__.py", "from ..cli import main", "formats must not know cli"),
        ("quantize/model.py", "from .pipeline import run", "engine must not know pipeline"),
        ("quantize/model.py", "from quantpress.eval import perplexity", "engine must not know eval"),
        ("quantize/pipeline.py", "from quantpress.eval.report import page", "pipeline must not know eval"),
        ("quantize/pipeline.py", "import quantpress.export", "pipeline must not know export"),
        ("quantize/pipeline.py", "from quantpress import eval", "pipeline must not know eval"),
        ("quantize/pipeline.py", "import_module('quantpress.eval')", "pipeline must not know eval"),
        ("quantize/pipeline.py", "from .cli import main", "pipeline must not know cli"),
        ("quantize/pipeline.py", "if TYPE_CHECKING:\n    from quantpress.eval import X", "pipeline must not know eval"),
        ("export/vllm.py", "from quantpress.eval.perplexity import perplexity", "export must not know eval"),
        ("export/vllm.py", "from quantpress.quantize.cli import main", "export must not know cli"),
        ("eval/report.py", "from quantpress.quantize.cli import main", "eval must not know cli"),
        ("eval/report.py", "from quantpress.quantize import cli", "eval must not know cli"),
        ("recipes/__init__.py", "from quantpress.quantize.recipe import load", "recipes must not know recipe"),
        ("eval/report.py", "from ..quantize.grid import Grid", "relative import leaves eval/"),
        ("quantize/methods/gptq.py", "from ...eval import report", "relative import leaves quantize/"),
        ("quantize/model.py", "from quantpress.quantize.grid import Grid", "absolute import inside quantize/"),
        ("eval/report.py", "import quantpress.eval.gates", "absolute import inside eval/"),
        ("eval/report.py", "import quantize", "bare import of quantize"),
        ("quantize/cli/build.py", "from eval import report", "bare import of eval"),
        ("quantize/cli/build.py", "from export.vllm import check", "bare import of export"),
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
        ("quantize/recipe/text.py", "import yaml\nfrom pydantic import BaseModel\nfrom ..errors import BadInput"),
        ("quantize/grid.py", "import torch\nfrom .recipe import Grid"),
        ("quantize/methods/gptq.py", "import torch\nfrom ..grid import fit\nfrom .rtn import rtn"),
        ("quantize/methods/__init__.py", "from .gptq import gptq\nfrom ..recipe import Grid"),
        ("quantize/formats/gptq.py", "import json, safetensors\nfrom ..grid import QuantizedLinear"),
        ("quantize/model.py", "from .checkpoint import Reader\nfrom . import grid\nimport evaluate"),
        ("quantize/pipeline.py", "from .methods import ROUNDERS\nfrom .model import Block"),
        (
            "quantize/cli/build.py",
            "from quantpress.eval.report import page\nfrom quantpress.export import TARGETS\nfrom .plan import x",
        ),
        (
            "export/vllm.py",
            "from quantpress.quantize.grid import Grid\nfrom quantpress.quantize.formats import FORMATS",
        ),
        ("eval/report.py", "from quantpress.export import vllm\nfrom .gates import check"),
        ("tests/test_x.py", "from quantpress.eval import report\nimport evaluate"),
    ],
)
def test_an_arrow_that_runs_forward_is_not(path: str, source: str) -> None:
    assert violations(path, source) == []
