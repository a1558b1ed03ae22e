"""A quantized model as a server's loader sees it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quantpress.numbers.types import Activations, Grid

# Linears that servers fuse into one matrix product. vLLM: packed_modules_mapping of its models.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_COUNTED_IN = ("llama3", "longrope", "su")  # rotary scaling that max_position_embeddings includes
# Linears whose input is split over GPUs (row-parallel); all others split their output.
_ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "w2")


def row_parallel(linear: str) -> bool:
    """Whether tensor parallelism splits the input of this linear, rather than its output."""
    return linear.endswith(tuple(f".{part}" for part in _ROW_PARALLEL))


def is_expert(linear: str) -> bool:
    """Whether the linear belongs to an expert of a mixture."""
    return ".experts." in linear


@dataclass(frozen=True)
class Misfit:
    """Linears as a server fuses them, whose share on one GPU is `rows` outputs and `columns` inputs."""

    names: list[str]
    grid: Grid
    rows: int
    columns: int

    @property
    def said(self) -> str:
        together = "are together" if self.names[1:] else "is"
        return f"{', '.join(self.names)} {together} {self.rows} x {self.columns} on a GPU"


def marlin_misfits(model: "ServedModel", gpus: int, types: tuple[str, ...]) -> Iterator[Misfit]:
    """What Marlin's kernel for weights of `types` with 16-bit inputs has no threads for: it takes outputs x inputs in
    multiples of 128 x 64 or of 64 x 128."""
    narrow = min(gpus, model.kv_heads or gpus)  # GPUs beyond the key-value heads hold copies of them
    for name, (n_out, n_in) in model.shapes.items():
        grid = model.schemes.get(name)
        block, _, part = name.rpartition(".")
        fused = next((f for f in FUSED if part in f), (part,))
        if grid is None or grid.type not in types or part != fused[0] or is_expert(name):
            continue
        names = [f"{block}.{p}" for p in fused if f"{block}.{p}" in model.shapes]
        rows, columns = n_out, n_in // gpus
        if not row_parallel(name):
            shares = (model.shapes[n][0] // (narrow if n.endswith((".k_proj", ".v_proj")) else gpus) for n in names)
            rows, columns = sum(shares), n_in
        if (rows % 128 or columns % 64) and (rows % 64 or columns % 128):
            yield Misfit(names, grid, rows, columns)


@dataclass(frozen=True)
class ServedModel:
    """What a loader finds in a model folder, or will find in the one that a run is about to write.

    shapes {name: (out, in)} and schemes {name: grid; None where it stays in 16 bit}: of the linears in blocks;
    scattered: groups are scattered columns (desc_act); config: config.json, or GGUF metadata under its keys; parts:
    files that a GGUF model is split into.
    """

    format: str
    shapes: Mapping[str, tuple[int, int]]
    schemes: Mapping[str, Grid | None]
    activations: Activations | None = None
    kv_cache: str | None = None
    scattered: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    parts: int = 1

    def in_format(self, format: str) -> "ServedModel":
        """The same model converted to another format."""
        return replace(self, format=format)

    @property
    def grids(self) -> list[Grid]:
        """The distinct grids of the linears, in a fixed order."""
        return sorted({grid for grid in self.schemes.values() if grid is not None}, key=str)

    @property
    def has_experts(self) -> bool:
        return any(is_expert(name) for name in self.shapes)

    def of_config(self, *keys: str) -> int | None:
        """The value of the first of these keys that the config has; None without any."""
        found = next((self.config[k] for k in keys if self.config.get(k) is not None), None)
        if found is None:
            return None
        return int(max(found)) if isinstance(found, list) else int(found)  # GGUF may give one value a layer

    @property
    def heads(self) -> int | None:
        return self.of_config("num_attention_heads", "n_head")

    @property
    def kv_heads(self) -> int | None:
        return self.of_config("num_key_value_heads") or self.heads

    @property
    def head_size(self) -> int:
        """Numbers of a head; 0 where the config does not tell."""
        return self.of_config("head_dim") or (self.of_config("hidden_size", "n_embd") or 0) // (self.heads or 1)

    @property
    def positions(self) -> int | None:
        """Tokens that a server lets the model have: those of the config, or as many more as rotary scaling says. Those
        of `_COUNTED_IN` are in the config's already (vLLM's config/model.py, _get_and_verify_max_len); None where the
        config says neither."""
        stated = self.named_positions
        rope = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        kind = rope.get("rope_type") or rope.get("type")
        if stated is None or kind in _COUNTED_IN or str(self.config.get("model_type")).startswith("gemma3"):
            return stated
        made_for = (rope.get("original_max_position_embeddings") if kind == "yarn" else None) or stated
        return max(stated, int(made_for * (rope.get("factor") or 1)))

    @property
    def named_positions(self) -> int | None:
        """Positions that the config states, whether or not rotary scaling extends them."""
        return self.of_config("max_position_embeddings", "n_positions")
