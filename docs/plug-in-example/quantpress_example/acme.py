"""A server: what it loads, what a recipe may set, how it is started."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from quantpress.exports.servers.deployment import HOST, MODEL, PORT, Deployment, ModelFolder, completion
from quantpress.exports.servers.loader import Loadable, Loader
from quantpress.exports.servers.served_model import ServedModel
from quantpress.exports.servers.server import Launch, Launcher, Server
from quantpress.exports.servers.target_settings import MultiGpu


def _limits(model: ServedModel, gpus: int) -> Iterator[str]:
    dense = next((name for name, grid in model.schemes.items() if grid is None), None)
    if dense is not None:
        yield f"Acme wants every linear quantized, and {dense} is not"


LOADER = Loader("acme", "Acme", (Loadable("bytes", bits=(4, 8), groups=(32,), note="from version 1.0 on"),), _limits)


class Acme(MultiGpu):
    """The keys that a recipe may set for this target."""

    name: Literal["acme"] = "acme"
    colour: Literal["red", "blue"] = Field("red", description="of its dashboard")
    _loader: ClassVar[Loader] = LOADER


def deploy(target: Acme, folder: ModelFolder) -> Deployment:
    return Deployment(
        name=folder.name,
        title="Acme 1.0",
        image="acme/acme:1.0",
        local=("acme-server",),
        entrypoint=("acme-server",),
        arguments=(MODEL, "--host", HOST, "--port", PORT, "--colour", target.colour),
        needs="a GPU",
        port=target.port,
        health="/health",
        check=("acme-server", "check"),
        probe=completion(folder, target.port),
        resources=folder.resources,
    )


def _command(launch: Launch) -> list[str]:
    return [launch.python, "-m", "acme", str(launch.artifact)]


SERVER = Server(
    name="acme",
    settings=Acme,
    deploy=deploy,
    variants=(Acme(),),
    launcher=Launcher(name="acme", reads="folder", needs=("acme",), install="`pip install acme`", command=_command),
)
