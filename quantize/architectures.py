"""Rows for model families whose blocks need more than the transformers class says.

A decoder stack whose blocks are one ModuleList of `num_hidden_layers` entries needs no row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """experts: the fused-experts module inside a block, taken apart into linears.

    expert_names: on-disk names of an expert's gate, up and down projections. on_disk: (module name, on-disk name)
    pieces, replaced in that order where the checkpoint names a module otherwise.
    """

    experts: str | None = None
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    on_disk: tuple[tuple[str, str], ...] = ()


ARCHITECTURES: dict[str, Architecture] = {
    "gpt_neox": Architecture(on_disk=(("lm_head.", "embed_out."),)),
    "qwen2_moe": Architecture(experts="mlp.experts"),
    "qwen3_moe": Architecture(experts="mlp.experts"),
    "mixtral": Architecture(
        experts="mlp.experts", expert_names=("w1", "w3", "w2"), on_disk=((".mlp.", ".block_sparse_moe."),)
    ),
}
PLAIN = Architecture()
