"""Every server, one file each; SERVERS lists them. Nothing here needs torch."""

from . import llama_cpp, ollama, sglang, tensorrt_llm, tgi, transformers_serve, triton, vllm
from .loader import Loader
from .server import Launcher, Server

_FILES = (vllm, sglang, tgi, tensorrt_llm, triton, llama_cpp, ollama, transformers_serve)

SERVERS: dict[str, Server] = {file.SERVER.name: file.SERVER for file in _FILES}
# The servers that the smoke test can start on this machine.
LAUNCHERS: dict[str, Launcher] = {name: server.launcher for name, server in SERVERS.items() if server.launcher}
LOADERS: dict[str, Loader] = {
    target.loader.name: target.loader for server in SERVERS.values() for target in server.variants
}
