"""A Hugging Face folder of packed weights as the artifact, and the same weights in further formats beside it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..artifact.convert import convert
from ..artifact.manifest import Manifest, Sizes
from ..calibrate import kv_cache
from ..calibrate.sensitivity import measure
from ..calibrate.tokens import Tokens
from ..core.errors import BadInput
from ..core.files import move_whole, write_json
from ..formats import FORMATS, ModelScheme
from ..models.by_name import ByName
from ..models.checkpoint import Checkpoint
from ..models.companions import copy_companions
from ..models.config_forms import readable_by_all
from ..models.placed_model import LinearLayer
from ..models.rotated_checkpoint import RotatedCheckpoint
from ..models.shards import gather_parts, write_part
from ..models.skeleton import Skeleton
from ..numbers.types import Grid
from .accounting import account, few, left_for_their_width, left_for_transformers
from .backend import Backend, Setup
from .budgeting import SAMPLES, Menu, with_sensitivity
from .outer import NOTHING, Outer
from .plan import Plan, make_plan
from .readers import Readers
from .settings import Settings
from .transforms import BlockTransforms


@dataclass(frozen=True, kw_only=True)
class HuggingFaceFolder(Backend):
    """Shards in the recipe's first format; each further format is converted from them.

    undivided: linears that stay in 16 bit because the recipe's groups do not fill their rows. reached: those that stay
    so that transformers loads the rest (see Readers). menu: of the recipe's budget, which replaces `schemes`, until
    then the smallest that it has, once the text is known; None without one.
    """

    undivided: tuple[str, ...] = ()
    reached: Mapping[str, str] = field(default_factory=dict)
    outer: Outer = NOTHING
    menu: Menu | None = None

    @classmethod
    def of(cls, setup: Setup) -> Self:
        """Raises BadInput for a linear or a model that a format cannot hold, and transforms the model does not take."""
        recipe, skeleton = setup.recipe, setup.skeleton
        widths = {linear.name: linear.in_features for linear in setup.linears}
        left = recipe.undivided(widths)
        if left and not few(skeleton, setup.linears, left):
            left = []  # refused
        if recipe.budget is None:
            schemes = recipe.schemes(widths, left)
            outer, menu = Outer.of(recipe, skeleton, schemes.values()), None
        else:
            outer = Outer.of(recipe, skeleton, recipe.budget.grids)
            menu, left = Menu.of(recipe, skeleton, setup.linears, outer), []
            schemes = menu.schemes(menu.smallest(), setup.linears)
        made = cls(
            setup=setup,
            schemes=schemes,
            undivided=tuple(left),
            outer=outer,
            menu=menu,
            keep_final=outer.solved_head(recipe, skeleton),
        )
        made = made._left_for_transformers() if menu is None else made._with(menu, menu.smallest())
        for one in made.alternatives():
            for format in recipe.formats:
                one._check_format(format)
        made._readers.check()
        BlockTransforms(recipe, skeleton)
        if recipe.kv_cache is not None:
            kv_cache.attentions(skeleton)
        return made

    def plan(self) -> Plan:
        setup = self.setup
        plan = make_plan(setup.recipe, setup.skeleton, setup.linears, self.schemes, setup.ranks)
        plan = replace(plan, artifact_bytes=plan.artifact_bytes - self.outer.saved_bytes(setup.skeleton))
        if self.menu is not None:
            plan = with_sensitivity(plan, setup.recipe, setup.skeleton, setup.linears)
            layers = dict.fromkeys(plan.layers, "within the budget")
            plan = replace(plan, artifact_bytes=plan.artifact_bytes + self.menu.spare_bytes, layers=layers)
            plan = replace(plan, notes=(*plan.notes, "the artifact takes at most that size: the budget chooses"))
        notes, original = (*self._notes, *self.outer.left, *plan.notes), setup.checkpoint.total_bytes
        if setup.checkpoint.quantization is not None and plan.artifact_bytes >= original:
            notes = (*notes, "the artifact is no smaller than the original, which is itself quantized")
        return replace(plan, original_bytes=original, notes=notes)

    def alternatives(self) -> list["HuggingFaceFolder"]:
        if self.menu is None or self.setup.recipe.budget is None:
            return [self]
        menu = self.menu
        looks = [menu.mixed(), *(menu.with_(grid) for grid in self.setup.recipe.budget.grids)]
        return [self._with(menu, chosen) for chosen in looks]

    def _with(self, menu: Menu, chosen: Mapping[str, Grid | None]) -> Self:
        """With the number formats that are chosen for the menu's groups."""
        recipe, skeleton, outer = self.setup.recipe, self.setup.skeleton, self.outer
        if (head := outer.names.get("head", "")) in chosen:
            outer = outer.with_head(chosen[head], skeleton)
        schemes = menu.schemes(chosen, self.setup.linears)
        return replace(self, schemes=schemes, outer=outer, keep_final=outer.solved_head(recipe, skeleton))

    def _left_for_transformers(self) -> Self:
        reached = self._readers.reached
        kept = {name: None if name in reached else grid for name, grid in self.schemes.items()}
        return replace(self, reached=reached, schemes=kept)

    def settled(self, tokens: Tokens | None, work: Path) -> Self:
        """With the number formats that the recipe's budget allows."""
        if self.menu is None:
            return self
        assert tokens is not None
        kept, skeleton = work / "schemes.json", self.setup.skeleton
        if kept.exists():
            found = json.loads(kept.read_text(encoding="utf-8"))
            chosen = {name: None if grid is None else Grid.model_validate(grid) for name, grid in found.items()}
        else:
            exact = Skeleton(self.setup.reader, device=skeleton.device, dtype=torch.float32)
            chosen = self.menu.choose(measure(exact, tokens.ids[:SAMPLES], work), skeleton.reader.read)
            write_json(kept, {n: None if grid is None else grid.model_dump(mode="json") for n, grid in chosen.items()})
        return self._with(self.menu, chosen)

    def assemble(
        self, manifest: Manifest, parts: Mapping[Path, str], tokens: Tokens | None, settings: Settings
    ) -> Manifest:
        partial, final = settings.out / "quantized.partial", settings.out / "quantized"
        manifest = manifest.changed(fallbacks=(*self._notes, *manifest.fallbacks))
        if kept := tuple(name for name in self.setup.skeleton.unused if name not in self._displaced):
            manifest = manifest.changed(kept=kept)
        if self.outer.quantized:
            manifest = manifest.changed(outside={name: str(grid) for name, grid in self.outer.quantized.items()})
        shutil.rmtree(partial, ignore_errors=True)
        if not final.exists():
            partial.mkdir(parents=True)
            shell = settings.work / "shell.safetensors"
            outside = {shell: write_part(shell, self._shell_tensors(), sync=False)}
            written = gather_parts({**outside, **parts}, partial)
            format = FORMATS[self.setup.recipe.formats[0]]
            quantization = format.config(self._model_scheme([x.name for x in manifest.layers if x.dynamic]))
            if self._readers.need_dequantize:
                quantization["dequantize"] = True
            config = readable_by_all(self.setup.reader.config) | {"quantization_config": quantization}
            write_json(partial / "config.json", config)
            for name, content in format.extra_files(quantization).items():
                write_json(partial / name, content)
            copy_companions(self.setup.source.path, partial)
            manifest = manifest.changed(artifact=self._sizes(partial, written))
            manifest.write(partial)
            move_whole(partial, final)
        else:  # a run was stopped between here and its own manifest
            manifest = manifest.changed(artifact=self._sizes(final, {}))
        for name in self.setup.recipe.formats[1:]:
            target = settings.out / "converted" / name
            if not target.exists():
                convert(final, target, name)
        return manifest.changed(converted=self.setup.recipe.formats[1:])

    @property
    def outside(self) -> Mapping[str, Grid]:
        return self.outer.quantized

    @property
    def _notes(self) -> tuple[str, ...]:
        """What is not as the original has it before anything is rounded."""
        rotated = self.setup.reader.notes if isinstance(self.setup.reader, RotatedCheckpoint) else ()
        config = self.setup.checkpoint.config
        own = f"the checkpoint's own code (auto_map) is not run, but transformers' class for {config.get('model_type')}"
        brought = (own,) if "auto_map" in config and not isinstance(self.setup.skeleton, ByName) else ()
        accounted = account(self.setup.skeleton, self.setup.linears, self.outer.towers, self._displaced)
        left = [
            *left_for_their_width(self.setup.linears, self.undivided, self.setup.recipe.weights),
            *left_for_transformers(self.setup.skeleton, self.setup.linears, self.reached),
        ]
        notes = (*self.setup.checkpoint.notes, *brought, *rotated, *accounted, *left, *self.outer.notes)
        return (*notes, *self._readers.notes)

    @property
    def _displaced(self) -> list[str]:
        """The original's tensors that are of no part of the model and have names that quantized linears need."""
        quantized = {name for name, grid in self.schemes.items() if grid is not None} | set(self.outer.quantized)
        suffixes = {suffix for format in self.setup.recipe.formats for suffix in FORMATS[format].suffixes}
        parts = ((name, *name.rpartition(".")[::2]) for name in self.setup.skeleton.unused)
        return [name for name, linear, suffix in parts if linear in quantized and suffix in suffixes]

    @cached_property
    def _readers(self) -> Readers:
        return Readers(self.setup, self.schemes, self.outer)

    def _model_scheme(self, dynamic: Sequence[str] = ()) -> ModelScheme:
        """dynamic: linears whose inputs no static range fits."""
        recipe, skeleton, towers = self.setup.recipe, self.setup.skeleton, self.outer.towers
        schemes: dict[str, Grid | None] = {**skeleton.by_all_names(self.schemes), **towers}
        if towers:
            schemes |= {own: towers[name] for own, name in skeleton.tower_linears().items() if name in towers}
        outside = skeleton.unquantized_modules(but=self.outer.quantized)
        at_run_time = skeleton.by_all_names({name: self.schemes[name] for name in dynamic})
        inputs = recipe.activations, recipe.kv_cache
        return ModelScheme(schemes, outside, recipe.shuffled, *inputs, self.outer.grids, at_run_time)

    def _check_format(self, format: str) -> None:
        """Raise BadInput for what `format` cannot hold, linear by linear and as a whole."""
        kinds: dict[tuple[Grid, int, int, bool], LinearLayer] = {}
        for x in self.setup.linears:
            if (own := self.schemes[x.name]) is not None:
                kinds.setdefault((own, x.out_features, x.in_features, x.transposed), x)
        for (grid, *_), linear in kinds.items():
            if linear.transposed and not FORMATS[format].holds.conv1d:
                raise BadInput(
                    f"{linear.name} is a Conv1D, which readers of {format} silently leave unquantized; "
                    "write it with --set formats=[gptq]"
                )
            try:
                FORMATS[format].check(grid, linear.out_features, linear.in_features, self.setup.recipe.shuffled)
            except BadInput as error:
                raise BadInput(f"{linear.name}: {error}") from None
        FORMATS[format].config(self._model_scheme())

    def _shell_tensors(self) -> dict[str, Tensor]:
        """The tensors outside the blocks; a head that is tied and equal to the embedding is stored once. Of what is
        quantized out there, those that no block's part has.
        """
        skeleton, reader = self.setup.skeleton, self.setup.reader
        inside = skeleton.on_disk_of_blocks()
        packed = {f"{name}.weight" for name in self.outer.quantized} | set(self._displaced)
        tensors = {name: reader.read(name) for name in reader.names() if name not in inside | packed}
        tensors |= self.outer.tensors(self.setup.recipe, reader.read)
        if reader.config.get("tie_word_embeddings", skeleton.tied):
            for head in skeleton.head_names():
                twin = tensors.get(f"{head}.weight")
                if twin is not None and any(n != f"{head}.weight" and torch.equal(t, twin) for n, t in tensors.items()):
                    del tensors[f"{head}.weight"]
        return tensors

    def _sizes(self, folder: Path, written: Mapping[str, str]) -> Sizes:
        """Bytes on disk and true bits per weight, scales and zeros counted. written: SHA-256 of files by name."""
        artifact, format = Checkpoint(folder), self.setup.recipe.formats[0]
        quantized = [x for x in self.setup.linears if self.schemes[x.name] is not None]
        weights = sum(x.out_features * x.in_features for x in quantized)
        packed = {f"{x.name}.{suffix}" for x in quantized for suffix in FORMATS[format].suffixes}
        stored = sum(artifact.nbytes(n) for n in artifact.names() if n in packed)
        files = artifact.file_hashes({folder / name: digest for name, digest in written.items()})
        return self.setup.sizes(format, artifact, stored, weights, files)
