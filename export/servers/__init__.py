"""Every server, one file each; SERVERS lists them. Nothing here needs torch."""

from quantpress.core.plugins import Table

from . import llama_cpp, ollama, sglang, tensorrt_llm, tgi, transformers_serve, triton, vllm
from .loader import Loader
from .server import Launcher, Server

_FILES = (vllm, sglang, tgi, tensorrt_llm, triton, llama_cpp, ollama, transformers_serve)

SERVERS: Table[Server] = Table("quantpress.servers", {file.SERVER.name: file.SERVER for file in _FILES}, Server)


def launchers() -> dict[str, Launcher]:
    """The servers that the smoke test can start on this machine."""
    return {name: server.launcher for name, server in SERVERS.items() if server.launcher}


def loaders() -> dict[str, Loader]:
    """Every loader by its name; a server has one for each device that takes other files."""
    return {target.loader.name: target.loader for server in SERVERS.values() for target in server.variants}
