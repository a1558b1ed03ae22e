"""The command doctor: what is installed, what is missing, and how to get it."""

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table

from ..core.text import size
from .app import app
from .options import JsonOpt, make_options, quiet_libraries
from .printing import out_console, print_json

_LIBRARIES = ("torch", "transformers", "compressed-tensors", "safetensors", "gguf", "tokenizers")
_EXTRAS = {  # module: what it is for, and how to get it
    "lm_eval": ("evaluation tasks", "pip install 'quantpress[tasks]'"),
    "llama_cpp": ("llama.cpp's quantizer and logits", "pip install 'quantpress[llamacpp]' (built from source)"),
    "ray": ("sweeps on a cluster", "pip install 'quantpress[ray]'"),
}


@app.command()
def doctor(as_json: JsonOpt = False) -> None:
    """Show what is installed, what is missing and how to get it. Nothing is downloaded."""
    facts = _facts()
    if as_json:
        print_json(facts)
        return
    table = Table.grid(padding=(0, 2))
    for name, found in facts.items():
        if isinstance(found, dict):
            text = "missing: " + found["missing"] if "missing" in found else ", ".join(map(str, found.values()))
        else:
            text = str(found)
        table.add_row(name, text)
    out_console.print(table, markup=False)


def _facts() -> dict[str, Any]:
    """Each thing with its version, or `missing`: how to get it."""
    quiet_libraries()
    from quantpress.exports.servers import LAUNCHERS
    from quantpress.exports.serving import installed

    from ..core import machine

    where = machine.device()
    here = machine.describe(where)
    facts: dict[str, Any] = {"quantpress": version("quantpress"), "python": platform.python_version()}
    facts |= {name: version(name) for name in _LIBRARIES}
    facts["device"] = str(here["device"])
    facts["cpu"] = f"{here['cpu']}, {here['cores']} cores, {'with' if machine.has_amx() else 'without'} AMX"
    facts["memory"] = f"{size(machine.available_memory_bytes())} free of {size(here['memory_bytes'])}"
    cache = make_options().cache
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    facts["cache"] = f"{cache}, {size(shutil.disk_usage(there).free)} free"
    for module, (what, how) in _EXTRAS.items():
        facts[what] = {"version": found} if (found := _found(module)) else {"missing": how}
    for name, launcher in LAUNCHERS.items():
        found = installed(launcher)
        facts[f"server {name}"] = {"version": found} if found else {"missing": launcher.install}
    return facts


def _found(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return f"{module} {version(module.replace('_', '-'))}"
    except PackageNotFoundError:
        return module
