"""transformers serve: for the smoke test, and what transformers itself makes of an artifact as it loads it."""

from collections.abc import Iterator

from .served_model import ServedModel, is_expert
from .server import Launch, Launcher, Server


def loading(model: ServedModel) -> Iterator[str]:
    """What transformers 5.17 to 5.24 makes of compressed-tensors files as it loads them."""
    if model.format != "compressed-tensors":
        return
    zeros = [grid for grid in model.grids if grid.type == "int" and not grid.symmetric]
    if zeros and (len(model.grids) > 1 or model.activations is not None):
        # It takes one scheme for a file that it dequantizes, and others with zero points fail.
        yield f"transformers 5.23 and newer does not load {zeros[0]} weights beside other schemes: set symmetric: true"
    yield from _experts(model)


def _experts(model: ServedModel) -> Iterator[str]:
    """Of experts, which it merges into one tensor."""
    grids = {grid for name, grid in model.schemes.items() if grid is not None and is_expert(name)}
    inputs = model.activations
    for grid in sorted(grids, key=str):
        if grid.type == "nvfp4":
            yield "transformers drops the global scales of nvfp4 experts and answers wrongly: serve with vLLM"
        elif grid.type in ("mxfp8", "fp8-block") or (inputs is not None and inputs.type == "int8"):
            yield f"transformers does not load experts of {grid} weights in this layout: serve with vLLM"
        elif grid.type == "int" and not grid.symmetric:
            yield f"transformers does not load experts of {grid} weights, with zero points: set symmetric: true"
        elif inputs is not None:
            yield f"transformers leaves the inputs of experts in 16 bit; {inputs} is for vLLM"


def _command(launch: Launch) -> list[str]:
    return [
        launch.python, "-m", "transformers.cli.transformers", "serve", str(launch.artifact),
        "--host", "127.0.0.1", "--port", str(launch.port),
    ]  # fmt: skip


SERVER = Server(
    name="transformers",
    launcher=Launcher(
        name="transformers",
        reads="folder",
        needs=("transformers", "fastapi", "uvicorn", "openai", "accelerate"),
        install="`pip install 'quantpress[transformers-server]'`",
        command=_command,
        environment=lambda launch: {"HF_HUB_OFFLINE": "1"},
        model=str,
        may_round_inputs=False,
        lacks={
            "models": "transformers serve lists the hub's cache, and not the model it serves",
            "done": "transformers serve ends its streams without [DONE]",
            "context": "transformers serve takes prompts of any length",
            "seed": "transformers serve samples only where the model's own generation_config.json says so",
            "stop_left_out": "transformers serve leaves the stop sequence in its answer",
            "token_ids": "transformers serve takes prompts as text only",
            "logprobs": "transformers serve gives no log-probabilities",
        },
    ),
)
