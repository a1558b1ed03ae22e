"""The best recipe for a model, a memory and a server: proposed from config and headers alone, or made and measured."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from quantpress.core.errors import BadInput
from quantpress.core.notebook import table
from quantpress.core.text import size
from quantpress.engine.job import Job
from quantpress.exports.contracts import of_job
from quantpress.exports.servers.loader import Loader, refusal
from quantpress.numbers.types import Grid
from quantpress.recipe import GPUS
from quantpress.recipe.loading import parse, parse_target

from ..measure.capacity import cache
from .callbacks import Options
from .recommend import Recommendation, Wish, cache_bytes, recommend
from .session import plan_beside, plan_job

# Cards whose tensor cores multiply these types (CUDA's compute capability 8.9 and up; 10.0 and 12.0).
_FP8 = ("L4", "L40S", "RTX 4090", "RTX 5090", "H100 80GB", "H200", "B200")
_NVFP4 = ("RTX 5090", "B200")
_NOT_CUDA = ("MI300X",)
_MIB = 1 << 20
_CONTEXT = 8192
_GGUF = "gguf"
_FORMATS = ("compressed-tensors", "modelopt", "gptq")  # in which an option is tried, as far as the server reads them
_WIDTHS = (8, 6, 5, 4, 3, 2)
_MIXED, _MIXED_LOW = "mixed", "mixed-2-to-4"
_MENUS = {_MIXED: (6, 5, 4, 3, 8), _MIXED_LOW: (4, 3, 2)}  # of mixtures, as far as the server loads these widths
_EIGHT_BITS = ("fp8", "int8", "q8_0")
_FP8_CACHE = "fp8"  # costs less than weights of 6 bits instead of 8 do (docs/choosing.md)


@dataclass(frozen=True)
class Need:
    """What the model has to fit and reach. memory: bytes; None: no limit, the smallest is wanted."""

    target: str
    memory: int | None
    gpu: str | None = None
    context: int = _CONTEXT
    concurrency: int = 1
    min_recovery: float | None = None

    @property
    def wish(self) -> Wish:
        """The same for a measured run."""
        memory = self.memory or 1 << 60
        return Wish(memory=memory, context=self.context, concurrency=self.concurrency, min_recovery=self.min_recovery)


@dataclass(frozen=True)
class Option:
    """A recipe that was considered. bytes: of its weights, None where it was refused; why: what speaks for it, or why
    it was not taken."""

    name: str
    document: Mapping[str, Any]
    bytes: int | None
    fits: bool
    why: str


@dataclass(frozen=True)
class Proposal:
    """choice: the option to take, or None. options: all, the best first. room: bytes that weights may take; None: any.

    cache_bytes: of all sequences. unrounded: what there is beside a cache that is not in FP8, where this one is.
    original_bytes: of the weights as they are, which may be quantized_already.
    """

    need: Need
    choice: Option | None
    options: tuple[Option, ...]
    room: int | None
    cache_bytes: int
    original_bytes: int
    unrounded: "Proposal | None" = None
    quantized_already: bool = False

    def why(self, chosen: Option | None, *, measured: bool = False) -> list[str]:
        """Why this option, a line each. measured: whether it was made, and holds."""
        lines = []
        if self.room is not None:
            held = f"{'a' if self.unrounded is None else 'an FP8'} key-value cache of {size(self.cache_bytes)}"
            lines.append(f"the weights may take {size(self.room)} beside {held}")
            if (other := self.unrounded) is not None:
                left = size(max(0, other.room or 0))
                lines.append(
                    f"one that is not rounded takes {size(other.cache_bytes)} and leaves {left}: too few for 8 bits"
                )
            if self.original_bytes <= self.room:
                better = "it is quantized already" if self.quantized_already else "quantized it is faster"
                lines.append(f"the original fits as it is ({size(self.original_bytes)}): {better}")
        if chosen is not None:
            lines.append(chosen.why)
        if chosen is not None and self.need.min_recovery is not None and not measured:
            floor = f"{100 * self.need.min_recovery:.6g}%"
            lines.append(f"whether it keeps {floor} of the original's quality is not known before a run: add --run")
        return lines

    def _repr_html_(self) -> str:
        title = "None fits" if self.choice is None else f"Take {self.choice.name}"
        rows = [(one.name, "" if one.bytes is None else size(one.bytes), one.why) for one in self.options]
        return table(title, rows, self.why(self.choice))


def fit(
    model: str,
    target: str = "vllm",
    *,
    memory: int | None = None,
    gpu: str | None = None,
    context: int | None = None,
    concurrency: int = 1,
    min_recovery: float | None = None,
    options: Options | None = None,
    config_only: bool = False,
) -> Proposal:
    """The best recipe for `model` on the server `target` within a memory, from config and headers; nothing is made.

    memory: bytes, by default the GPU's; without either, what is smallest comes first, and `run_in_turn` finds the first
    that keeps `min_recovery`. gpu: a card of the table, for the number types that it multiplies. context: tokens per
    sequence, by default 8192 or what the model has; concurrency: sequences at a time. config_only: as for a plan.
    Raises BadInput for a model that cannot be opened, an unknown target or GPU, more context than the model has, and
    where neither memory nor quality is asked for.

        fit("smollm2-135m", memory=2 * 2**30, context=2048).choice.document
    """
    card = None if gpu is None else _card(gpu)
    if memory is None and card is not None:
        memory = GPUS[card] * _MIB
    if memory is None and min_recovery is None:
        raise BadInput("fit needs a limit: --memory or --gpu for the best that fits, --min-recovery for the smallest")
    if min_recovery is not None and not 0 < min_recovery <= 1:
        raise BadInput(f"--min-recovery {min_recovery:.6g}: a share of the original's quality, from 0 to 100%")
    if memory == 0:
        raise BadInput("--memory 0: give what the model may take, such as 24GiB")
    loader = _for_card(parse_target(target, "target").loader, card)
    first = _first(model, _plain(loader.formats, {"name": target}), options or Options(), config_only)
    context = _context(first, context)
    need = Need(target, memory, card, context, concurrency, min_recovery)
    wanted = {"name": target, "max_model_len": context, "max_num_seqs": concurrency}
    option = partial(_option, first, wanted)

    def held(kv_cache: str | None) -> int:
        """The bytes of all sequences' cache."""
        one = cache(first.skeleton.config, kv_cache, _dtype(first), need.context)
        return need.concurrency * cache_bytes(one, need.context)

    found = _tried(option, need, loader, held(None), first.plan.original_bytes)
    if need.gpu in _FP8 and (found.choice is None or found.choice.name not in _EIGHT_BITS):
        other = _tried(option, need, loader, held(_FP8_CACHE), first.plan.original_bytes, found)
        found = other if other.choice is not None else found
    if found.room is not None and found.room <= 0:
        raise BadInput(
            f"{size(need.wish.memory)} of memory leave no room for weights: {size(need.wish.kept)} are kept for the "
            f"server, and a key-value cache of {concurrency} x {context} tokens takes {size(found.cache_bytes)}; give "
            "more --memory, or lower --context or --concurrency"
        )
    return replace(found, quantized_already=first.checkpoint.quantization is not None)


def _tried(
    option: Callable[..., Option],
    need: Need,
    loader: Loader,
    cache_bytes: int,
    original_bytes: int,
    unrounded: Proposal | None = None,
) -> Proposal:
    """What is considered beside such a key-value cache, and the choice; nothing where it leaves no room.

    option: of name, recipe, what speaks for it, and the room. unrounded: what was found beside one that is not in FP8,
    where this one is.
    """
    room = None if need.memory is None else need.memory - need.wish.kept - cache_bytes
    cached = {} if unrounded is None else {"kv_cache": _FP8_CACHE}
    tried: list[Option] = []
    for name, document, why in _documents(need, loader, room) if room is None or room > 0 else ():
        if name in _MENUS and any(one.fits for one in tried):
            continue  # what fits is better: 8 bits everywhere, or 3 where the mixture has 2 bits, too
        tried.append(option(name, document | cached, why, room))
    if room is None:
        tried.sort(key=lambda one: (not one.fits, one.bytes or 0))
    choice = next((one for one in tried if one.fits), None)
    tried.sort(key=lambda one: (one is not choice, not one.fits))
    return Proposal(need, choice, tuple(tried), room, cache_bytes, original_bytes, unrounded)


def run_in_turn(
    proposal: Proposal, make: Callable[[Option], Path], told: Callable[[Option, Recommendation], None]
) -> Option | None:
    """Make and measure the options that fit, the proposed one first, until one holds; None where none does.

    make: makes and evaluates an option, and returns its run folder. told: is called with what was found of each.
    """
    wish = proposal.need.wish
    for option in proposal.options:
        if option.fits:
            found = recommend([make(option)], wish)
            told(option, found)
            if found.choice is not None:
                return option
    return None


def written(proposal: Proposal, chosen: Option, file: Path, *, measured: bool = False) -> Path:
    """Write a recipe as an ordinary file, with the reasons as its comment. measured: as for `Proposal.why`."""
    comment = "".join(f"# {line}\n" for line in proposal.why(chosen, measured=measured))
    body = yaml.safe_dump(dict(chosen.document), sort_keys=False, default_flow_style=None, width=120)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{comment}\n{body}", encoding="utf-8")
    return file


def _context(first: Job, asked: int | None) -> int:
    """The tokens of a sequence that are meant."""
    longest = of_job(first, first.recipe.formats[0]).positions
    if asked is None:
        return min(_CONTEXT, longest or _CONTEXT)
    if longest is not None and asked > longest:
        raise BadInput(f"--context {asked}: the model has {longest} positions; lower it")
    return asked


def _for_card(loader: Loader, card: str | None) -> Loader:
    """What of a loader works on this card. Raises BadInput where nothing does."""
    if card not in _NOT_CUDA:
        return loader
    rows = tuple(row for row in loader.rows if not row.cuda)
    if not rows:
        raise BadInput(f"--gpu {card}: {loader.label} runs on NVIDIA's GPUs alone; give another --target")
    return replace(loader, rows=rows)


def _first(model: str, documents: Sequence[Mapping[str, Any]], options: Options, config_only: bool) -> Job:
    """Of the first of these recipes that can be planned, to know the model; raises what the last one raises."""
    for document in documents:
        try:
            return plan_job(parse({"model": model} | dict(document)), options, config_only=config_only)[0]
        except BadInput:
            if document is documents[-1]:
                raise
    raise AssertionError("no documents")


def _option(
    first: Job, target: Mapping[str, Any], name: str, document: Mapping[str, Any], why: str, room: int | None
) -> Option:
    """What there is to say of a recipe for the model of `first`."""
    shown = {"name": _run_name(target["name"], name, document), "model": first.recipe.model} | dict(document)
    shown |= _lengths(first) | {"targets": [dict(target)]}
    try:
        found = plan_beside(first, parse(shown)).plan.artifact_bytes
    except BadInput as error:
        return Option(name, shown, None, False, f"refused: {error}")
    if room is not None and found > room:
        why = f"does not fit: {size(found)} of weights, and {size(room)} are left"
        return Option(name, shown, found, False, why)
    return Option(name, shown, found, True, f"{size(found)}: {why}")


def _run_name(target: str, option: str, document: Mapping[str, Any]) -> str:
    """What names the run folder: another for every recipe, so that `--run` makes one beside the other."""
    budget = document.get("budget") or document.get("gguf", {}).get("budget") or {}
    parts = [target, option, str(budget["bytes"]) if budget else "", "kv8" if "kv_cache" in document else ""]
    return "-".join(["fit", *filter(None, parts)])


def _lengths(first: Job) -> dict[str, Any]:
    """Keys that keep texts within the model's positions, where those are fewer than a recipe takes by default."""
    positions = getattr(first.skeleton.config, "max_position_embeddings", None)
    calibration, evaluation = first.recipe.calibration, first.recipe.evaluation
    found: dict[str, Any] = {}
    if positions is not None and positions < calibration.seq_len:
        found["calibration"] = {"seq_len": positions}
    if positions is not None and evaluation is not None and positions < evaluation.window:
        found["evaluation"] = {"window": positions}
    return found


def _documents(need: Need, loader: Loader, room: int | None) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, recipe, what speaks for it) of what is considered, by the quality that is to be expected."""
    if loader.formats == [_GGUF]:
        yield from _gguf(room)
        return
    formats = [format for format in _FORMATS if format in loader.formats]

    def able(grid: Grid, inputs: str | None = None) -> str | None:
        """The format in which the server loads it."""
        spec = None if inputs is None else parse({"weights": {"type": grid.type}, "activations": {"type": inputs}})
        given = None if spec is None else spec.activations
        return next((f for f in formats if refusal(loader, f, [("weights", grid)], given) is None), None)

    if need.gpu in _FP8 and (format := able(Grid(type="fp8"), "fp8")):
        weights = {"weights": {"type": "fp8"}, "activations": {"type": "fp8"}, "method": "gptq", "formats": [format]}
        yield "fp8", weights, f"8-bit floats, which {need.gpu} multiplies at twice the speed of 16 bit"
    widths = {bits: _grid(bits) for bits in _WIDTHS}
    usable = {bits: format for bits, grid in widths.items() if (format := able(grid))}
    if 8 in usable:
        yield "int8", _document(widths[8], usable[8]), "8-bit integers, almost as good as 16 bit"

    def mixture(name: str) -> Iterator[tuple[str, dict[str, Any], str]]:
        menu = [_stated(widths[bits]) for bits in _MENUS[name] if usable.get(bits) == "compressed-tensors"]
        if room is not None and len(menu) > 1:
            document = {"budget": {"bytes": max(room, 1), "menu": menu}, "method": "gptq"}
            yield name, document, "each part in the bits that cost least, all memory used"

    yield from mixture(_MIXED)
    for bits in _WIDTHS[1:]:
        if bits == 2:
            yield from mixture(_MIXED_LOW)
        if bits in usable:
            yield f"int{bits}", _document(widths[bits], usable[bits]), f"{bits}-bit integers everywhere"
    if need.gpu in _NVFP4 and (format := able(Grid(type="nvfp4"), "nvfp4")):
        both = {"weights": {"type": "nvfp4"}, "activations": {"type": "nvfp4"}, "method": "gptq", "formats": [format]}
        yield "nvfp4", both, f"4-bit floats, which {need.gpu} multiplies; faster than integers, with rounded inputs"


def _gguf(room: int | None) -> Iterator[tuple[str, dict[str, Any], str]]:
    base = {"formats": [_GGUF], "method": "gptq"}
    yield "q8_0", base | {"gguf": {"type": "Q8_0"}}, "8 bits, almost as good as 16 bit"
    if room is not None:
        yield _MIXED, base | {"gguf": {"budget": {"bytes": max(room, 1)}}}, "each tensor in the type that costs least"
    for kind, bits in (("Q6_K", 6), ("Q5_K_M", 5), ("Q4_K_M", 4), ("Q3_K_M", 3), ("Q2_K", 2)):
        yield kind.lower(), base | {"gguf": {"type": kind}}, f"llama.cpp's mix of about {bits} bits"


def _plain(formats: Sequence[str], target: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recipes of which nearly every model takes one, to learn its sizes: transformers loads no experts that are written
    one by one, which the target may, and no format but GPTQ holds the weights of a Conv1D."""
    if list(formats) == [_GGUF]:
        return [{"formats": [_GGUF], "gguf": {"type": "Q8_0"}, "method": "rtn"}]
    rows = {"weights": {"bits": 8, "group_size": -1}, "method": "rtn"}
    return [rows, rows | {"formats": ["gptq"]}, rows | {"targets": [dict(target)]}]


def _grid(bits: Any) -> Grid:
    """8 bits have one scale a row, which all kernels know; 2 bits need zeros and small groups."""
    if bits == 8:
        return Grid(bits=8, group_size=-1)
    return Grid(bits=bits, group_size=32 if bits == 2 else 64, symmetric=bits > 2)


def _stated(grid: Grid) -> dict[str, Any]:
    return grid.model_dump(mode="json", exclude_defaults=True) | {"bits": grid.bits}


def _document(grid: Grid, format: str) -> dict[str, Any]:
    return {"weights": _stated(grid), "method": "gptq"} | ({} if format == _FORMATS[0] else {"formats": [format]})


def _dtype(job: Job) -> str:
    return str(job.skeleton.dtype).removeprefix("torch.")


def _card(name: str) -> str:
    """The GPU of the table that is meant: RTX4090 and rtx-4090 are RTX 4090."""
    plain = {gpu: re.sub(r"[\s_-]", "", gpu).lower() for gpu in (name, *GPUS)}
    exact = [gpu for gpu in GPUS if plain[gpu] == plain[name]]
    near = exact or [gpu for gpu in GPUS if plain[name] in plain[gpu]]
    if len(near) != 1:
        raise BadInput(f"--gpu {name}: {'which of ' if near else 'not one of '}{', '.join(near or GPUS)}")
    return near[0]
