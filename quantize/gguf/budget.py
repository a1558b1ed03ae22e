"""A type for each tensor of a GGUF file within a number of bytes: those that move the model's predictions least."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import BadInput
from ..ggml import BLOCK_BYTES
from ..methods import ROUNDERS
from ..recipe import BlockGrid, GgmlType, Rtn
from .mixes import TensorType

ALIGNMENT = 32  # bytes that the data of each tensor is padded to (general.alignment where a file does not say)
_ROWS = 64  # of a tensor whose error stands for all
_F16: TensorType = "F16"


@dataclass(frozen=True)
class Sensitivity:
    """What errors in a weight [out, in] do to the predictions: a KL divergence of sum rows_r columns_c error_rc^2.

    rows float32 [out], columns float32 [in], in nats a token. It is the second-order term of the divergence with the
    Fisher information of an output and the second moment of an input taken as independent, and no correlations.
    """

    rows: Tensor
    columns: Tensor

    def cost(self, error: Tensor, rows: Tensor) -> float:
        """Of the errors [n, in] of these n rows, if the others are alike."""
        picked = self.rows[rows]
        return float((error.square() @ self.columns) @ picked) * float(self.rows.sum() / picked.sum().clamp(min=1e-30))


def measure(model: nn.Module, tokens: Tensor, seed: int = 0) -> dict[str, list[Sensitivity]]:
    """The sensitivity of every linear and embedding {module name: one for each use}, for tokens [samples, seq_len].

    One forward and one backward pass a sequence through the whole model, which has to fit in memory: with g the
    gradient of the loss of tokens drawn from the model's own predictions, E[g g^T] is the Fisher information, and half
    of it the curvature of the divergence. The second use of tied embeddings stands under the first one's
    name.
    """
    seen = _Observed(model)
    generator = torch.Generator().manual_seed(seed)
    try:
        for row in tokens:
            logits = model(input_ids=row[None], use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
    finally:
        seen.remove()
    return seen.sensitivities(tokens.numel())


class _Observed:
    """Sums over tokens of squared inputs and squared output gradients, by hooks on a model's linears and embeddings."""

    def __init__(self, model: nn.Module) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}
        self._lookups: set[str] = set()
        model.requires_grad_(False)
        first: dict[int, str] = {}
        self._handles = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
                self._names[name] = first.setdefault(id(module.weight), name)
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            x: Tensor = args[0]
            if isinstance(module, nn.Embedding):
                self._lookups.add(name)
                squares = torch.bincount(x.reshape(-1), minlength=module.num_embeddings).float()
                out = out.requires_grad_()
            else:
                squares = x.detach().reshape(-1, x.shape[-1]).float().square().sum(0)
            self._inputs[name] = self._inputs.get(name, 0) + squares
            out.register_hook(lambda g: self._gradient(name, g))  # type: ignore[no-untyped-call]
            return out

        return hook

    def _gradient(self, name: str, g: Tensor) -> None:
        squares = g.reshape(-1, g.shape[-1]).float().square().sum(0)
        self._outputs[name] = self._outputs.get(name, 0) + squares

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def sensitivities(self, tokens: int) -> dict[str, list[Sensitivity]]:
        out: dict[str, list[Sensitivity]] = {}
        for name, squares in self._inputs.items():
            inputs, outputs = squares / tokens, self._outputs[name] / tokens / 2
            pair = (inputs, outputs) if name in self._lookups else (outputs, inputs)
            out.setdefault(self._names[name], []).append(Sensitivity(*pair))
        return out


def costs(weight: Tensor, uses: Sequence[Sensitivity]) -> dict[TensorType, float]:
    """The divergence each type a weight [out, in] can have would bring, from the errors of a few of its rows."""
    rows = torch.arange(0, len(weight), max(1, len(weight) // _ROWS))
    w = weight[rows].float()
    importance = torch.stack([use.columns for use in uses]).sum(0)
    found: dict[TensorType, float] = {}
    for kind in candidates(weight.shape[1]):
        rounded = w.half().float()
        if kind != "F16":
            grid = BlockGrid(type=kind, scale_search="activation")
            rounded = ROUNDERS["rtn"](w, grid, Rtn(), importance, None).linear.dequantize()
        found[kind] = sum(use.cost(rounded - w, rows) for use in uses)
    return found


def candidates(columns: int) -> tuple[TensorType, ...]:
    """The types whose blocks fill rows of `columns`; F16 where none do."""
    fitting = tuple(kind for kind in get_args(GgmlType) if columns % BlockGrid(type=kind).span(columns) == 0)
    return fitting or (_F16,)


def tensor_bytes(shape: tuple[int, ...], kind: TensorType) -> int:
    """Bytes of a tensor in the file, the columns last in `shape`, with the padding behind it."""
    count = 1
    for n in shape:
        count *= n
    size = 2 * count if kind == "F16" else count // BlockGrid(type=kind).span(shape[-1]) * BLOCK_BYTES[kind]
    return -(-size // ALIGNMENT) * ALIGNMENT


def assign(
    shapes: Mapping[str, tuple[int, ...]], costs: Mapping[str, Mapping[TensorType, float]], room: int
) -> dict[str, TensorType]:
    """The type of each tensor that together cost least and fill at most `room` bytes, padding included.

    An integer program: one type a tensor, one limit. Raises BadInput when the smallest types do not fit.
    """
    options = [(name, kind) for name in costs for kind in costs[name]]
    sizes = [tensor_bytes(shapes[name], kind) // ALIGNMENT for name, kind in options]
    smallest = sum(min(tensor_bytes(shapes[name], kind) for kind in costs[name]) for name in costs)
    if smallest > room:
        raise BadInput(
            f"gguf.budget: {room} bytes are left for the tensors and the smallest types take {smallest}; raise it"
        )
    index = {name: i for i, name in enumerate(costs)}
    rows = [index[name] for name, _ in options]
    one = coo_array(([1.0] * len(options), (rows, range(len(options)))), shape=(len(index), len(options)))
    scale = max(sum(min(c.values()) for c in costs.values()), 1e-30)
    found = milp(
        [costs[name][kind] / scale for name, kind in options],
        constraints=[LinearConstraint(one.tocsr(), 1, 1), LinearConstraint([sizes], ub=room // ALIGNMENT)],
        integrality=[1] * len(options),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    assert found.x is not None, found.message
    return {name: kind for (name, kind), x in zip(options, found.x, strict=True) if x > 0.5}
