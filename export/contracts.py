"""What a server's loader refuses, said before the work: the readers' table, and the limits that need a model's shapes.

Read from the servers' sources and, for vLLM 0.32 on a CPU, measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantpress.artifact.artifact import Artifact
from quantpress.core.errors import BadInput
from quantpress.engine.job import Job
from quantpress.gguf.reader import gguf_files, open_gguf
from quantpress.numbers.types import Activations, Grid
from quantpress.recipe import READERS, Target, Vllm, reader_notes, refusal

# Servers multiply these in one product, so their shards need one scheme. vLLM: packed_modules_mapping of its models.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Linears whose input is split over GPUs (row-parallel); the others split their output.
_ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "w2")
_GGUF = {  # keys of config.json, and of GGUF's metadata after the architecture's name
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}  # fmt: skip
_BLOCK = 128  # rows and columns of a weight that share a scale in fp8-block


@dataclass(frozen=True)
class Contents:
    """A quantized model as a loader meets it.

    shapes {name: (out, in)} and schemes {name: grid, None where it stays in 16 bit} of its linears; heads, kv_heads,
    positions: of its config, None where it does not say; scattered: groups of scattered columns (desc_act); parts: that
    a GGUF file is split into.
    """

    format: str
    shapes: Mapping[str, tuple[int, int]]
    schemes: Mapping[str, Grid | None]
    activations: Activations | None = None
    kv_cache: str | None = None
    scattered: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    parts: int = 1

    def in_format(self, format: str) -> "Contents":
        """The same numbers in another format."""
        return replace(self, format=format)

    @property
    def grids(self) -> list[Grid]:
        """The grids that occur, in a fixed order."""
        return sorted({grid for grid in self.schemes.values() if grid is not None}, key=str)

    def of_config(self, *names: str) -> int | None:
        """The first of these keys that config.json has."""
        found = next((self.config[n] for n in names if self.config.get(n) is not None), None)
        if found is None:
            return None
        return int(max(found)) if isinstance(found, list) else int(found)  # GGUF may say it for each layer

    @property
    def heads(self) -> int | None:
        return self.of_config("num_attention_heads", "n_head")

    @property
    def kv_heads(self) -> int | None:
        return self.of_config("num_key_value_heads") or self.heads

    @property
    def positions(self) -> int | None:
        """Tokens the model was made for; None where rotary scaling lets a server go beyond."""
        scaled = self.config.get("rope_scaling") or (self.config.get("rope_parameters") or {}).get("factor")
        return None if scaled else self.named_positions

    @property
    def named_positions(self) -> int | None:
        """Positions that the config names, which rotary scaling does not lower."""
        return self.of_config("max_position_embeddings", "n_positions")


def of_job(job: Job, format: str) -> Contents:
    """What a run will write in `format`."""
    return Contents(
        format,
        {x.name: (x.out_features, x.in_features) for x in job.linears},
        job.schemes,
        job.recipe.activations,
        job.recipe.kv_cache,
        job.recipe.shuffled,
        job.checkpoint.config,
    )


def of_artifact(artifact: Artifact) -> Contents:
    """What an artifact folder holds; its 16-bit linears are the matrices in blocks that are not quantized."""
    format = "gguf" if artifact.is_gguf else artifact.format
    if format is None:
        raise BadInput(f"{artifact.checkpoint.folder} is not quantized: there is no contract to check")
    read = artifact.checkpoint
    dense = [n.removesuffix(".weight") for n in read.names() if n.endswith(".weight") and len(read.shape(n)) == 2]
    dense = [n for n in dense if n not in artifact.linears and any(part.isdigit() for part in n.split("."))]
    dense = [n for n in dense if not n.endswith((".gate", ".router"))]  # routers are no linears to quantize
    shapes = dict(artifact.shapes) | {n: (read.shape(f"{n}.weight")[0], read.shape(f"{n}.weight")[1]) for n in dense}
    return Contents(
        "gptq" if format.startswith("gptq") else format,
        shapes,
        dict(artifact.linears) | dict.fromkeys(dense),
        artifact.activations,
        artifact.kv_cache,
        artifact.scattered,
        artifact.config,
    )


def of_folder(folder: Path) -> Contents:
    """What an artifact folder holds, in whatever format. Raises BadInput for a GGUF file that is not whole."""
    files = gguf_files(folder)
    if not files:
        return of_artifact(Artifact(folder))
    for part in files[1:]:  # they say nothing of the model, and have to be whole all the same
        open_gguf(part)
    return replace(of_gguf(files[0]), parts=len(files))


def of_gguf(file: Path) -> Contents:
    """A GGUF file, or the first part of one, by its metadata under the names that config.json has for it."""
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
    return Contents("gguf", {}, {}, config=found)


def problems(target: Target, contents: Contents) -> list[str]:
    """One line for each thing that keeps `target` from loading the files; none when it will."""
    label = READERS[target.reader].label
    grids = [("weights", grid) for grid in contents.grids]
    refused = refusal(target.reader, contents.format, grids, contents.activations, scattered=contents.scattered)
    found = [] if refused is None else [refused]
    found += (f"{label} {line}" for line in _fused(contents))
    if target.reader == "ollama" and contents.parts > 1:  # ollama/ollama issue 5245
        found.append(f"{label} imports one GGUF file, and this one is split into {contents.parts}: write it whole")
    if target.reader == "sglang":
        found += _sglang(contents)
        found += _marlin(contents, target.tensor_parallel)  # type: ignore[union-attr]
    if target.reader == "tgi":
        found += _tgi(contents)
    if target.reader in ("vllm", "vllm-cpu"):
        found += (f"{label} {line}" for line in _mixed_experts(contents))
    if target.reader == "vllm-cpu":
        found += _cpu_kernel(contents)
    found += (f"{label} {line}" for line in _parallel(contents, getattr(target, "tensor_parallel", 1)))
    longest, asked = contents.positions, target.max_model_len
    if longest is not None and asked is not None and asked > longest:
        found.append(f"{label} is asked for max_model_len {asked}, and the model has {longest} positions: lower it")
    return found


def check_job(job: Job) -> dict[str, str]:
    """The format each target of the recipe will load, of those that the run writes.

    Raises BadInput when a target could load none of them.
    """
    taken: dict[str, str] = {}
    for target in job.recipe.targets:
        refused = {format: problems(target, of_job(job, format)) for format in job.recipe.formats}
        found = next((format for format, lines in refused.items() if not lines), None)
        if found is None:
            raise BadInput(f"targets: {sentence(next(iter(refused.values())))}")
        taken[target.name] = found
    return taken


def advice(job: Job) -> list[str]:
    """What is worth knowing and refuses nothing: for a recipe without targets, what vLLM would say, on GPUs and on a
    CPU; what loads on some GPUs only; how far the model can be split; what transformers makes of experts."""
    found: list[str] = []
    for format in job.recipe.formats:
        contents = of_job(job, format)
        if format not in READERS["vllm"].formats:
            continue
        for target in () if job.recipe.targets else (Vllm(), Vllm(device="cpu")):
            found += problems(target, contents)
        found += reader_notes("vllm", format, contents.grids, contents.activations)
        found += experts(contents)
        most = max(n for n in (1, 2, 4, 8) if not list(_parallel(contents, n)))
        if most < 8:
            found.append(f"tensor parallelism up to {most}: a model {next(_parallel(contents, 2 * most))}")
    return list(dict.fromkeys(found))


def sentence(found: Sequence[str]) -> str:
    """Problems on one line."""
    more = len(found) - 1
    return found[0] + (f" (and {more} more: {'; '.join(found[1:])})" if more else "")


def _fused(contents: Contents) -> Iterator[str]:
    if contents.format == "gguf":
        return  # its readers keep each tensor's type
    for fused in _FUSED:
        for name in contents.shapes:
            if not name.endswith(f".{fused[0]}"):
                continue
            parts = [name.removesuffix(fused[0]) + part for part in fused]
            if len({contents.schemes[part] for part in parts if part in contents.schemes}) > 1:
                yield f"fuses {', '.join(parts)} and needs one scheme for all of them"


def _mixed_experts(contents: Contents) -> Iterator[str]:
    """compressed_tensors_moe.py, get_moe_method: one scheme for the gate_proj, up_proj and down_proj of a block's
    experts, read off the first of them for all. Blocks may differ."""
    blocks: dict[str, dict[Grid | None, str]] = {}
    for name, grid in contents.schemes.items():
        block, inside, _ = name.partition(".experts.")
        if inside:
            blocks.setdefault(block, {}).setdefault(grid, name)
    for kinds in blocks.values():
        if len(kinds) > 1:
            parts = (f"{name} in {'16 bit' if grid is None else grid}" for grid, name in kinds.items())
            yield f"needs one scheme for all experts of a block, and has {', '.join(parts)}: override them alike"
            return


def _sglang(contents: Contents) -> Iterator[str]:
    """srt/layers/quantization and srt/models of the PyPI package sglang 0.5.23. Layers are looked up by the name of the
    fused one (qkv_proj), and only Gemma's classes say what it is made of (packed_modules_mapping), for one format."""
    if contents.activations is not None and not contents.activations.symmetric:
        yield "SGLang rounds int8 inputs symmetrically whatever the files say: set activations.symmetric: true"
    if contents.activations is not None and contents.activations.type == "int8" and _experts(contents):
        yield "SGLang has no GPU kernel for experts with int8 inputs: set activations: null"
    parts = tuple(f".{part}" for fused in _FUSED for part in fused)
    fused = [name for name in contents.shapes if name.endswith(parts) and ".experts." not in name]
    named = contents.format == "compressed-tensors" and str(contents.config.get("model_type", "")).startswith("gemma")
    if not fused or named or contents.format not in ("compressed-tensors", "awq"):
        return
    dense = next((name for name in fused if contents.schemes.get(name) is None), None)
    if dense is not None:
        yield (
            f"SGLang fuses {dense} and does not find it by name among what {contents.format} files leave in 16 bit: "
            "set formats: [gptq], or quantize it"
        )
    if len(contents.grids) > 1:
        kinds = ", ".join(map(str, contents.grids))
        yield f"SGLang finds no scheme for fused layers in {contents.format} files of {kinds}: drop `overrides`"


def _experts(contents: Contents) -> bool:
    return any(".experts." in name for name in contents.shapes)


def _marlin(contents: Contents, gpus: int) -> Iterator[str]:
    """SGLang's kernel for weights with 16-bit inputs: kernels/jit/csrc/gemm/marlin/gptq_marlin.cuh, is_valid_config.
    AWQ files have another kernel for what it does not take; nvfp4 weights are padded."""
    if contents.activations is not None or contents.format not in ("compressed-tensors", "gptq"):
        return
    narrow = min(gpus, contents.kv_heads or gpus)  # GPUs beyond the key-value heads hold copies of them
    for name, (n_out, n_in) in contents.shapes.items():
        grid = contents.schemes.get(name)
        block, _, part = name.rpartition(".")
        fused = next((f for f in _FUSED if part in f), (part,))
        if grid is None or grid.type not in ("int", "fp8") or part != fused[0] or ".experts." in name:
            continue
        names = [f"{block}.{p}" for p in fused if f"{block}.{p}" in contents.shapes]
        rows, columns = n_out, n_in // gpus
        if not name.endswith(tuple(f".{row}" for row in _ROW_PARALLEL)):
            shares = (contents.shapes[n][0] // (narrow if n.endswith((".k_proj", ".v_proj")) else gpus) for n in names)
            rows, columns = sum(shares), n_in
        if (rows % 128 or columns % 64) and (rows % 64 or columns % 128):
            yield (
                f"SGLang's kernel for 16-bit inputs takes multiples of 128 x 64 or of 64 x 128, and {', '.join(names)} "
                f"{'are together' if names[1:] else 'is'} {rows} x {columns} on a GPU: "
                + (
                    "set formats: [awq]"
                    if (grid.type, grid.bits) == ("int", 4)
                    else "round the inputs (activations) too"
                )
            )
            return


def _tgi(contents: Contents) -> Iterator[str]:
    """server/text_generation_server: GPTQMarlinWeightsLoader knows no layer left out; CompressedTensorsLoader looks at
    the one `format` of the whole config."""
    dense = next((name for name, grid in contents.schemes.items() if grid is None), None)
    if contents.format in ("gptq", "awq") and dense is not None:
        yield f"TGI wants every linear of {contents.format} files quantized, and {dense} is not: use compressed-tensors"
    if contents.format == "gptq" and len(contents.grids) > 1:
        kinds = ", ".join(map(str, contents.grids))
        yield f"TGI reads one kind of weight in gptq files, and these have {kinds}: drop `overrides`"


def _cpu_kernel(contents: Contents) -> Iterator[str]:
    """vLLM's CPUWNA16LinearKernel.can_implement: both sides of a 4-bit weight are multiples of 32."""
    if contents.activations is not None:
        return
    for name, (n_out, n_in) in contents.shapes.items():
        grid = contents.schemes.get(name)
        if grid is not None and grid.type == "int" and grid.bits == 4 and (n_out % 32 or n_in % 32):
            yield f"vLLM on a CPU wants both sides of {name} to be multiples of 32, and it is {n_out} x {n_in}"
            return


def _parallel(contents: Contents, n: int) -> Iterator[str]:
    """What `n` GPUs cannot share: heads (vLLM: ModelConfig.verify_with_parallel_config, LlamaAttention), scale groups
    (distributed/utils.py: verify_group_size_divides_partition), blocks (fp8_utils.py: validate_fp8_block_shape)."""
    if n == 1:
        return
    heads, kv_heads = contents.heads, contents.kv_heads
    if heads is not None and heads % n:
        yield f"split over {n} GPUs would cut {heads} attention heads unevenly: set tensor_parallel to a divisor"
    elif kv_heads is not None and kv_heads % n and n % kv_heads:
        yield f"split over {n} GPUs would cut {kv_heads} key-value heads unevenly: take a divisor or a multiple of them"
    for name, (n_out, n_in) in contents.shapes.items():
        grid = contents.schemes.get(name)
        if grid is None:
            continue
        if name.endswith(tuple(f".{part}" for part in _ROW_PARALLEL)):
            side, unit, what = n_in, 1 if grid.group_size in (-1, 0) else grid.columns(n_in), "scale group"
        else:  # codes of neighbouring rows share a word in these formats
            side, unit, what = n_out, 32 // grid.bits if contents.format in ("gptq", "awq") else 1, "packed word"
        if grid.type == "fp8-block":
            unit, what = _BLOCK, "block"
        if side % (n * unit):
            yield (
                f"split over {n} GPUs would cut a {what} of {unit} in {name} ({n_out} x {n_in}): lower tensor_parallel"
                + (" or weights.group_size" if what == "scale group" else "")
            )
            return


def experts(contents: Contents) -> Iterator[str]:
    """What transformers 5.17 makes of experts, which it merges into one tensor as it loads."""
    if contents.format != "compressed-tensors":
        return
    grids = {grid for name, grid in contents.schemes.items() if grid is not None and ".experts." in name}
    inputs = contents.activations
    for grid in sorted(grids, key=str):
        if grid.type == "nvfp4":
            yield "transformers drops the global scales of nvfp4 experts and answers wrongly: serve with vLLM"
        elif grid.type in ("mxfp8", "fp8-block") or (inputs is not None and inputs.type == "int8"):
            yield f"transformers does not load experts of {grid} weights in this layout: serve with vLLM"
        elif inputs is not None:
            yield f"transformers leaves the inputs of experts in 16 bit; {inputs} is for vLLM"
