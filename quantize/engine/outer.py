"""Head, embeddings and a multimodal model's towers, outside the blocks: whether they are quantized, and to what."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.text import size
from ..formats import FORMATS
from ..methods import ROUNDERS
from ..models.by_name import ByName
from ..models.skeleton import Skeleton
from ..numbers.activations import columns_of
from ..numbers.grid import Inputs, QuantizedLinear, scale_dtype, stacked_rows
from ..numbers.types import Grid
from ..recipe import Gptq, MethodSettings, Recipe, Rtn

EIGHT_BITS = Grid(bits=8, group_size=-1)
_TOGETHER = 1 << 26  # weights rounded at a time: those of a vocabulary may not fit in memory several times
_FORMAT = "compressed-tensors"
_KERNEL = 16  # rows and columns that 8-bit matrix products want multiples of (cutlass, torch._scaled_mm)
_TIED = "head and embeddings are one tensor (tie_word_embeddings), which readers of packed weights do not share"


@dataclass(frozen=True)
class Outer:
    """What of it is quantized, by the recipe's `head`, `embeddings` and `towers`.

    names: of head and embeddings on disk, without `.weight`, by recipe key; those that the model has. grids: of those
    of the two that are quantized; towers: of the towers' linears. notes: what head and embeddings save. left: why the
    others stay in 16 bit.
    """

    names: Mapping[str, str]
    grids: Mapping[str, Grid]
    notes: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    towers: Mapping[str, Grid] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, skeleton: Skeleton, weights: Iterable[Grid | None]) -> "Outer":
        """weights: of the blocks' linears. Raises BadInput where the recipe asks for what cannot be written."""
        names, grids, left, weights = _names(skeleton), dict[str, Grid](), list[str](), list(weights)
        for key, wanted in (("head", recipe.head), ("embeddings", recipe.embeddings)):
            name = names.get(key)
            if wanted is None or (wanted == "auto" and name is None):
                continue
            if name is None:
                raise BadInput(
                    f"{key}: {_TIED if skeleton.tied else 'the model has none that is read'}: set {key}: null"
                )
            why = _why_not(recipe, skeleton, weights)
            if wanted == "auto":
                why = why or _why_no_reader(recipe, str(skeleton.config.model_type), key)
                if why is None:
                    grids[name] = EIGHT_BITS
                elif recipe.targets:
                    left.append(f"{name} stays in 16 bit ({size(_stored(skeleton, name))}): {why}")
                continue
            if why is not None:
                raise BadInput(f"{key}: {name} has to stay in 16 bit, {why}: set {key}: null")
            _check(key, wanted, name, skeleton)
            grids[name] = wanted
        made = cls(names, grids, left=tuple(left), towers=_towers(recipe, skeleton) if recipe.towers else {})
        return made._noted(skeleton)

    def _noted(self, skeleton: Skeleton) -> "Outer":
        saved = [
            f"{name} in {grid}: {size(self.bytes_of(name, skeleton))} in place of {size(_stored(skeleton, name))}"
            for name, grid in self.grids.items()
        ]
        return replace(self, notes=tuple(saved))

    def with_head(self, grid: Grid | None, skeleton: Skeleton) -> "Outer":
        """With the head in another number format; None: 16 bit."""
        others = {name: grid for name, grid in self.grids.items() if name != self.names["head"]}
        return replace(self, grids=others if grid is None else others | {self.names["head"]: grid})._noted(skeleton)

    def head_options(self, recipe: Recipe, skeleton: Skeleton) -> dict[Grid | None, int]:
        """The bytes of each number format that a budget may give the head: those of its menu, and 8 bits, the default;
        none where the recipe settles it, or the budget is of the blocks' linears alone."""
        head = self.names.get("head", "")
        if recipe.budget is None or recipe.budget.bytes is None or recipe.head != "auto" or head not in self.grids:
            return {}
        columns = skeleton.reader.shape(f"{head}.weight")[1]
        grids = dict.fromkeys([EIGHT_BITS, *(grid for grid in recipe.budget.grids if grid.divides(columns))])
        found: dict[Grid | None, int] = {
            grid: self.with_head(grid, skeleton).bytes_of(head, skeleton) for grid in grids
        }
        if None in recipe.budget.menu:
            found[None] = _stored(skeleton, head)
        return found

    @property
    def quantized(self) -> Mapping[str, Grid]:
        """The grid of all that is quantized outside the blocks, by on-disk name."""
        return {**self.grids, **self.towers}

    def bytes_of(self, name: str, skeleton: Skeleton) -> int:
        """Bytes that it takes packed."""
        grid = self.quantized[name]
        rows, columns = skeleton.reader.shape(f"{name}.weight")
        scale_bytes = scale_dtype(torch.empty(0, dtype=skeleton.dtype), grid).itemsize
        return FORMATS[_FORMAT].packed_bytes(grid, rows, columns, scale_bytes)

    def saved_bytes(self, skeleton: Skeleton) -> int:
        """Bytes that the artifact is smaller by."""
        return sum(_stored(skeleton, name) - self.bytes_of(name, skeleton) for name in self.quantized)

    def with_moment(self, recipe: Recipe) -> str | None:
        """The head, where the recipe's method rounds it by the second moment of its inputs; below 8 bits that pays."""
        head = self.names.get("head")
        grid = None if head is None else self.grids.get(head)
        return head if isinstance(recipe.method, Gptq) and grid is not None and grid.bits < 8 else None

    def tensors(self, recipe: Recipe, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The packed tensors of those that are rounded to nearest, by on-disk name. read: the original's tensors."""
        packed: dict[str, Tensor] = {}
        spec = recipe.activations  # in 16 bit for head and embeddings
        for name, grid in self.quantized.items():
            if name != self.with_moment(recipe):
                rounded = _rounded(read(f"{name}.weight"), grid, Rtn())
                if spec is not None:
                    rounded = replace(rounded, inputs=Inputs(spec, columns_of(spec, grid)))
                packed |= FORMATS[_FORMAT].pack(name, rounded)
        return packed

    def solved_head(self, recipe: Recipe, skeleton: Skeleton) -> Callable[[Tensor], dict[str, Tensor]] | None:
        """Makes the packed head from the states [samples, seq_len, hidden] that leave the last block; None where it is
        not rounded by its inputs."""
        head = self.with_moment(recipe)
        if head is None:
            return None

        def solve(hidden: Tensor) -> dict[str, Tensor]:
            moment = _moment(skeleton, hidden)
            weight = skeleton.reader.read(f"{head}.weight").to(moment.device)
            rounded = _rounded(weight, self.grids[head], recipe.method, moment)
            return FORMATS[_FORMAT].pack(head, rounded)

        return solve


NOTHING = Outer({}, {})


def _names(skeleton: Skeleton) -> dict[str, str]:
    """By recipe key; without those that the file calls other than transformers does, or that lie in a shared module."""
    found: dict[str, str] = {}
    if isinstance(skeleton, ByName):
        return found  # of a family that transformers does not have
    heads, tables = skeleton.head_modules(), skeleton.embeddings
    module = next((n for n, m in skeleton.model.named_modules() if m is tables), None)
    for key, name in (("head", heads[0] if len(heads) == 1 else None), ("embeddings", module)):
        if name is None or f"{name}.weight" not in skeleton.reader or not isinstance(tables, torch.nn.Embedding):
            continue
        if skeleton.disk_name(f"{name}.weight") == f"{name}.weight":
            found[key] = name
    return found


def _towers(recipe: Recipe, skeleton: Skeleton) -> dict[str, Grid]:
    """The grids of the linears in the towers' blocks that kernels of 8 bits take, by on-disk name."""
    kind = "it" if isinstance(skeleton, ByName) else str(skeleton.model.config.model_type)
    if isinstance(skeleton, ByName) or not skeleton.tower_tensors():
        raise BadInput(f"towers: {kind} has none that is known: leave towers out")
    for loader in [target.loader for target in recipe.targets]:
        if kind not in loader.outer.get("towers", ()):
            raise BadInput(f"towers: {loader.label} is not known to load those of {kind} quantized: leave towers out")
    shapes = {name: skeleton.reader.shape(f"{name}.weight") for name in skeleton.tower_linears().values()}
    found = [name for name, shape in shapes.items() if not any(side % _KERNEL for side in shape)]
    if not found:
        raise BadInput(
            f"towers: no linear in those of {kind} has multiples of {_KERNEL} rows and columns: leave it out"
        )
    return dict.fromkeys(found, recipe.weights)


def _why_not(recipe: Recipe, skeleton: Skeleton, grids: Collection[Grid | None]) -> str | None:
    """Why neither can be quantized in this artifact."""
    if recipe.formats != (_FORMAT,):
        return f"only in artifacts of {_FORMAT} alone"
    if skeleton.tied:
        return _TIED
    if skeleton.tower_tensors():
        return "readers call the parts of a multimodal model by several names"
    if recipe.activations is not None or recipe.kv_cache is not None:
        return "readers know one kind of inputs for a file, and theirs are in 16 bit"
    if any(grid is not None and grid.type != "int" for grid in grids):
        return "it is measured beside integers only"
    if any(grid is not None and not grid.symmetric for grid in grids):
        return "transformers from 5.23 on takes weights with zero points only where there are no others"
    return None


def _why_no_reader(recipe: Recipe, kind: str, key: str) -> str | None:
    """Why the default leaves it as it is: a server that is named does not read it, or none is named."""
    if key == "embeddings":
        return "transformers does not load it quantized"  # modeling_utils.py: _init_weights reads Embedding.weight
    if not recipe.targets:
        return "name `targets` that load it quantized"
    unable = [target.loader.label for target in recipe.targets if kind not in target.loader.outer.get(key, ())]
    return f"{unable[0]} is not known to load it quantized ({kind})" if unable else None


def _check(key: str, grid: Grid, name: str, skeleton: Skeleton) -> None:
    """Raise BadInput for a grid that readers do not take there."""
    if grid.type != "int" or not grid.symmetric:
        raise BadInput(f"{key}: {name} can be of symmetric integers only, not {grid}")
    if key == "embeddings" and 32 % grid.bits:
        raise BadInput(f"{key}: vLLM unpacks embeddings of 2, 4 and 8 bits, not {grid.bits}")
    grid.check(name, skeleton.reader.shape(f"{name}.weight")[1])


def _stored(skeleton: Skeleton, name: str) -> int:
    return int(skeleton.reader.nbytes(f"{name}.weight"))


def _moment(skeleton: Skeleton, hidden: Tensor) -> Tensor:
    """X^T X [hidden, hidden] float32 of the head's inputs, from the last block's outputs [samples, seq_len, hidden]."""
    skeleton.open_shell()
    moment = torch.zeros(hidden.shape[-1], hidden.shape[-1], device=skeleton.device)
    for states in hidden:
        x = skeleton.final_norm(states).to(torch.float32)
        moment.addmm_(x.T, x)
    skeleton.close_shell()
    return moment


def _rounded(weight: Tensor, grid: Grid, method: MethodSettings, moment: Tensor | None = None) -> QuantizedLinear:
    """A weight [out, in] rounded some rows at a time, which share nothing."""
    rows = max(1, _TOGETHER // weight.shape[1])
    parts = [ROUNDERS[method.name](part, grid, method, moment, None).linear for part in torch.split(weight, rows)]
    return stacked_rows(parts)
