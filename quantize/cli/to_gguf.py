"""The command that writes a GGUF file of a checkpoint or an artifact, without a recipe."""

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from ..core.errors import BadInput
from ..recipe.gguf_file import FloatFile
from .app import app
from .options import PickleOpt, cache_folder, out_console, quiet_libraries, say


@app.command()
def gguf(
    source: Annotated[str, typer.Argument(help="a checkpoint or artifact folder, hub id or smollm2-135m")],
    out: Annotated[Path, typer.Argument(help="the .gguf file to write")],
    kind: Annotated[str, typer.Option("--type", help="F32, F16 or BF16")] = "F16",
    split: Annotated[int | None, typer.Option("--split", help="most bytes of tensors in one file")] = None,
    allow_pickle: PickleOpt = False,
) -> None:
    """A GGUF file of floats; a quantized artifact is written as what it computes with. Recipes gguf-* quantize."""
    from ..engine.sources import resolve

    if kind not in get_args(FloatFile):
        raise BadInput(f"--type {kind}: {', '.join(get_args(FloatFile))}; to quantize run a recipe such as gguf-q4_k_m")
    if out.suffix != ".gguf":
        raise BadInput(f"{out}: give a name that ends in .gguf")
    quiet_libraries()
    from ..artifact.gguf_floats import write_floats

    folder = resolve(source, cache=cache_folder(), allow_pickle=allow_pickle).path
    for file in write_floats(folder, out, cast(FloatFile, kind), split, lambda line: say(f"note: {line}")):
        out_console.print(f"written: {file}")
