"""A model of a family that transformers does not have: its linears are found by the names and shapes on disk.

Such a model cannot be run here. Its weights can be rounded without running it, one after another.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..core.errors import BadInput
from .architecture import stated_dtype, unknown_family, with_text_settings
from .family import Family
from .model_tensors import ModelTensors
from .placed_model import LinearLayer
from .skeleton import Skeleton
from .towers import linears_on_disk

_NUMBERED = re.compile(r"^(.+?)\.(\d+)\.(.+)\.weight$")  # the list, the place in it, the layer
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SMALL = 32  # rows or columns; servers quantize no smaller matrix
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe)$|position|token_type", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|\.)ln(_|$)|conv", re.IGNORECASE)
_EXPERTS = re.compile(r"^(.+?)\.\w*experts?\w*\.((\d+)\.)?")
_ROUTERS = ("gate", "router", "wg", "shared_expert_gate")
# Layers of one parent that servers join; they share the scale of which a format has one a layer.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


class _AsOnDisk(ModelTensors):
    """The tensors of a reader, none of them made of others."""

    def __init__(self, reader: Any) -> None:
        self._reader, self.config, self._made, self._parts, self._last = reader, reader.config, {}, {}, None


class ByName(Skeleton):
    """The linears in the decoder blocks of a checkpoint, by name and shape; everything else is left as it is.

    The decoder blocks are the numbered list with the most weights. Of them every matrix `….weight` of 32 rows and
    columns or more is a linear, [out, in], but for embeddings, norms, convolutions and routers. chosen: whether a
    matrix of any numbered list is a linear all the same, by its name without `.weight`.

    Raises BadInput for a checkpoint without such linears, and for a matrix of codes.
    """

    def __init__(
        self,
        reader: Any,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        chosen: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.reader, self.device = _AsOnDisk(reader), device
        self._shapes: dict[str, tuple[int, ...]] = {name: tuple(reader.shape(name)) for name in reader.names()}
        self._check_no_codes()
        self.blocks_name = _largest_list(self._shapes)
        self._experts_beside = _experts(self._shapes)
        self._why = {name: self._reason(name, shape) for name, shape in self._shapes.items()}
        for name, why in self._why.items():
            if why and _NUMBERED.match(name) and len(self._shapes[name]) == 2 and chosen(name.removesuffix(".weight")):
                self._why[name] = None
        self._place([name for name, why in self._why.items() if why is None])
        types = [reader.dtype(name) for names in self._inside for name in names.values()]
        stated = str(stated_dtype(reader.config) or "").removeprefix("torch.")
        self.dtype = dtype or getattr(torch, stated, None) or Counter(types).most_common(1)[0][0]
        self.served_dtype = self.dtype
        self.config, self.family = _described(reader.config, self._shapes), Family()
        self.model = _tree(self._shapes, reader)
        self.experts_per_token = None
        self.fused_experts, self.padded_experts = set(), False
        self._computed, self._wide = [{} for _ in self._inside], []
        self._disk, self._shared = {name: name for name in self._shapes}, set()

    def _check_no_codes(self) -> None:
        for name, shape in self._shapes.items():
            if name.endswith(".weight") and len(shape) > 1 and (kind := self.reader.dtype(name)) not in _FLOATS:
                raise BadInput(
                    f"{name} is {str(kind).removeprefix('torch.')} on disk: codes without anything that says what they "
                    "stand for; give the original checkpoint"
                )

    def _reason(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Why a tensor is left as it is; None for a linear, "" for one of which nobody would expect it to be."""
        path, _, last = name.rpartition(".")
        if len(shape) < 2:
            return ""
        if len(shape) > 2:
            return "a convolution" if "conv" in name else "stacked, and which axis is which is not known"
        found = _NUMBERED.match(name)
        if last != "weight":
            return "no layer's weight by its name"
        if _EMBEDDING.search(path):
            return "an embedding"
        if found is None:
            return "outside the blocks: a head, or what joins parts"
        if found[1] != self.blocks_name:
            return f"not in the decoder's blocks, {self.blocks_name}.*"
        if _NORM.search(path):
            return "a norm or a convolution"
        if self._is_router(path, shape[0]):
            return "it chooses or weighs experts"
        return f"fewer than {_SMALL} rows or columns" if min(shape) < _SMALL else None

    def _is_router(self, path: str, rows: int) -> bool:
        """Whether a matrix beside experts has their number of rows or a single one, or is called as routers are."""
        beside = (n for parent, n in self._experts_beside.items() if path.startswith(f"{parent}."))
        inside = _EXPERTS.match(f"{path}.") is not None
        return any(not inside and (rows in (1, n) or path.rpartition(".")[2] in _ROUTERS) for n in beside)

    def _place(self, taken: list[str]) -> None:
        """Group the linears by the list that they are in and the place in it, the decoder's first."""
        if not taken:
            raise BadInput(
                "no matrix is in a numbered list of blocks, as which the layers of a family unknown to transformers "
                f"are found ({next(iter(self._shapes), 'no tensors')})"
            )
        groups: dict[tuple[bool, str, int], dict[str, str]] = {}
        for name in taken:
            found = _NUMBERED.match(name)
            assert found is not None
            groups.setdefault((found[1] != self.blocks_name, found[1], int(found[2])), {})[found[3]] = name
        self._inside = [{f"{path}.weight": name for path, name in groups[key].items()} for key in sorted(groups)]
        self._linears = []
        self._blocks = nn.ModuleList()
        for k, names in enumerate(self._inside):
            block = nn.Module()
            for inside, name in names.items():
                (out, width), path = self._shapes[name], inside.removesuffix(".weight")
                _put(block, path, nn.Linear(width, out, bias=False, device="meta", dtype=self.reader.dtype(name)))
                self._linears.append(LinearLayer(name.removesuffix(".weight"), path, k, out, width, False))
            self._blocks.append(block)

    def about(self) -> list[str]:
        """What is taken for a linear, and what is not and why, like tensors together."""
        kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", x.module) for x in self._linears)
        lines = [
            f"{unknown_family(self.reader.config)}: its layers are found by name and shape; that a server has this "
            "family, and these layers as linears, is for you to know",
            f"{len(self._linears)} matrices in {self.n_blocks} blocks {self.blocks_name}.* are taken for linears: "
            + ", ".join(kinds),
        ]
        groups: dict[tuple[str, str], list[int]] = {}
        for name, why in self._why.items():
            if why:
                groups.setdefault((re.sub(r"\d+", "*", name), why), []).append(math.prod(self._shapes[name]))
        lines += (
            f"{pattern} stays as it is ({len(sizes)} tensors, {sum(sizes)} weights): {why}"
            for (pattern, why), sizes in groups.items()
        )
        if self._experts_beside and any("stacked" in (why or "") for why in self._why.values()):
            lines.append("experts stacked in one tensor are among what stays as it is")
        lines.append(
            "`ignore` leaves further layers out; `overrides` that match a matrix in a numbered list take it in"
        )
        return lines

    def together(self, names: Collection[str]) -> list[tuple[str, ...]]:
        """These linears, by on-disk name, those together that servers join and so give one scale."""
        found = []
        for kind in _TOGETHER:
            for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
                joined = tuple(one for own in kind if (one := f"{parent}.{own}") in names)
                found += [joined] if len(joined) > 1 else []
        joined_already = {name for group in found for name in group}
        return [*found, *((name,) for name in names if name not in joined_already)]

    def written_with(self, k: int) -> dict[str, str]:
        return self._inside[k]

    def shell_names(self) -> dict[str, str]:
        inside = self.on_disk_of_blocks()
        return {name: name for name in self._shapes if name not in inside}

    def parameters_on_disk(self) -> list[str]:
        return list(self._shapes)

    def on_disk_of_blocks(self) -> set[str]:
        return {name for names in self._inside for name in names.values()}

    def integers(self) -> set[str]:
        return set()

    def left_out(self) -> list[tuple[str, int, str]]:
        """Of the decoder's blocks."""
        inside = f"{self.blocks_name}."
        return [(n, math.prod(self._shapes[n]), why) for n, why in self._why.items() if why and n.startswith(inside)]

    @property
    def unused(self) -> list[str]:
        return []

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    def head_names(self) -> list[str]:
        return []

    def head_modules(self) -> list[str]:
        return []

    def unquantized_modules(self, but: Collection[str] = ()) -> list[str]:
        return linears_on_disk({name: len(self._shapes[name]) for name, why in self._why.items() if why})

    def tower_tensors(self) -> dict[str, int]:
        return {}

    def by_all_names(self, schemes: dict[str, Any]) -> dict[str, Any]:
        return dict(schemes)

    @property
    def tied(self) -> bool:
        return False

    def check_shapes(self, shape: Callable[[str], tuple[int, ...] | None]) -> None:
        """There is no model to compare them with."""

    def open_shell(self) -> None:
        raise BadInput(unknown_family(self.reader.config))


def _largest_list(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The name of the numbered list with the most weights in matrices; "" without any."""
    sizes: Counter[str] = Counter()
    for name, shape in shapes.items():
        if len(shape) == 2 and (found := _NUMBERED.match(name)):
            sizes[found[1]] += math.prod(shape)
    return sizes.most_common(1)[0][0] if sizes else ""


def _experts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The number of experts by the path of the module that they are in; 0 where it is not known."""
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        if match := _EXPERTS.match(name):
            here = int(match[3]) + 1 if match[3] is not None else shape[0] if len(shape) > 2 else 0
            found[match[1]] = max(found.get(match[1], 0), here)
    return found


def _described(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """What a plan asks of a config, from the shapes where it does not say."""
    said = with_text_settings(config)
    embedding = next((shape for name, shape in shapes.items() if len(shape) == 2 and _EMBEDDING.search(name)), (0, 0))
    sizes = {"vocab_size": embedding[0], "hidden_size": embedding[1]}
    sizes |= {key: said[key] for key in sizes if isinstance(said.get(key), int)}
    return SimpleNamespace(model_type=config.get("model_type"), **sizes)


def _tree(shapes: Mapping[str, tuple[int, ...]], reader: Any) -> nn.Module:
    """A module with a parameter or buffer of each name, on the meta device."""
    root = nn.Module()
    for name, shape in shapes.items():
        path, _, own = name.rpartition(".")
        tensor = torch.empty(shape, dtype=reader.dtype(name), device="meta")
        owner = _walk(root, path)
        if tensor.is_floating_point():
            owner.register_parameter(own, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(own, tensor)
    return root


def _walk(root: nn.Module, path: str) -> nn.Module:
    """The module at `path`, made where there is none."""
    for step in filter(None, path.split(".")):
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    return root


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, own = path.rpartition(".")
    _walk(root, parent).add_module(own, module)
