"""text-generation-inference: the launcher on the artifact. In maintenance.

Flags: docs/source/reference/launcher.md of huggingface/text-generation-inference; image: its README.
"""

from collections.abc import Iterator
from importlib.metadata import version
from typing import ClassVar, Literal

from pydantic import Field

from .deployment import HOST, MODEL, PORT, Deployment, ModelFolder, completion
from .loader import ANY_SYMMETRY, FP8_INPUTS, MARLIN_GROUPS, CannotAsk, Loadable, Loader, ParserQuestion
from .served_model import ServedModel, marlin_misfits
from .server import Server
from .target_settings import LISTENS_ON, MultiGpu

VERSION = "3.3.7"
_HEALTH = "/health"

_ROWS = (  # server/text_generation_server/layers of huggingface/text-generation-inference, 3.3
    # marlin/gptq.py: can_use_gptq_marlin. Zeros are read as in version 1; our asymmetric files are version 2.
    Loadable("gptq", bits=(4, 8), groups=MARLIN_GROUPS, scattered=True),
    # awq/quantize/cuda.py, and Marlin for its own group sizes.
    Loadable("awq", bits=(4,), groups=MARLIN_GROUPS, symmetric=ANY_SYMMETRY),
    # compressed_tensors/loader.py: one format for all groups of layers. wna16_int.py repacks for Marlin; of fused
    # linears it asks for zeros called qzeros, which no such file has.
    Loadable("compressed-tensors", bits=(4, 8), groups=MARLIN_GROUPS),
    # w8a8_int.py rounds static inputs dynamically, which is not the model that was measured.
    Loadable("compressed-tensors", bits=(8,), groups=(-1,), inputs=("int8 dynamic",)),
    # w8an_fp.py: one scale a row or a tensor, none a block.
    Loadable("compressed-tensors", ("fp8",), inputs=FP8_INPUTS),
)


def _limits(model: ServedModel, gpus: int) -> Iterator[str]:
    """server/text_generation_server: GPTQMarlinWeightsLoader has no list of excluded layers and one kind of weight."""
    yield from _marlin(model, gpus)
    dense = next((name for name, grid in model.schemes.items() if grid is None), None)
    if model.format in ("gptq", "awq") and dense is not None:
        yield f"TGI wants every linear of {model.format} files quantized, and {dense} is not: use compressed-tensors"
    if model.format == "gptq" and len(model.grids) > 1:
        kinds = ", ".join(map(str, model.grids))
        yield f"TGI reads one kind of weight in gptq files, and these have {kinds}: drop `overrides`"


def _marlin(model: ServedModel, gpus: int) -> Iterator[str]:
    """marlin/gptq.py: _check_valid_shape, of what flash_llama_modeling.py fuses."""
    found = None if model.activations is not None else next(marlin_misfits(model, gpus, ("int",)), None)
    if found is not None:
        yield (
            f"TGI's kernel for 16-bit inputs takes multiples of 128 x 64 or of 64 x 128, and {found.said}: "
            "set weights of 8 bits a channel and activations: {type: int8}"
        )


def _parse(question: ParserQuestion) -> tuple[str, str]:
    """Ask the library with which TGI parses a compressed-tensors config."""
    if question.model.format != "compressed-tensors":
        raise CannotAsk("TGI has no parser that runs here")
    from compressed_tensors.quantization import QuantizationConfig

    by = f"the library that TGI parses such configs with (compressed-tensors {version('compressed-tensors')})"
    try:
        QuantizationConfig.model_validate(question.model.config["quantization_config"])
    except ValueError as error:
        return by, " ".join(str(error).split())
    return by, ""


LOADER = Loader(
    "tgi",
    "TGI",
    _ROWS,
    _limits,
    _parse,
    version=VERSION,
    inside={"transformers": "4.51.3", "compressed_tensors": "0.9.4"},
)


class Tgi(MultiGpu):
    """Hugging Face's text-generation-inference."""

    name: Literal["tgi"] = Field("tgi", description="selects TGI")
    _loader: ClassVar[Loader] = LOADER
    port: int = Field(8080, ge=1, le=65535, description=LISTENS_ON)


def deploy(target: Tgi, folder: ModelFolder) -> Deployment:
    """How the launcher is started on the model in `folder`."""
    arguments = ["--model-id", MODEL, "--hostname", HOST, "--port", PORT, "--num-shard", str(target.tensor_parallel)]
    arguments += ["--max-concurrent-requests", str(target.max_num_seqs), "--usage-stats", "off"]
    if target.max_model_len is not None:
        # Input tokens have to be fewer than all tokens, or nothing could be answered.
        arguments += ["--max-total-tokens", str(target.max_model_len)]
        arguments += ["--max-input-tokens", str(target.max_model_len - 1)]
    if folder.kv_cache == "fp8":
        arguments += ["--kv-cache-dtype", "fp8_e4m3fn"]
    return Deployment(
        name=folder.name,
        title=f"text-generation-inference {VERSION}",
        image=f"ghcr.io/huggingface/text-generation-inference:{VERSION}",
        local=("text-generation-launcher",),
        entrypoint=("/tgi-entrypoint.sh",),
        arguments=tuple(arguments),
        needs="text-generation-launcher, built from source; the container is the usual way",
        port=target.port,
        health=_HEALTH,
        check=("curl", "-fsS", f"http://127.0.0.1:{target.port}{_HEALTH}"),
        probe=completion(folder, target.port),
        resources=folder.resources,
        env={"HF_HUB_OFFLINE": "1"},
    )


SERVER = Server(
    name="tgi",
    settings=Tgi,
    deploy=deploy,
    variants=(Tgi(),),
    hub_command="docker run --gpus all --shm-size 1g -p 8080:80 "
    "ghcr.io/huggingface/text-generation-inference --model-id {name}",
)
