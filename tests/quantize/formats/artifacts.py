"""A tiny model with random codes in its linears: the artifact folder, and the plain model it stands for."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from quantpress.core.files import write_json
from quantpress.core.products import fast_16_bit_products
from quantpress.formats import FORMATS, ModelScheme
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.companions import copy_companions
from quantpress.models.config_forms import readable_by_all
from quantpress.models.shards import merge_parts, write_part
from quantpress.numbers.grid import Grid, QuantizedLinear
from quantpress.numbers.types import Activations

from ...tiny import VOCAB, build
from .records import record

Schemes = dict[str, Grid | None]


def uniform(grid: Grid, *, dense: tuple[str, ...] = ()) -> Schemes:
    """`grid` for every linear of the two blocks, none for those that end in one of `dense`."""
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    names = [f"model.layers.{k}.{part}" for k in range(2) for part in parts]
    return {name: None if name.endswith(dense or ("-",)) else grid for name in names}


def linears(family: str, folder: Path) -> list[str]:
    """The linears in the blocks of a family, by their names on disk; routers are none."""
    build(family, folder)
    checkpoint = Checkpoint(folder)
    names = [n.removesuffix(".weight") for n in checkpoint.names() if len(checkpoint.shape(n)) == 2 and ".layers." in n]
    return [name for name in names if not name.endswith(".gate")]


def make(
    folder: Path,
    format: str,
    schemes: Schemes,
    *,
    shuffled: bool = False,
    family: str = "llama",
    spec: Activations | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, QuantizedLinear], Any]:
    """Write the artifact; returns its records and the plain model with the dequantized weights."""
    plain = folder.with_name(folder.name + "-plain")
    build(family, plain, dtype=dtype)
    original = Checkpoint(plain)
    tensors, records, weights = {}, {}, {}
    for name in original.names():
        linear = name.removesuffix(".weight")
        grid = schemes.get(linear)
        if grid is None:
            tensors[name] = weights[name] = original.read(name)
            continue
        n_out, n_in = original.shape(name)
        q = record(grid, n_out, n_in, dtype=dtype, shuffled=shuffled, seed=len(records), spec=spec)
        records[linear] = q
        tensors |= FORMATS[format].pack(linear, q)
        weights[name] = q.dequantize(dtype)
    folder.mkdir()
    write_part(folder / "part", tensors)
    merge_parts([folder / "part"], folder, 20_000)
    (folder / "part").unlink()
    head = "embed_out" if family == "gpt_neox" else "lm_head"
    quantization = FORMATS[format].config(ModelScheme(schemes, outside=[head], shuffled=shuffled, activations=spec))
    write_json(folder / "config.json", readable_by_all(original.config) | {"quantization_config": quantization})
    for file, content in FORMATS[format].extra_files(quantization).items():
        write_json(folder / file, content)
    copy_companions(plain, folder)
    write_part(plain / "model.safetensors", weights)
    return records, load(plain)


def logits(model: Any) -> torch.Tensor:
    """[2, 16, VOCAB] in float32, by transformers with the products of 16-bit floats that our forward has here."""
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), fast_16_bit_products():
        out: torch.Tensor = model(tokens).logits
    return out.float()


def load(folder: Path) -> Any:
    """The folder as transformers reads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def quantization_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config
