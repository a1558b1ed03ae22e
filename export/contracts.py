"""Whether a target will load a model, checked before the work: its loader's table, its own limits, and those of all.

The limits that all servers share are here: fused linears, tensor parallelism, positions. The models are read off a job,
an artifact folder or a GGUF file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantpress.artifact.artifact import Artifact
from quantpress.core.errors import BadInput
from quantpress.engine.job import Job
from quantpress.gguf.reader import gguf_files, open_gguf
from quantpress.models.architecture import with_text_settings

from .servers.loader import Loader, refusal
from .servers.loader import notes as loader_notes
from .servers.served_model import FUSED, ServedModel, row_parallel
from .servers.target_settings import ServerSettings
from .servers.transformers_serve import loading
from .servers.vllm import LOADER as VLLM_LOADER
from .servers.vllm import Vllm

_GGUF = {  # keys of config.json: those of GGUF metadata, after the architecture's name
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}  # fmt: skip
_BLOCK = 128  # rows and columns of a weight that share a scale in fp8-block


def of_job(job: Job, format: str) -> ServedModel:
    """The model that a run will write in `format`."""
    reader = job.skeleton.reader
    outside = {name: _sides(reader.shape(f"{name}.weight")) for name in job.backend.outside}
    return ServedModel(
        format,
        {x.name: (x.out_features, x.in_features) for x in job.linears} | outside,
        job.schemes | dict(job.backend.outside),
        job.recipe.activations,
        job.recipe.kv_cache,
        job.recipe.shuffled,
        _stated(job),
    )


def _stated(job: Job) -> dict[str, Any]:
    """The checkpoint's settings, with the positions that its class has where it names none (Gemma 3)."""
    found = with_text_settings(job.checkpoint.config)
    positions = getattr(job.skeleton.config, "max_position_embeddings", None)
    return {"max_position_embeddings": positions} | {k: v for k, v in found.items() if v is not None}


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    n_out, n_in = shape
    return n_out, n_in


def of_artifact(artifact: Artifact) -> ServedModel:
    """The model in an artifact folder; its 16-bit linears are the matrices in blocks that are not quantized."""
    format = "gguf" if artifact.is_gguf else artifact.format
    if format is None and artifact.foreign is not None:
        raise BadInput(f"{artifact.checkpoint.folder}: its weights ({artifact.foreign}) are of no format written here")
    if format is None:
        raise BadInput(f"{artifact.checkpoint.folder} is not quantized: there is no contract to check")
    read = artifact.checkpoint
    dense = [n.removesuffix(".weight") for n in read.names() if n.endswith(".weight") and len(read.shape(n)) == 2]
    dense = [n for n in dense if n not in artifact.linears and any(part.isdigit() for part in n.split("."))]
    dense = [n for n in dense if not n.endswith((".gate", ".router"))]  # routers are never quantized
    shapes = dict(artifact.shapes) | {n: (read.shape(f"{n}.weight")[0], read.shape(f"{n}.weight")[1]) for n in dense}
    return ServedModel(
        "gptq" if format.startswith("gptq") else format,
        shapes,
        dict(artifact.linears) | dict.fromkeys(dense),
        artifact.activations,
        artifact.kv_cache,
        artifact.scattered,
        with_text_settings(artifact.config),
    )


def of_folder(folder: Path) -> ServedModel:
    """The model in an artifact folder of any format. Raises BadInput for a truncated GGUF file."""
    files = gguf_files(folder)
    if not files:
        return of_artifact(Artifact(folder))
    for part in files[1:]:  # the metadata is in the first; the others only have to be whole
        open_gguf(part)
    return replace(of_gguf(files[0]), parts=len(files))


def of_gguf(file: Path) -> ServedModel:
    """The model in a GGUF file (the first part of a split one), its metadata under the keys of config.json."""
    fields = open_gguf(file).fields
    try:
        family = fields["general.architecture"].contents()
        found = {
            ours: fields[f"{family}.{theirs}"].contents()
            for ours, theirs in _GGUF.items()
            if f"{family}.{theirs}" in fields
        }
    except (KeyError, ValueError) as error:
        raise BadInput(f"{file}: the GGUF file's metadata cannot be read: {error}") from None
    return ServedModel("gguf", {}, {}, config=found)


def problems(target: ServerSettings, model: ServedModel) -> list[str]:
    """One line for each reason why `target` would not load the model; empty when it would."""
    loader, label = target.loader, target.loader.label
    grids = [("weights", grid) for grid in model.grids]
    refused = refusal(loader, model.format, grids, model.activations, scattered=model.scattered)
    found = [] if refused is None else [refused]
    found += (f"{label} {line}" for line in _fused(model))
    found += loader.limits(model, target.gpus)
    found += (f"{label} {line}" for line in _parallel(model, target.gpus))
    found += _outside(target.loader, model)
    longest, asked = model.positions, target.max_model_len
    if longest is not None and asked is not None and asked > longest:
        found.append(f"{label} is asked for max_model_len {asked}, and the model has {longest} positions: lower it")
    return found


def check_job(job: Job) -> dict[str, str]:
    """For each target of the recipe, the format it will load among those that the run writes.

    Raises BadInput when a target can load none of them.
    """
    taken: dict[str, str] = {}
    for target in job.recipe.targets:
        alternatives = [replace(job, backend=backend) for backend in job.backend.alternatives()]
        refused = {
            format: [line for one in alternatives for line in problems(target, of_job(one, format))]
            for format in job.recipe.formats
        }
        found = next((format for format, lines in refused.items() if not lines), None)
        if found is None:
            raise BadInput(f"targets: {sentence(next(iter(refused.values())))}")
        taken[target.name] = found
    return taken


def advice(job: Job) -> list[str]:
    """Notes that refuse nothing: what loads on some GPUs only, the largest tensor parallelism, how transformers loads
    experts; for a recipe without targets also why vLLM would not load the artifact, on GPUs or on a CPU."""
    found: list[str] = []
    for format in job.recipe.formats:
        model = of_job(job, format)
        if format not in VLLM_LOADER.formats:
            continue
        for target in () if job.recipe.targets else (Vllm(), Vllm(device="cpu")):
            found += problems(target, model)
        found += loader_notes(VLLM_LOADER, format, model.grids, model.activations)
        found += loading(model)
        most = max(n for n in (1, 2, 4, 8) if not list(_parallel(model, n)))
        if most < 8:
            found.append(f"tensor parallelism up to {most}: a model {next(_parallel(model, 2 * most))}")
    return list(dict.fromkeys(found))


def sentence(found: Sequence[str]) -> str:
    """All problems on one line."""
    more = len(found) - 1
    return found[0] + (f" (and {more} more: {'; '.join(found[1:])})" if more else "")


def _fused(model: ServedModel) -> Iterator[str]:
    """Linears of unlike schemes that servers fuse into one."""
    if model.format == "gguf":
        return  # ggml keeps each tensor's own type
    for fused in FUSED:
        for name in model.shapes:
            if not name.endswith(f".{fused[0]}"):
                continue
            parts = [name.removesuffix(fused[0]) + part for part in fused]
            if len({model.schemes[part] for part in parts if part in model.schemes}) > 1:
                yield f"fuses {', '.join(parts)} and needs one scheme for all of them"


def _outside(loader: Loader, model: ServedModel) -> Iterator[str]:
    """Quantized head or embeddings, which few servers load."""
    kind = model.config.get("model_type")
    for name, grid in model.schemes.items() if model.format == "compressed-tensors" else ():
        key = "embeddings" if name.rpartition(".")[2].startswith("embed") else "head"
        if grid is not None and _is_outside(name) and kind not in loader.outer.get(key, ()):
            yield f"{loader.label} is not known to load {name} of a {kind} quantized: set {key}: null"


def _is_outside(name: str) -> bool:
    """Whether a module lies outside of the blocks, which are numbered: the head or the embeddings."""
    return not any(part.isdigit() for part in name.split("."))


def _parallel(model: ServedModel, n: int) -> Iterator[str]:
    """What cannot be split evenly over `n` GPUs, by vLLM's rules: heads (ModelConfig.verify_with_parallel_config,
    LlamaAttention), scale groups (distributed/utils.py: verify_group_size_divides_partition), blocks (fp8_utils.py:
    validate_fp8_block_shape)."""
    if n == 1:
        return
    heads, kv_heads = model.heads, model.kv_heads
    if heads is not None and heads % n:
        yield f"split over {n} GPUs would cut {heads} attention heads unevenly: set tensor_parallel to a divisor"
    elif kv_heads is not None and kv_heads % n and n % kv_heads:
        yield f"split over {n} GPUs would cut {kv_heads} key-value heads unevenly: take a divisor or a multiple of them"
    for name, (n_out, n_in) in model.shapes.items():
        grid = model.schemes.get(name)
        if grid is None:
            continue
        if row_parallel(name):
            side, unit, what = n_in, 1 if grid.group_size in (-1, 0) else grid.columns(n_in), "scale group"
        else:  # gptq and awq pack the codes of neighbouring rows into one word
            side, unit, what = n_out, 32 // grid.bits if model.format in ("gptq", "awq") else 1, "packed word"
        if grid.type == "fp8-block":
            unit, what = _BLOCK, "block"
        if side % (n * unit):
            yield (
                f"split over {n} GPUs would cut a {what} of {unit} in {name} ({n_out} x {n_in}): lower tensor_parallel"
                + (" or weights.group_size" if what == "scale group" else "")
            )
            return
