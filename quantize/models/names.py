"""Which tensors of a checkpoint make up each parameter and saved buffer of a transformers model, and back.

transformers knows: `conversion_mapping` lists, for each model class, the tensors that are named otherwise on disk than
in the model, stacked, joined, split or transposed. The same rules are applied here, to names alone.
"""

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass(frozen=True)
class Origin:
    """What a parameter is made of on disk. tensors: (on-disk name, the converter's pattern that it matched).

    converter: how they become the parameter; None where the one tensor is only named otherwise. first: the parameter
    that transformers files them under, another one where a converter makes several.
    """

    tensors: tuple[tuple[str, str], ...]
    converter: WeightConverter | None
    first: str

    @property
    def on_disk(self) -> list[str]:
        return [name for name, _ in self.tensors]

    @property
    def is_joined(self) -> bool:
        """Whether it is its tensors one beside the other."""
        if self.converter is None or len(self.tensors) != len(self.converter.source_patterns):
            return False
        return all(isinstance(operation, Concatenate) for operation in self.converter.operations)

    def stacked(self, source: int, expert: int) -> str | None:
        """The tensor of `expert` among those of the converter's pattern `source`.

        None unless they are one tensor for each expert, which the converter stacks.
        """
        own = self._stacks[source] if source < len(self._stacks) else []
        return own[expert] if expert < len(own) else None

    @cached_property
    def _stacks(self) -> list[list[str]]:
        """The tensors that the converter stacks, for each of its patterns; empty where it does something else."""
        if self.converter is None or not isinstance(self.converter.operations[0], MergeModulelist):
            return []
        return [[name for name, own in self.tensors if own == pattern] for pattern in self.converter.source_patterns]


class _Shapes:
    """Stands in for the model where a conversion asks it for the shape of a parameter."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state

    def get_parameter(self, name: str) -> Tensor:
        return self._state[name]


class TensorNames:
    """The origins of a model's parameters and saved buffers, for a checkpoint with the tensors `on_disk`.

    model: of transformers, its weights on the meta device; it may be changed afterwards. origins: by name in the model,
    for all that the checkpoint has. unused: the tensors that belong to none.
    """

    def __init__(self, model: Any, on_disk: Iterable[str]) -> None:
        self._state: dict[str, Tensor] = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        self._config = model.config
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._by_pattern = {p: converter for converter in self._converters for p in converter.source_patterns}
        back = [t.reverse_transform() for t in get_model_conversion_mapping(model, add_legacy=False)[::-1]]
        self._back = [t for t in back if isinstance(t, WeightRenaming) and not isinstance(t, PrefixChange)]
        self._prefix = model.base_model_prefix
        self.origins: dict[str, Origin] = {}
        self.unused: list[str] = []
        self._find(on_disk)

    def _find(self, on_disk: Iterable[str]) -> None:
        found: dict[str, list[tuple[str, str]]] = {}
        converters: dict[str, WeightConverter | None] = {}
        for name in sorted(on_disk, key=dot_natural_key):
            ours, pattern = self._renamed(name)
            if ours in self._state:
                converters.setdefault(ours, None if pattern is None else self._by_pattern[pattern])
                found.setdefault(ours, []).append((name, pattern or name))
            else:
                self.unused.append(name)
        for first, tensors in found.items():
            converter = converters[first]
            for name in self._targets(first, converter):
                self.origins[name] = Origin(tuple(tensors), converter, first)

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The parameter that a tensor on disk goes into, and the pattern of the converter that takes it there."""
        ours, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if ours not in self._state and name in self._state:
            return name, None
        return ours, pattern

    def _targets(self, first: str, converter: WeightConverter | None) -> list[str]:
        if converter is None or len(converter.target_patterns) == 1:
            return [first]
        one, *others = converter.target_patterns
        return [first, *(name for other in others if (name := first.replace(one, other)) in self._state)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter or saved buffer of the model."""
        return tuple(self._state[name].shape)

    def __contains__(self, name: object) -> bool:
        """Whether the model has a parameter or saved buffer of this name."""
        return name in self._state

    def made(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter `name` from its tensors on disk, which `read` returns; on the meta device too."""
        origin = self.origins[name]
        if origin.converter is None:
            return read(origin.tensors[0][0])
        converter = deepcopy(origin.converter)
        for tensor, pattern in origin.tensors:
            converter.add_tensor(origin.first, tensor, pattern, lambda tensor=tensor: read(tensor))
        made: dict[str, Any] = converter.convert(origin.first, model=_Shapes(self._state), config=self._config)
        value: Tensor = made[name][0] if isinstance(made[name], list) else made[name]
        return value

    def transposes(self, name: str, stored: tuple[int, ...]) -> bool | None:
        """Whether a parameter [n, a, b] is stored as [n, b, a], where `stored` is its tensor's shape.

        None where it is made in another way than from one tensor, as it is or transposed.
        """
        origin = self.origins[name]
        if len(origin.tensors) != 1:
            return None
        if origin.converter is None:
            return False
        if not all(isinstance(op, Transpose) for op in origin.converter.operations):
            return None
        shape = torch.empty(stored, device="meta")
        made = self.made(name, lambda _: shape)
        flips = sum(not op.check_dims or stored != self.shape(name) for op in origin.converter.operations)
        return flips % 2 == 1 and made.dim() == 3

    def expert_names(self, fused: str) -> tuple[str, ...]:
        """What the layers that fused experts `fused` hold are called in files with a tensor for each expert.

        Empty where transformers knows no such files. Gate comes before up.
        """
        for converter in self._converters:
            ops, targets = converter.operations, converter.target_patterns
            stacks = isinstance(ops[0], MergeModulelist) and all(isinstance(op, Concatenate) for op in ops[1:])
            if stacks and len(targets) == 1 and fused.endswith(targets[0].lstrip(".")):
                return tuple(pattern.removesuffix("$").split(".")[-2] for pattern in converter.source_patterns)
        return ()

    def converters(self, written: Iterable[str]) -> dict[str, WeightConverter]:
        """What joins or splits tensors as transformers loads them: those of the file, and `written` in their place."""
        found = {n: origin.converter for origin in self.origins.values() for n in origin.on_disk if origin.converter}
        alike = {re.sub(r"\d+", "*", name): name for name in written if name not in found}  # of like ones, one
        for name in alike.values():
            if (pattern := self._renamed(name)[1]) is not None:
                found[name] = self._by_pattern[pattern]
        return found

    def saved(self, name: str) -> str:
        """The name on disk of a parameter that the checkpoint lacks, as transformers would write it."""
        return str(rename_source_key(name, self._back, [], reverse=True)[0])

    def likely(self, name: str) -> list[str]:
        """The names that a parameter may have on disk, of a model that is not stacked as transformers stacks it."""
        short = re.sub(f"^{re.escape(self._prefix)}\\.", "", name)
        return list(dict.fromkeys([name, self.saved(name), short, self.saved(short)]))


def saved_tensors(model: Any) -> dict[str, Tensor]:
    """What transformers writes for a model, by on-disk name, on the meta device; of tied parameters the first."""
    state = {name: t.to("meta") for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return dict(revert_weight_conversion(model, state))


def saved_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that transformers writes for a model, which may be on the meta device."""
    return {name: tuple(t.shape) for name, t in revert_weight_conversion(model, model.state_dict()).items()}
