"""A GGUF file as the artifact: rounded by our own methods block by block, or by llama.cpp as a whole."""

import json
import math
import re
import shutil
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self, cast

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..artifact.manifest import LayerRecord, Manifest, Sizes
from ..calibrate.tokens import Tokens, end_tokens, open_tokenizer
from ..core.errors import BadInput
from ..core.files import file_sha256, move_whole, write_json
from ..gguf import imatrix
from ..gguf import llama_cpp_library as llama_cpp
from ..gguf.conversion import Conversion, FloatType
from ..gguf.general import sampling
from ..gguf.layout import Entry
from ..gguf.mixes import Choice
from ..gguf.modelfile import modelfile
from ..gguf.reader import LAYOUT, GgufCheckpoint, GgufTensors, gguf_files, not_read_back
from ..gguf.rounded_file import RoundedFile
from ..gguf.tensor_types import Types, fallbacks, own_types, summed_up
from ..gguf.writer import write
from ..models.checkpoint import Checkpoint
from ..models.companions import copy_companions
from ..models.skeleton import Skeleton
from ..recipe import LlamaCppQuantizer
from ..recipe.gguf_file import FLOATS
from . import sharing
from .backend import Backend, Setup
from .gguf_converter import convert
from .gguf_plan import plan_llama_cpp, plan_rounded
from .plan import Plan
from .settings import BlockDone, Settings

_MOST = 8 * 65504.0
_IMATRIX = "imatrix.gguf"
_HEAD = "head.importance"  # in the last block's part: mean squares [hidden] of the head's inputs


def _conversion(setup: Setup, beside: Backend | None) -> Conversion:
    """The model as a GGUF file; that of another recipe's backend, where no recipe has anything to do with it.

    Raises BadInput for a model or a tokenizer that does not fit.
    """
    path, converter, here = setup.source.path, setup.recipe.gguf_file.converter, not setup.headers_only
    if converter is not None and not here:
        raise BadInput("gguf.converter needs the whole checkpoint: leave it out, or plan without --config-only")
    if isinstance(beside, _GgufBackend) and converter == beside.setup.recipe.gguf_file.converter:
        return beside.conversion
    made = None if converter is None else convert(Path(converter), path, _exact_type(setup.checkpoint))
    opened = setup.skeleton if setup.reader is setup.checkpoint else None
    return Conversion(setup.checkpoint, path, setup.source.id, made, tokenizer=here, skeleton=opened)


def _opened(setup: Setup, beside: Backend | None) -> tuple[Conversion, dict[str, imatrix.Array], str | None]:
    """The model as a GGUF file, the importance matrix that the recipe names, and the sha256 of that matrix's file.

    beside: of another recipe for the same model, if there is one. Raises BadInput for a model, a tokenizer, a pattern
    or an importance matrix that does not fit.
    """
    conversion = _conversion(setup, beside)
    if conversion.lost and setup.recipe.evaluation is not None:
        raise BadInput(f"gguf.converter: {not_read_back(conversion.lost)}; set evaluation: null")
    own_types(setup.recipe, conversion.entries)
    file = setup.recipe.gguf_file.imatrix
    if not isinstance(file, str):
        return conversion, {}, None
    return conversion, imatrix.fitted(imatrix.load(Path(file)), conversion.entries, file), file_sha256(Path(file))


@dataclass(frozen=True, kw_only=True)
class _GgufBackend(Backend):
    """What both backends for GGUF have in common: the folder around the file, and the manifest.

    given: the recipe's importance matrix, mean squares [experts, in] by GGUF tensor; empty without one.
    """

    conversion: Conversion
    given: Mapping[str, imatrix.Array]

    @abstractmethod
    def _write(self, folder: Path, parts: list[Path], tokens: Tokens | None, settings: Settings) -> Mapping[str, str]:
        """Write model.gguf into `folder`; returns the tensors that did not get their intended type {name: why}."""

    @property
    def limits(self) -> dict[str, float]:
        """As `Backend`'s. Scales of GGUF's types are float16, and that of Q4_0 is an eighth of the largest value."""
        if self.setup.recipe.gguf_file.type in FLOATS:
            return {}
        return self._limits((p for entry in self.conversion.entries if entry.matrix for p in entry.parameters), _MOST)

    @property
    def _weighted(self) -> list[Entry]:
        """The tensors that the user's importance matrix is used for."""
        return self.conversion.entries

    def assemble(
        self, manifest: Manifest, parts: Mapping[Path, str], tokens: Tokens | None, settings: Settings
    ) -> Manifest:
        setup, conversion = self.setup, self.conversion
        folder = settings.out / "quantized.partial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fell_back = self._write(folder, list(parts), tokens, settings)
        write_json(folder / "config.json", setup.checkpoint.config)
        copy_companions(setup.source.path, folder)
        if conversion.converted is not None:
            write_json(folder / LAYOUT, {e.name: [list(e.parameters), list(e.changes)] for e in conversion.entries})
        artifact = GgufCheckpoint(folder)
        about = self._write_modelfile(artifact.tensors.files, folder)
        notes = [*setup.checkpoint.notes, *conversion.notes, *summed_up(fell_back)]
        notes += [*summed_up(self._unweighted(artifact.tensors)), *about]
        layers = self._layers(artifact.tensors, fell_back)
        if self.rounds_blocks:  # their records have the errors too
            held = {layer.name: layer for layer in layers}
            layers = [
                record.changed(tensor=held[record.name].tensor, note=record.note or held[record.name].note)
                for record in manifest.layers
                if record.name in held
            ]
        manifest = manifest.changed(
            layers=tuple(layers),
            converted=(),
            fallbacks=(*notes, *manifest.fallbacks),
            imatrix=self.imatrix_sha256,
            artifact=self._sizes(artifact),
        )
        manifest.write(folder)
        shutil.rmtree(settings.out / "quantized", ignore_errors=True)  # left by a run killed before its end
        move_whole(folder, settings.out / "quantized")
        return manifest

    def _unweighted(self, stored: GgufTensors) -> dict[str, str]:
        """The quantized tensors that should be in the user's importance matrix and are not, each with a note.

        An embedding that is not the head too has no importance: it is looked up, not multiplied.
        """
        file, names = self.setup.recipe.gguf_file.imatrix, {e.name for e in self.conversion.entries}
        if not isinstance(file, str):
            return {}
        return {
            entry.name: f"not in {file}: rounded with equal weight for all columns"
            for entry in self._weighted
            if entry.matrix
            and entry.name not in self.given
            and stored.stored(entry.name).tensor_type.name not in FLOATS
            and not (entry.name == "token_embd.weight" and "output.weight" in names)
        }

    def _write_modelfile(self, files: list[Path], folder: Path) -> list[str]:
        """Write Ollama's Modelfile; returns notes about it."""
        if len(files) > 1:
            return ["no Modelfile: Ollama does not load a file in parts"]
        conversion, tokenizer = self.conversion, open_tokenizer(self.setup.source.path)
        add_bos = bool(conversion.metadata.get("tokenizer.ggml.add_bos_token"))
        ends, positions = end_tokens(self.setup.source.path, tokenizer), int(conversion.config.max_position_embeddings)
        text, note = modelfile(files[0], tokenizer, positions, ends, add_bos, sampling(conversion.metadata))
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        return [note] if note else []

    def _layers(self, stored: GgufTensors, notes: Mapping[str, str]) -> list[LayerRecord]:
        """The manifest's record of each linear, from the types in the file."""
        of = {name: entry for entry in self.conversion.entries for name in entry.parameters}
        layers = []
        for linear in self.setup.linears:
            if f"{linear.name}.weight" not in of:
                continue
            tensor = of[f"{linear.name}.weight"].name
            kind = stored.stored(tensor).tensor_type
            block, size = gguf.GGML_QUANT_SIZES[kind]
            layers.append(
                LayerRecord(
                    name=linear.name,
                    block=linear.block,
                    shape=(linear.out_features, linear.in_features),
                    bits=8 * size / block,
                    group_size=block,
                    symmetric=None,
                    scheme=kind.name,
                    loss=None,
                    relative_error=None,
                    damp=None,
                    tokens=None,
                    note=notes.get(tensor),
                    tensor=tensor,
                )
            )
        return layers

    def _sizes(self, artifact: GgufCheckpoint) -> Sizes:
        """Sizes of the file, with the bits that a weight of a linear takes."""
        linears = {f"{linear.name}.weight" for linear in self.setup.linears}
        own = [entry for entry in self.conversion.entries if linears & set(entry.parameters[:1])]
        weights = sum(math.prod(entry.shape) for entry in own)
        packed = sum(int(artifact.tensors.stored(entry.name).n_bytes) for entry in own)
        return self.setup.sizes("gguf", artifact, packed, weights, artifact.file_hashes()).changed(
            llama_cpp=llama_cpp.package_version()
        )


@dataclass(frozen=True, kw_only=True)
class OwnGgufFile(_GgufBackend):
    """A file that our own methods round, block by block, to the types of llama.cpp's mix or within a budget."""

    file: RoundedFile

    @classmethod
    def of(cls, setup: Setup, beside: Backend | None = None) -> Self:
        """Raises BadInput for what cannot be written, and an importance matrix that would not be used.

        beside: of another recipe for the same model, if there is one.
        """
        conversion, given, sha256 = _opened(setup, beside)
        recipe, outside = setup.recipe, conversion.outside()
        if given and recipe.method.calibrated and not any(entry.name in given for entry in outside):
            raise BadInput(
                f"gguf.imatrix {recipe.gguf_file.imatrix}: gptq rounds the blocks by their own Hessians, and the file "
                f"has nothing of what is outside of them ({', '.join(entry.name for entry in outside)}); drop it, or "
                "make it with llama-imatrix --process-output"
            )
        file = RoundedFile.of(recipe, conversion)
        return cls(
            setup=setup,
            schemes=file.schemes(setup.linears),
            importance=imatrix.of_linears(given, conversion.entries) if not recipe.method.calibrated else {},
            imatrix_sha256=sha256,
            keep_final=partial(_head_importance, setup.skeleton) if recipe.gguf_file.calibrated else None,
            conversion=conversion,
            given=given,
            file=file,
        )

    def plan(self) -> Plan:
        return plan_rounded(self.setup, self.file, self.schemes)

    def settled(self, tokens: Tokens | None, work: Path) -> Self:
        """With the types that the recipe's budget allows."""
        if self.file.allowed_bytes is None:
            return self
        assert tokens is not None
        kept, setup = work / "types.json", self.setup
        if kept.exists():
            found = json.loads(kept.read_text(encoding="utf-8"))
            types: Types = {name: None if found[name] is None else Choice(found[name]) for name in self.file.types}
        else:
            exact = Skeleton(setup.checkpoint, device=setup.skeleton.device, dtype=torch.float32)
            types = self.file.within_budget(exact, tokens.ids, work)
            write_json(kept, {name: None if choice is None else choice.type for name, choice in types.items()})
        file = replace(self.file, types=types)
        return replace(self, file=file, schemes=file.schemes(setup.linears))

    @property
    def _weighted(self) -> list[Entry]:
        has_hessians = self.setup.recipe.method.calibrated  # of what is in the blocks
        return self.conversion.outside() if has_hessians else self.conversion.entries

    def _write(self, folder: Path, parts: list[Path], tokens: Tokens | None, settings: Settings) -> Mapping[str, str]:
        linears, importance = self.setup.linears, dict(self.given)
        if self.keep_final is not None:
            head = imatrix.head_of(self.conversion.entries)
            importance[head] = load_file(parts[-1])[_HEAD][None].numpy()
        rounded = {f"{x.name}.weight": parts[x.block] for x in linears if self.schemes[x.name] is not None}
        self.file.save(folder / "model.gguf", rounded, importance)
        return fallbacks(self.conversion, self.file.types) | self._to_nearest(rounded)

    def _to_nearest(self, rounded: Mapping[str, Path]) -> dict[str, str]:
        """The blocks' tensors that a calibrated method has not rounded, each with a note. rounded: by parameter."""
        if not self.setup.recipe.method.calibrated:
            return {}
        return {
            entry.name: "rounded to nearest: it is not one whole linear, as which the method rounds"
            for entry in self.conversion.entries
            if entry.name.startswith("blk.")
            and entry.matrix
            and (choice := self.file.types[entry.name]) is not None
            and choice.type not in FLOATS
            and not rounded.keys() & set(entry.parameters)
        }


def _head_importance(skeleton: Skeleton, hidden: Tensor) -> dict[str, Tensor]:
    return {_HEAD: imatrix.of_head(skeleton, hidden)}


@dataclass(frozen=True, kw_only=True)
class LlamaCppFile(_GgufBackend):
    """A file made by llama.cpp's quantizer from the unquantized model; or one of floats, which needs no quantizer."""

    @classmethod
    def of(cls, setup: Setup, beside: Backend | None = None) -> Self:
        """Raises BadInput for what cannot be written, and where llama.cpp is not installed. beside: see OwnGgufFile."""
        if setup.recipe.gguf_file.type not in FLOATS:
            llama_cpp.library()
        conversion, given, sha256 = _opened(setup, beside)
        return cls(
            setup=setup,
            schemes={linear.name: None for linear in setup.linears},
            rounds_blocks=False,
            imatrix_sha256=sha256,
            conversion=conversion,
            given=given,
        )

    def plan(self) -> Plan:
        return plan_llama_cpp(self.setup, self.conversion)

    def _write(self, folder: Path, parts: list[Path], tokens: Tokens | None, settings: Settings) -> Mapping[str, str]:
        """Quantize with llama.cpp; importance matrix and unquantized file stay in `settings.work` for a resume."""
        recipe, conversion = self.setup.recipe, self.conversion
        wanted, method, tell = recipe.gguf_file, recipe.method, _in_blocks(conversion.skeleton.n_blocks, settings)
        assert isinstance(method, LlamaCppQuantizer)
        if wanted.type in FLOATS:
            kind = cast(FloatType, wanted.type)
            tensors = conversion.tensors(kind)
            metadata = conversion.file_type(kind)
            write(folder / "model.gguf", metadata, tensors, wanted.split, lambda n: tell(n, len(tensors)))
            return {}
        importance = self._importance(tokens, settings)
        if (settings.work / _IMATRIX).exists():
            shutil.copy2(settings.work / _IMATRIX, folder)
        floats = self._unquantized(settings.work)
        own = tuple((f"^{re.escape(name)}$", kind) for name, kind in own_types(recipe, conversion.entries).items())
        asked = llama_cpp.QuantizeRequest(wanted.type, own, importance, method.threads, split=len(floats) > 1)
        # With parts llama.cpp takes the name without its ending, and numbers them itself.
        target = folder / ("model" if len(floats) > 1 else "model.gguf")
        reasons = llama_cpp.not_whole_blocks(llama_cpp.quantize(floats[0], target, asked, tell))
        if not reasons:
            return {}
        stored = GgufTensors(gguf_files(folder))
        return {n: f"{why} -> {stored.stored(n).tensor_type.name}" for n, why in reasons.items() if n in stored}

    def _importance(self, tokens: Tokens | None, settings: Settings) -> Mapping[str, imatrix.Array] | None:
        """Mean squares [experts, in] by GGUF tensor: the user's, or of the calibration text; None without."""
        setup, entries = self.setup, self.conversion.entries
        if setup.recipe.gguf_file.imatrix is not True:
            return self.given or None
        assert tokens is not None
        file = settings.work / _IMATRIX
        if not file.exists():
            measure = partial(imatrix.measure, setup.skeleton, entries, tokens)
            found = sharing.importance(settings.share, setup, tokens, measure)
            imatrix.save(file, found, tokens.source, tokens.ids.shape[1])
        return imatrix.fitted(imatrix.load(file), entries, "of the calibration text")

    def _unquantized(self, work: Path) -> list[Path]:
        """The unquantized model as a GGUF file, or its parts; those of a killed run if they are intact."""
        conversion, done = self.conversion, work / "converted.json"
        if done.exists():
            before: dict[str, str] = json.loads(done.read_text(encoding="utf-8"))
            parts = [work / name for name in before]
            if all(part.exists() and file_sha256(part) == before[part.name] for part in parts):
                return parts
            done.unlink()
        kind, split = _exact_type(self.setup.checkpoint), self.setup.recipe.gguf_file.split
        parts = write(work / "model.gguf", conversion.file_type(kind), conversion.tensors(kind), split)
        write_json(done, {part.name: file_sha256(part) for part in parts})
        return parts


def _in_blocks(blocks: int, settings: Settings) -> Callable[[int, int], None]:
    """A callback (tensors done, of how many) that reports progress as decoder blocks."""
    told = 0
    settings.on_start(0, blocks)

    def tell(done: int, of: int) -> None:
        nonlocal told
        if (now := done * blocks // of) > told:
            told = now
            settings.on_block(BlockDone(now, blocks, None, 0.0))

    return tell


def _exact_type(checkpoint: Checkpoint) -> FloatType:
    """The float type that holds every tensor of the checkpoint without loss."""
    dtypes = {checkpoint.dtype(name) for name in checkpoint.names()}
    if dtypes <= {torch.bfloat16}:
        return "BF16"
    return "F16" if dtypes <= {torch.float16} else "F32"
