"""The command doctor: what is installed, what is missing, and how to get it."""

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..core.plugins import packages
from ..core.text import size
from .app import app
from .options import JsonOpt, make_options, quiet_libraries
from .printing import print_json, show_table

_LIBRARIES = ("torch", "transformers", "compressed-tensors", "safetensors", "gguf", "tokenizers")
_EXTRAS = {  # module: the extra it comes with, what it is for, and how to get it
    "lm_eval": ("tasks", "evaluation tasks", "pip install 'quantpress[tasks]'"),
    "datasets": ("datasets", "texts from the hub", "pip install 'quantpress[datasets]'"),
    "llama_cpp": ("llamacpp", "llama.cpp's quantizer", "pip install 'quantpress[llamacpp]' (built from source)"),
    "ray": ("ray", "sweeps on a cluster", "pip install 'quantpress[ray]'"),
}


@app.command()
def doctor(as_json: JsonOpt = False) -> None:
    """Show what is installed, what is missing and how to get it. Nothing is downloaded."""
    facts = _facts()
    if as_json:
        print_json(facts)
        return
    show_table((), [(name, _in_words(name, found)) for name, found in facts.items()])


def _facts() -> dict[str, Any]:
    """Each thing with its version, or `missing`: how to get it."""
    quiet_libraries()
    from quantpress.exports.servers import launchers
    from quantpress.exports.serving.starting import installed

    from ..core import machine

    where = machine.device()
    here = machine.describe(where)
    facts: dict[str, Any] = {"quantpress": version("quantpress"), "python": platform.python_version()}
    facts |= {name: version(name) for name in _LIBRARIES}
    facts |= {f"plug-in {name}": found for name, found in packages().items()}
    facts["device"] = str(here["device"])
    facts["cpu"] = {"name": here["cpu"], "cores": here["cores"], "amx": machine.has_amx()}
    facts["memory"] = {"free_bytes": machine.available_memory_bytes(), "total_bytes": here["memory_bytes"]}
    cache = make_options().cache
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    facts["cache"] = {"folder": str(cache), "free_bytes": shutil.disk_usage(there).free}
    for module, (extra, what, how) in _EXTRAS.items():
        facts[f"extra {extra}"] = {
            "for": what,
            **({"version": found} if (found := _found(module)) else {"missing": how}),
        }
    for name, launcher in launchers().items():
        found = installed(launcher)
        facts[f"server {name}"] = {"version": found} if found else {"missing": launcher.install}
        if found and launcher.is_newer(found):
            facts[f"server {name}"]["newer"] = (
                f"what it loads was checked with {launcher.checked}: verify before you serve"
            )
    return facts


def _in_words(name: str, fact: Any) -> str:
    if not isinstance(fact, dict):
        return str(fact)
    if name == "cpu":
        return f"{fact['name']}, {fact['cores']} cores, {'with' if fact['amx'] else 'without'} AMX"
    if name == "memory":
        return f"{size(fact['free_bytes'])} free of {size(fact['total_bytes'])}"
    if name == "cache":
        return f"{fact['folder']}, {size(fact['free_bytes'])} free"
    what = f"{fact['for']}: " if "for" in fact else ""
    newer = f"; newer than quantpress knows: {fact['newer']}" if "newer" in fact else ""
    return what + (f"missing: {fact['missing']}" if "missing" in fact else f"{fact['version']}{newer}")


def _found(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return f"{module} {version(module.replace('_', '-'))}"
    except PackageNotFoundError:
        return module
