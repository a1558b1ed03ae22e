"""Who loads a Hugging Face folder of such weights: transformers, servers alone, or nobody."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..core.errors import BadInput
from ..core.schema import matches
from ..formats.layouts import WORDS, layout_of, packs
from ..models.by_name import ByName
from ..models.experts import UNREAD
from ..models.loading import keeps_modules, loads_single_experts, reached, why_no_packed_linears
from ..models.placed_model import LinearLayer
from ..numbers.types import Grid
from .accounting import quantized_share
from .backend import Setup
from .outer import Outer


@dataclass(frozen=True)
class Readers:
    """What reads the files of a run. schemes: of its linears, by on-disk name. outer: what is quantized beside them."""

    setup: Setup
    schemes: Mapping[str, Grid | None]
    outer: Outer

    def check(self) -> None:
        """Raise BadInput for an artifact that nothing the recipe names can load."""
        skeleton = self.setup.skeleton
        if (unread := skeleton.fused_experts & UNREAD) and self._single_experts:
            others = {x.name for x in self._quantized if x.experts is None}
            share = quantized_share(skeleton, self.setup.linears, others)
            patterns = ", ".join(f'"*.{name}.*"' for name in sorted(skeleton.experts_names))
            raise BadInput(
                f"{self._kind}: nothing loads the experts of {min(unread)} quantized, neither transformers nor a "
                "server; write a GGUF file if llama.cpp has the family, or leave them in 16 bit, and quantize "
                f"{share:.0%} of the blocks' weights: `ignore: [{patterns}]`"
            )
        if self.setup.recipe.targets or (why := self._why_not_transformers) is None:
            return
        instead = ""
        if why == self._why_not_before_5_24:
            newer = self._alike and not keeps_modules()
            instead = ", or install transformers 5.24 or newer, which can" if newer else ""
            instead += "; weights in FP8 it loads (recipe fp8-dynamic)"
        raise BadInput(
            f"transformers could not load the artifact: {why}. If a server loads it, name it: "
            f"--set targets=[vllm]{instead}"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the readers a plan says."""
        if (why := self._why_not_transformers) is not None:
            return (f"transformers does not load this artifact: {why}",)
        if (why := self._why_not_before_5_24) is not None:
            return (f"transformers loads this artifact from 5.24 on only: before, {why}",)
        return ()

    @property
    def reached(self) -> dict[str, str]:
        """The linears that have to stay in 16 bit so that transformers loads the rest, by on-disk name: the class that
        reaches for their weights.

        None where it loads them too, where a server is named, where an override names them, and where they are most.
        """
        recipe, skeleton = self.setup.recipe, self.setup.skeleton
        if recipe.targets or self._why_not_before_5_24 is None or (keeps_modules() and self._alike):
            return {}
        found = reached(skeleton, self._packed)
        named = any(matches(override.match, name) for override in recipe.overrides for name in found)
        weights = {x.name: x.out_features * x.in_features for x in self._quantized}
        return {} if named or 2 * sum(map(weights.__getitem__, found)) > sum(weights.values()) else found

    @property
    def need_dequantize(self) -> bool:
        """Whether transformers runs the artifact only if its config says `dequantize`.

        Else its weights are decompressed as the whole model is called, and some are a part that is called by itself.
        """
        return self._why_not_before_5_24 is not None or self._called_by_part

    @cached_property
    def _why_not_transformers(self) -> str | None:
        skeleton = self.setup.skeleton
        if isinstance(skeleton, ByName):
            return None  # it does not have the family, which is said
        if self._single_experts and any(not loads_single_experts(one) for one in skeleton.fused_experts):
            how = "takes one tensor for all experts, and each is written by itself, as servers read them"
            return f"its {self._kind} {how}"
        if skeleton.padded_experts:
            return f"its {self._kind} wants weights for the experts that have none"
        if not self._compressed:
            return None
        if self.outer.names.get("embeddings") in self.outer.grids:
            return "it does not know quantized embeddings"
        if (why := self._why_not_joined()) is not None:
            return f"in its {self._kind} {why}"
        if self._called_by_part and not self._alike:
            return f"its {self._kind} is called by itself, for which the whole file has to have one number format"
        return None if keeps_modules() and self._alike else self._why_not_before_5_24

    @cached_property
    def _why_not_before_5_24(self) -> str | None:
        """What of transformers' class is in the way of linears without a tensor `weight`.

        From 5.24 on it is in the way no more where the config says `dequantize`.
        """
        if not self._compressed or isinstance(self.setup.skeleton, ByName):
            return None
        why = why_no_packed_linears(self.setup.skeleton, self._packed)
        return why and f"in its {self._kind} {why}"

    def _why_not_joined(self) -> str | None:
        """Why transformers cannot join the tensors that are one parameter in its class; None where it can.

        It decompresses the weights of experts before it joins them, from 5.24 on of all that it joins, and takes them
        all for the one kind: others stop it, go lost or are read wrongly (its `DecompressExperts`).
        """
        inputs = self.setup.recipe.activations
        quantized = {f"{name}.weight": grid for name, grid in self.schemes.items() if grid is not None}
        plain_go_lost = any(grid.type == "int" or grid.bits < 8 for grid in quantized.values())
        for name, sources in self.setup.skeleton.joined(quantized).items():
            weights = [source.removesuffix("$").endswith(".weight") for source in sources]
            experts = any(weights) and all("experts" in source for source in sources)
            if not (all(weights) if keeps_modules() else experts):
                continue
            grid = quantized.get(name)
            if grid is None:
                if plain_go_lost and name.endswith(".weight"):
                    all_alike = "what it joins to one tensor it takes for quantized like the rest"
                    return f"{name} is not quantized, and {all_alike}"
            elif layout_of(grid, inputs) != WORDS:
                if grid.type not in ("fp8", "mxfp4"):
                    return f"it has no way to read experts of {grid}{' with int8 inputs' if grid.type == 'int' else ''}"
            elif not grid.symmetric:
                return f"it has no way to read experts of {grid}, with zero points; set `symmetric: true`"
        return None

    @property
    def _kind(self) -> str:
        return str(self.setup.skeleton.config.model_type)

    @property
    def _compressed(self) -> bool:
        return self.setup.recipe.formats[0] == "compressed-tensors"

    @property
    def _called_by_part(self) -> bool:
        """Whether the whole model, as whose call transformers decompresses the weights, is never called."""
        skeleton = self.setup.skeleton
        return self._compressed and not isinstance(skeleton, ByName) and skeleton.is_called_by_part

    @cached_property
    def _quantized(self) -> list[LinearLayer]:
        return [x for x in self.setup.linears if self.schemes[x.name] is not None]

    @cached_property
    def _packed(self) -> list[LinearLayer]:
        inputs = self.setup.recipe.activations
        return [x for x in self.setup.linears if (grid := self.schemes[x.name]) is not None and packs(grid, inputs)]

    @property
    def _single_experts(self) -> bool:
        """Whether experts are quantized, and so written one by one."""
        return any(x.experts is not None for x in self._quantized)

    @property
    def _alike(self) -> bool:
        return len({self.schemes[x.name] for x in self._quantized} | set(self.outer.grids.values())) == 1
