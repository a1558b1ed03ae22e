"""A server that does not exist: the file that somebody who adds one writes, copied beside the others by a test."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from .deployment import HOST, MODEL, PORT, Deployment, ModelFolder, completion
from .loader import Loadable, Loader
from .served_model import ServedModel
from .server import Launch, Launcher, Server
from .target_settings import MultiGpu


def _limits(model: ServedModel, gpus: int) -> Iterator[str]:
    dense = next((name for name, grid in model.schemes.items() if grid is None), None)
    if dense is not None:
        yield f"Toy wants every linear quantized, and {dense} is not"


LOADER = Loader("toy", "Toy", (Loadable("gptq", bits=(4,), groups=(32,), note="on toy GPUs only"),), _limits)


class Toy(MultiGpu):
    """A toy."""

    name: Literal["toy"] = "toy"
    colour: Literal["red", "blue"] = Field("red", description="of the toy")
    _loader: ClassVar[Loader] = LOADER


def deploy(target: Toy, folder: ModelFolder) -> Deployment:
    return Deployment(
        name=folder.name,
        title="Toy 1.0",
        image="toy/toy:1.0",
        local=("toy-server",),
        entrypoint=("toy-server",),
        arguments=(MODEL, "--host", HOST, "--port", PORT, "--colour", target.colour),
        needs="toys",
        port=target.port,
        health="/health",
        check=("toy-server", "check"),
        probe=completion(folder.name, target.port),
        resources=folder.resources,
    )


def _command(launch: Launch) -> list[str]:
    return [launch.python, "-m", "toy", str(launch.artifact)]


SERVER = Server(
    name="toy",
    settings=Toy,
    deploy=deploy,
    variants=(Toy(),),
    launcher=Launcher(name="toy", reads="folder", needs=("toy",), install="`pip install toy`", command=_command),
)
