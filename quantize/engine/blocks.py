"""The decoder blocks of a job, one after another: calibrate, transform, round, tune, write to the journal."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..artifact.manifest import BlockRecord
from ..calibrate import kv_cache
from ..calibrate.block_pass import BlockPass, SharedInput
from ..calibrate.lanes import Lanes
from ..calibrate.runnable_block import shared_inputs
from ..calibrate.tokens import Tokens
from ..core import machine
from ..core.memory import doing, is_out_of_memory
from ..core.ranks import ALONE, Ranks
from ..core.transfers import Transfers, file_empty, host_empty
from ..formats import FORMATS
from ..models.block_arguments import BlockArguments, ModelArguments
from ..models.by_name import ByName
from ..models.placed_model import LinearLayer
from ..models.vetting import all_finite
from ..numbers.activations import columns_of
from ..numbers.grid import Inputs, QuantizedLinear
from ..numbers.types import Activations, Grid
from ..recipe import Gptq, Tuned
from .block_weights import weight_of
from .code_memory import CodeMemory
from .end_to_end import trains_end_to_end
from .job import Job
from .journal import FollowedJournal, Journal
from .lent_scales import lend_input_scales
from .rounding import BlockRounding, record
from .settings import BlockDone, Settings
from .transforms import BlockTransforms
from .tuning import Tuning


@machine.collecting_only_what_is_new()
def run_blocks(job: Job, tokens: Tokens | None, journal: Journal | FollowedJournal, settings: Settings) -> None:
    """Quantize each block that the journal does not hold yet; its outputs are the next block's inputs.

    tokens: the calibration text; not needed where the user's importance matrix stands in for it. On a GPU whose memory
    is used up in a block, the block is begun again with half as many tokens at once; not where several processes share
    the run, of which the others would wait.
    """
    skeleton = job.skeleton
    if len(journal.done) == skeleton.n_blocks:
        return
    what = "lower calibration.samples or calibration.seq_len" if tokens is not None else "free some, or use more"
    with journal, doing(lambda: _at_work(job, journal), what, skeleton.device):
        run = _Run(job, None if job.backend.importance else tokens, journal, settings.ranks, settings.work)
        settings.on_start(len(journal.done), skeleton.n_blocks)
        while len(journal.done) < skeleton.n_blocks:
            tried = run.batch_tokens
            try:
                for k, block in run.blocks(len(journal.done)):
                    run.block(k, block, settings)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not run.halves():
                    raise
            # Only here, where nothing refers to the failed attempt any more.
            if run.batch_tokens < tried:
                settings.on_note(
                    f"block {len(journal.done)}: out of memory with {tried} tokens at once; it goes on with "
                    f"{run.batch_tokens}"
                )
                machine.release_memory(skeleton.device)


def _at_work(job: Job, journal: Journal | FollowedJournal) -> str:
    return f"block {len(journal.done) + 1} of {job.skeleton.n_blocks} was quantized"


class _Run:
    """The blocks of one run, from the first one that is not finished.

    hidden: the states [samples, seq_len, hidden] that enter the next block, out of the rounded blocks; `reference`, for
    error correction and tuning, out of the original ones. Without calibration there are none. Of the samples each
    process has its own. arguments: the further ones of each block; without calibration only where linears with a common
    input must share a scale. folder: for the states where they do not fit in memory.
    """

    def __init__(
        self,
        job: Job,
        tokens: Tokens | None,
        journal: Journal | FollowedJournal,
        ranks: Ranks = ALONE,
        folder: Path = Path(),
    ) -> None:
        self._job, self._journal, self._skeleton, self._ranks = job, journal, job.skeleton, ranks
        self._samples, self._seq_len = (0, 1) if tokens is None else tokens.ids.shape
        self._room, self._folder = job.plan.room, folder
        if journal.batch_tokens is not None:
            self._room = replace(self._room, batch_tokens=journal.batch_tokens)
        self._transfers = Transfers(self._skeleton.device)
        self._caches = None if job.recipe.kv_cache is None else kv_cache.attentions(self._skeleton)
        self._transforms = BlockTransforms(job.recipe, self._skeleton)
        self.hidden, self._arguments = self._states(tokens)
        alone = not self.hidden and self._arguments is None and ranks.size == 1
        self._streams = alone and self._skeleton.device.type == "cpu" and job.reader is job.checkpoint
        self._codes = CodeMemory() if self._streams else None

    @property
    def batch_tokens(self) -> int:
        """Tokens that pass through a block at once."""
        return self._room.batch_tokens

    def blocks(self, start: int) -> Iterable[tuple[int, nn.Module]]:
        """Number and module of each block from `start` on, without weights where these are read as they are rounded."""
        if not self._streams:
            return self._skeleton.blocks(start)
        return ((k, self._skeleton.block(k)) for k in range(start, self._skeleton.n_blocks))

    def halves(self) -> bool:
        """Put half as many tokens through a block at once; False where that is not possible."""
        seq_len = self.hidden["hidden"].shape[1] if self.hidden else 0
        if not self._room.spare or self.batch_tokens < 2 * seq_len or not seq_len or self._ranks.size > 1:
            return False
        self._room = replace(self._room, batch_tokens=self.batch_tokens // 2)
        return True

    def block(self, k: int, block: nn.Module, settings: Settings) -> None:
        """Calibrate, transform, round and tune block `k`, and commit it to the journal."""
        started, job, method = time.monotonic(), self._job, self._job.recipe.method
        last, keep_final = k + 1 == self._skeleton.n_blocks, job.backend.keep_final
        linears = {x.name: x for x in job.linears if x.block == k}
        passing = self._arguments[k] if self._arguments else None
        grids = {x.module: grid for x in linears.values() if (grid := job.schemes[x.name]) is not None}
        states, restarts = self.hidden.get("hidden"), self._room.restarts
        changes = self._transforms.apply(k, block, grids, states, passing, self._lanes(states), restarts=restarts)
        kept = None
        if changes.parameters and trains_end_to_end(job):  # which measures errors against these weights
            kept = self._transfers.hand_over({n: weight_of(block, x).detach() for n, x in linears.items()})
        tuning = Tuning(method, k, block, linears, self.hidden) if isinstance(method, Tuned) else None
        cache = None if self._caches is None else kv_cache.Largest(*self._caches[k])
        whole = tuning is not None or cache is not None or not last or keep_final is not None
        leaving = self.hidden
        if self._room.spare and whole:
            leaving = {name: torch.empty_like(states) for name, states in self.hidden.items()}
        rounding = BlockRounding(
            job.recipe.rounder,
            job.schemes,
            block,
            self._ranks,
            runs_on=bool(self.hidden),
            stored=self._skeleton.weight_rows if self._streams else None,
            dtype=self._skeleton.served_dtype if self._skeleton.served_dtype != self._skeleton.dtype else None,
            codes=self._codes,
        )
        for inputs in self._inputs(block, linears.values(), passing, leaving if whole else None, cache):
            rounding.round(inputs, linears)
            del inputs  # before the next are summed up
        rounded, records = rounding.rounded, rounding.finish()
        lend_input_scales(rounded, records)
        leaving = dict(leaving)
        if tuning is not None and passing is not None:
            tuning.run(rounded, records, leaving, passing, self._skeleton.device)
        self._check_finite(leaving, k)
        self.hidden = leaving
        layers = tuple(records.get(name) or record(x, None) for name, x in linears.items())
        seconds = time.monotonic() - started
        tensors: dict[str, Tensor] = {}
        if self._ranks.leads:
            tensors = _block_tensors(job, k, block, rounded, changes.parameters)
        if cache is not None and job.recipe.kv_cache is not None:
            scales = cache.scales(job.recipe.kv_cache, self._ranks)
            named = zip(FORMATS[job.recipe.formats[0]].cache_suffixes, scales, strict=True)
            tensors |= {f"{cache.name}.{suffix}": scale for suffix, scale in named}
        if last and keep_final is not None:
            final = self._of_all_samples({"hidden": self.hidden["hidden"]})
            tensors |= keep_final(final["hidden"]) if self._ranks.leads else {}
        line = BlockRecord(block=k, seconds=round(seconds, 3), layers=layers, transforms=tuple(changes.records))
        dump = None
        if self.hidden and not last and self._ranks.tell(self._journal.keeps_hidden):
            carried = self._arguments.carried(k) if self._arguments else {}
            dump = self._transfers.hand_over(self._of_all_samples(self.hidden | carried))
        tensors_there = self._transfers.hand_over(tensors)
        self._journal.commit(tensors_there, line, self.batch_tokens, hidden=dump, transformed=kept)
        if self._codes is not None:
            self._codes.settle(tensors.values())
        if dump is not None and not self._room.spare:  # the next block would overwrite them
            self._journal.settle()
        machine.release_memory()
        errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
        blocks = self._skeleton.n_blocks
        settings.on_block(BlockDone(k + 1, blocks, sum(errors) / len(errors) if errors else None, seconds))

    def _states(self, tokens: Tokens | None) -> tuple[dict[str, Tensor], ModelArguments | None]:
        """`hidden` and `arguments`."""
        job, skeleton = self._job, self._skeleton
        shares = any(grid is not None and grid.shares_across_linears for grid in job.schemes.values())
        if tokens is None and (not shares or isinstance(skeleton, ByName)):
            return {}, None
        skeleton.open_shell()
        if tokens is None:
            arguments = skeleton.block_arguments(torch.zeros(1, 1, dtype=torch.long))
            skeleton.close_shell()
            return {}, arguments
        kept = self._kept_states(tokens)
        own = self._own(tokens.ids)
        if kept:
            hidden = {n: self._placed(states) for n, states in kept.items() if n in ("hidden", "reference")}
        else:
            hidden = {"hidden": skeleton.embed(own, self._memory)}
            self._check_finite(hidden, -1)
            if job.recipe.paired:
                hidden["reference"] = self._placed(hidden["hidden"])
        arguments = skeleton.block_arguments(own)
        skeleton.close_shell()
        if trains_end_to_end(job):
            arguments.refuse_gradients("end-to-end training", skeleton.config.model_type)
        if kept:
            arguments.restore(len(self._journal.done) - 1, kept)
        return hidden, arguments

    def _lanes(self, states: Tensor | None) -> Lanes | None:
        """How the samples are divided whose states [samples, seq_len, hidden], this process's, are given."""
        if states is None:
            return None
        return Lanes.of(self._samples, states.shape[1], self.batch_tokens, self._ranks)

    def _own(self, values: Tensor) -> Tensor:
        """This process's part of values [samples, …]."""
        if self._ranks.size == 1:
            return values
        return values[Lanes.of(self._samples, self._seq_len, self.batch_tokens, self._ranks).own()]

    def _kept_states(self, tokens: Tokens) -> dict[str, Tensor]:
        """What the journal has kept of the states of this process's samples; the blocks after them are done again."""
        kept = self._journal.hidden() if self._journal.done else {}
        self._journal.follow(*self._ranks.tell((len(self._journal.done), self._journal.batch_tokens)))
        names = self._ranks.tell(list(kept))
        return {name: self._own(self._ranks.tell(kept.get(name))) for name in names}

    def _of_all_samples(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors [samples, …] of all samples out of what each process has, for the leader; {} for the others."""
        if self._ranks.size == 1:
            return dict(own)
        whole: dict[str, Tensor] = {}
        for name, tensor in own.items():
            parts = self._ranks.collect(tensor.cpu())
            if parts:
                whole[name] = tensor.new_empty(self._samples, *tensor.shape[1:], device="cpu")
            for rank, part in enumerate(parts):
                there = replace(self._ranks, rank=rank)
                whole[name][Lanes.of(self._samples, self._seq_len, self.batch_tokens, there).own()] = part
        return whole

    def _check_finite(self, hidden: dict[str, Tensor], k: int) -> None:
        """Raise BadInput for NaN or inf in the hidden states of a process."""
        where = "the embedding" if k < 0 else f"block {k}"
        problem = f"activations that leave {where} hold NaN or inf; try bfloat16 or another text"
        self._ranks.agree(None if _finite(hidden, self._skeleton.device) else problem)

    def _memory(self, like: Tensor, samples: int) -> Tensor:
        """For hidden states of `samples` samples."""
        device, shape = self._skeleton.device, (samples, *like.shape[1:])
        if self._room.on_device:
            return torch.empty(shape, dtype=like.dtype, device=device)
        if self._room.on_disk:
            return file_empty(shape, like.dtype, self._folder)
        return host_empty(shape, like.dtype, device)

    def _placed(self, states: Tensor) -> Tensor:
        """A copy of hidden states, where they are to lie."""
        return self._memory(states, states.shape[0]).copy_(states)

    def _inputs(
        self,
        block: nn.Module,
        linears: Iterable[LinearLayer],
        arguments: BlockArguments | None,
        leaving: Mapping[str, Tensor] | None,
        cache: kv_cache.Largest | None,
    ) -> Iterable[list[SharedInput]]:
        """The inputs that linears share, one after another or several at once. leaving: where the states that leave
        the block are put; None if it need not be run to its end.
        """
        job, states = self._job, self.hidden.get("hidden")
        wanted = {x.name: block.get_submodule(x.module) for x in linears if job.schemes[x.name] is not None}
        inputs = {name: _rounding(job, grid) for name in wanted if (grid := job.schemes[name]) is not None}
        if states is None or arguments is None:
            return ([shared] for shared in _uncalibrated(job, block, wanted, arguments, inputs))
        into: Mapping[str, Tensor] = {} if leaving is None else leaving
        return BlockPass(
            block,
            states,
            arguments,
            wanted,
            device=self._skeleton.device,
            lanes=Lanes.of(self._samples, states.shape[1], self.batch_tokens, self._ranks),
            keep=leaving is not None,
            reference=self.hidden.get("reference"),
            leaving=into.get("hidden"),
            reference_leaving=into.get("reference"),
            activations=inputs,
            restarts=self._room.restarts,
            all_experts=job.recipe.calibration.all_experts,
            moved=isinstance(job.recipe.rounder, Gptq),
            begin=(lambda: None) if cache is None else cache.start,
        ).together()


def _rounding(job: Job, grid: Grid) -> tuple[Activations, int] | None:
    """How the inputs of a linear with such weights are rounded, and how many columns share a dynamic scale."""
    if job.recipe.activations is None:
        return None
    spec = job.recipe.activations.beside(grid)
    return spec, columns_of(spec, grid)


def _uncalibrated(
    job: Job,
    block: nn.Module,
    wanted: Mapping[str, nn.Module],
    arguments: BlockArguments | None,
    inputs: Mapping[str, tuple[Activations, int] | None],
) -> list[SharedInput]:
    """What is known of inputs without a calibration: an importance matrix, and which linears must share a scale."""
    together: list[tuple[str, ...]] = [(name,) for name in wanted]
    if isinstance(job.skeleton, ByName):
        together = job.skeleton.together(wanted)
    elif arguments is not None:
        together = shared_inputs(block, arguments.example(job.skeleton.dtype), arguments, wanted)
        together += [(name,) for name in wanted if not any(name in names for names in together)]
    there = job.skeleton.device
    weighed = {name: moment.to(there) for name, moment in job.backend.importance.items() if name in wanted}
    rounded = {name: None if how is None else Inputs(*how) for name, how in inputs.items()}
    return [SharedInput(names, moment=weighed.get(names[0]), inputs=rounded[names[0]]) for names in together]


def _finite(hidden: dict[str, Tensor], device: torch.device) -> bool:
    """Whether no hidden state is NaN or inf; a GPU is waited for once."""
    if device.type == "cpu":
        return all(map(all_finite, hidden.values()))
    parts = [part.to(device, non_blocking=True) for states in hidden.values() for part in torch.split(states, 16)]
    return not parts or bool(torch.stack([end for part in parts for end in part.aminmax()]).isfinite().all())


def _block_tensors(
    job: Job,
    k: int,
    block: nn.Module,
    rounded: dict[str, QuantizedLinear],
    changed: set[str],
) -> dict[str, Tensor]:
    """All tensors of block `k` by on-disk name: packed linears and the other parameters, of which a transform has
    replaced those in `changed`.
    """
    format = FORMATS[job.recipe.formats[0]]
    tensors: dict[str, Tensor] = {}
    for name, linear in rounded.items():
        tensors |= format.pack(name, linear)
    reader = job.skeleton.reader
    replaced = {n for name in rounded for kind in ("weight", "bias") for n in reader.on_disk(f"{name}.{kind}")}
    for name, disk in job.skeleton.written_with(k).items():
        if disk.removesuffix(".weight") in rounded:
            continue
        if name in changed or replaced & set(reader.on_disk(disk)):
            before = reader.read(disk)
            tensors[disk] = block.get_parameter(name).detach().to(before.dtype) if name in changed else before
        else:
            tensors |= {n: reader.read(n) for n in reader.on_disk(disk) if n not in tensors}
    return tensors
