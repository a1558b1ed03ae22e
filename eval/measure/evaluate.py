"""The evaluation of one artifact against its original, section by section; each is saved as soon as it is measured."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantpress.artifact.artifact import Artifact, open_artifact, open_original
from quantpress.artifact.original import OriginalCheckpoint
from quantpress.calibrate.bos import BosTrial, try_bos
from quantpress.calibrate.texts import load_documents
from quantpress.calibrate.tokens import bos_id, check_ids, open_tokenizer
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.core.files import fingerprint, remembered
from quantpress.core.untrusted import read_json
from quantpress.exports.serving.reference import Reference
from quantpress.models.architecture import is_unknown, unknown_family
from quantpress.models.skeleton import Skeleton
from quantpress.recipe import Calibration, Evaluation, Gates
from quantpress.recipe.evaluation import UntilClear

from . import capacity
from .baselines import unigram_nll
from .divergence import Windows, compare, divergence, last_hidden, perplexity_increase, quality, windows
from .domains import DomainText, load, result
from .endpoint import ServedModel, served_nll
from .gates import judge
from .generations import side_by_side
from .likelihood import Room, Scorer
from .pairing import check_same_model, unplaced
from .reference import reference
from .results import Results
from .sections import Efficiency, Subject
from .served_reference import PASSES, Models, by_prompt, make_reference
from .speed import time_model
from .task_scores import Tasks, TaskScores, compare_tasks, kept
from .until_clear import more_questions, more_windows


@dataclass(frozen=True)
class Prepared:
    """Everything an evaluation reads apart from the two models, found and checked before they run.

    cut: as many windows of the text; raises BadInput where it is too short.
    """

    wanted: Evaluation
    text: Windows
    cut: Callable[[int], Windows]
    tokenizer: Any
    bos_trial: BosTrial | None
    tasks: Tasks | None
    cache: Path
    domains: Sequence[DomainText] = ()
    notes: tuple[str, ...] = ()

    @property
    def bos(self) -> int | None:
        return bos_id(self.tokenizer, self.wanted.bos)


@dataclass(frozen=True)
class Watch:
    """Callbacks of an evaluation.

    step(section, done, total): progress; total is 0 where it is not known. save(results): after each section, with
    `complete` false until the last. keep(reference): what servers of the artifact are held against; None: not made.
    """

    step: Callable[[str, int, int], None] = lambda section, done, total: None
    save: Callable[[Results], None] = lambda results: None
    keep: Callable[[Reference], None] | None = None


def positions_of(model: Path) -> int | None:
    """The longest context of the model in this folder, in tokens, by its config; None where that does not say."""
    config = read_json(model / "config.json")
    return config.get("max_position_embeddings") or config.get("n_positions")


def prepare(
    original: Path,
    wanted: Evaluation,
    cache: Path,
    trust_remote_code: bool = False,
    calibration: Calibration | None = None,
) -> Prepared:
    """Read the texts, the tokenizer and the tasks. calibration: for the text beside it; None for no such text.

    Raises BadInput for text that is missing or too short, windows longer than the model's context, a missing tokenizer,
    tasks that are unknown or have no data, and a family that transformers does not have.
    """
    config = read_json(original / "config.json")
    if is_unknown(config):
        raise BadInput(f"{unknown_family(config)}: nothing can be measured of it here; set `evaluation: null`")
    positions = positions_of(original)
    if positions is not None and wanted.window > positions:
        raise BadInput(
            f"evaluation.window {wanted.window} is more than the model's {positions} positions; "
            f"--set evaluation.window={positions} measures within them"
        )
    if positions is not None and wanted.prompts and wanted.new_tokens >= positions:
        raise BadInput(f"evaluation.new_tokens {wanted.new_tokens}: the model has {positions} positions in all")
    text = load_documents(wanted, cache=cache, role="evaluation")
    tokenizer = open_tokenizer(original, trust_remote_code)
    whole = "\n\n".join(text.documents)
    trial = try_bos(original, lambda: open_original(original, machine.device())[1], tokenizer, whole, wanted.bos, cache)
    wanted = wanted if trial is None else wanted.model_copy(update={"bos": trial.bos})
    rows = config.get("vocab_size")

    def cut(count: int) -> Windows:
        found = windows(tokenizer, whole, text.source, wanted.model_copy(update={"windows": count}))
        if isinstance(rows, int):
            check_ids(found.tokens.ids, rows, text.source)
        return found

    notes: list[str] = []
    domains = [] if calibration is None else load(wanted, calibration, tokenizer, cache, notes.append)
    for domain in domains:
        if positions is not None and domain.text.tokens.ids.shape[1] > positions:
            raise BadInput(f"evaluation.domains, {domain.name}: windows longer than the model's {positions} positions")
    tasks = Tasks(wanted.tasks) if wanted.tasks else None
    return Prepared(wanted, cut(wanted.windows), cut, tokenizer, trial, tasks, cache, domains, tuple(notes))


def evaluate(
    original: Path,
    artifact: Path,
    prepared: Prepared,
    gates: Gates,
    watch: Watch = Watch(),
    subject: Subject | None = None,
) -> Results:
    """Everything that the recipe asks for, of the artifact (a folder or a .gguf file) against the original's folder.

    What could not be measured is in `notes`, with the reason. Raises BadInput when the two are not the same model.
    """
    return _Evaluation(original, prepared, gates, watch).of_folder(artifact, subject)


def evaluate_served(
    original: Path,
    server: ServedModel,
    prepared: Prepared,
    gates: Gates,
    watch: Watch = Watch(),
    subject: Subject | None = None,
) -> Results:
    """Perplexity and tasks of a served model against the original's folder; a server exposes too little for the rest.

    Both models see the same tokens: what does not fit the server is cut for the original too. Raises BadInput for
    windows that the server would refuse.
    """
    server.check_window(prepared.wanted.window)
    return _Evaluation(original, prepared, gates, watch).of_server(server, subject)


class _Evaluation:
    """One evaluation in progress, with the sections measured so far."""

    def __init__(self, original: Path, prepared: Prepared, gates: Gates, watch: Watch) -> None:
        self._folder, self._prepared, self._gates, self._watch = original, prepared, gates, watch
        self._device, self._started = machine.device(), time.monotonic()
        source, plain = self._original()
        self._quantization, self._vocabulary = source.quantization, int(plain.config.vocab_size)
        self._results = Results(
            complete=False, dtype=str(plain.dtype).removeprefix("torch."), device=str(self._device), seconds=0.0,
            notes=(*source.notes, *prepared.notes),
        )  # fmt: skip

    def of_folder(self, artifact: Path, subject: Subject | None) -> Results:
        _, plain = self._original()
        reader, quantized = open_artifact(artifact, self._device, plain.dtype)
        check_same_model(plain, quantized, artifact, self._folder)
        if (line := unplaced(plain, quantized, artifact)) is not None:
            self._note(line)
        if subject is not None and subject.kind != "run":  # known once it is opened
            kind = "checkpoint" if reader.format is None else "artifact"
            subject = subject.model_copy(update={"kind": kind, "format": reader.format})
        self._add(subject=subject)
        self._text(reader, quantized)
        self._domains(quantized)
        self._capacity(reader, quantized)
        self._reference(artifact, quantized)
        self._tasks(self._prepared.tasks, lambda: self._scorer(artifact))
        if (until := self._prepared.wanted.until_clear) is not None:
            self._go_on(artifact, until)
        self._generations(artifact)
        self._timing(artifact)
        return self._add(complete=True)

    def of_server(self, server: ServedModel, subject: Subject | None) -> Results:
        self._add(subject=subject)
        text = self._prepared.text
        reader, plain = self._original()
        hidden, _ = reference(plain, self._folder, text, self._prepared.cache, self._blocks(plain.n_blocks))
        before = compare((plain, plain), (hidden, hidden), text).original_nll
        after = served_nll(server, text, lambda done, total: self._watch.step("served text", done, total))
        self._quality(before, after, reader.total_bytes, 0)
        self._tasks(self._prepared.tasks, lambda: server, server.room)
        return self._add(complete=True)

    def _go_on(self, artifact: Path, until: UntilClear) -> None:
        """Measure more windows and ask more questions until no gate is too close to call, or the limits are reached."""
        try:
            while (count := more_windows(self._results, until)) is not None:
                self._prepared = replace(self._prepared, text=self._prepared.cut(count))
                self._text(*open_artifact(artifact, self._device, getattr(torch, self._results.dtype)))
        except BadInput as error:  # the text has no more windows
            self._note(f"until_clear: {error}")
        tasks = self._prepared.wanted.tasks
        while again := more_questions(self._results, until, tasks):
            self._tasks(Tasks(again), lambda: self._scorer(artifact))
            longer = {task.label: task for task in again}
            tasks = tuple(longer.get(task.label, task) for task in tasks)

    def _text(self, reader: Artifact, quantized: Skeleton) -> None:
        text, cache = self._prepared.text, self._prepared.cache
        source, plain = self._original()
        on_block = self._blocks(plain.n_blocks + quantized.n_blocks)
        hidden, noise = reference(plain, self._folder, text, cache, on_block)
        scores = compare((plain, quantized), (hidden, last_hidden(quantized, text.tokens.ids, on_block)), text)
        self._quality(
            scores.original_nll, scores.artifact_nll, source.total_bytes, reader.total_bytes,
            divergence=divergence(scores, noise),
        )  # fmt: skip

    def _domains(self, quantized: Skeleton) -> None:
        cache, done = self._prepared.cache, []
        for domain in self._prepared.domains:
            plain = self._original()[1]
            on_block = self._blocks(plain.n_blocks + quantized.n_blocks, f"text, {domain.name}")
            hidden, _ = reference(plain, self._folder, domain.text, cache, on_block, noise=False)
            other = last_hidden(quantized, domain.text.tokens.ids, on_block)
            done.append(result(domain.name, domain.text, compare((plain, quantized), (hidden, other), domain.text)))
        self._add(domains=tuple(done))

    def _quality(self, before: Any, after: Any, original_bytes: int, bytes: int, **more: Any) -> None:
        text = self._prepared.text
        for who, nll in (("original", before), ("artifact", after)):
            if not np.isfinite(nll).all():
                raise BadInput(
                    f"the {who}'s probabilities of the text hold NaN or inf in {self._results.dtype}; "
                    "its weights or activations are too large for that type"
                )
        increase, interval = perplexity_increase(before, after, text)
        trial = self._prepared.bos_trial
        record = text.record().model_copy(update={
            "bos_tried": None if trial is None else (trial.after_bos, trial.without), "vocabulary": self._vocabulary,
            "unigram_nll": unigram_nll(text.targets(), self._vocabulary),
        })  # fmt: skip
        self._add(
            text=record, original=quality(before, text, original_bytes), artifact=quality(after, text, bytes),
            perplexity_increase=increase, perplexity_increase_interval=interval, **more,
        )  # fmt: skip

    def _capacity(self, reader: Artifact, quantized: Skeleton) -> None:
        wanted = self._prepared.wanted.efficiency
        count = sum(p.numel() for p in quantized.model.parameters())
        count += sum(math.prod(reader.shape(name)) for name in quantized.unused)  # they are among the bytes
        held = capacity.cache(quantized.config, reader.kv_cache, self._results.dtype, wanted.context)
        self._add(
            efficiency=Efficiency(
                bytes=reader.total_bytes,
                original_bytes=self._original()[0].total_bytes,
                parameters=count,
                bits_per_parameter=reader.total_bytes * 8 / count,
                bits_per_weight=reader.bits_per_weight(),
                cache=held,
                fits=capacity.fits(wanted.gpus, reader.total_bytes, held),
            )
        )

    def _reference(self, artifact: Path, quantized: Skeleton) -> None:
        if self._watch.keep is None:
            return
        models = Models(self._folder, artifact, quantized.dtype, self._prepared.tokenizer, self._prepared.cache)
        on_block = self._blocks(PASSES * quantized.n_blocks, "reference")
        reference = make_reference(models, self._results, on_block)
        self._watch.keep(reference)
        self._add(prompts=by_prompt(reference))

    def _scorer(self, artifact: Path) -> Scorer:
        return Scorer(self._open(artifact), self._prepared.tokenizer, self._steps("tasks"))

    def _tasks(self, tasks: Tasks | None, answers: Callable[[], Any], room: Room | None = None) -> None:
        """The results of `tasks`, in place of earlier ones. room: that of the artifact, where it has less than the
        original.
        """
        if tasks is None:
            return
        from .lm_eval_model import LmEvalModel

        def ask(answers: Any) -> list[TaskScores]:
            return tasks.run(LmEvalModel(answers, self._prepared.tokenizer, self._prepared.bos))

        def ask_original() -> list[TaskScores]:
            return ask(Scorer(self._original()[1], self._prepared.tokenizer, self._steps("tasks, original"), room))

        what = [machine.libraries(), *self._known_as, self._prepared.bos]
        what += [] if room is None else [room.scored, room.written]
        before = kept(self._prepared.cache / "tasks", tasks, what, ask_original)
        found = compare_tasks(ask(answers()), before)
        asked = {task.task for task in found}
        self._add(tasks=(*(task for task in self._results.tasks if task.task not in asked), *found))

    def _generations(self, artifact: Path) -> None:
        wanted, tokenizer = self._prepared.wanted, self._prepared.tokenizer
        if not wanted.prompts:
            return

        def write(opened: Callable[[], Skeleton], name: str) -> Callable[..., list[list[int]]]:
            # Opened in its turn and dropped after it, so that two whole models are never in memory at once.
            return lambda prompts, new_tokens: Scorer(opened(), tokenizer, self._steps(f"continuations, {name}")).write(
                prompts, new_tokens
            )

        try:
            what = [machine.libraries(), *self._known_as]
            asked, folder = write(lambda: self._original()[1], "original"), self._prepared.cache / "continuations"

            def original(*given: Any) -> list[list[int]]:
                kept: list[list[int]] = remembered(folder, [*what, *given], lambda: asked(*given))
                return kept

            pair = original, write(lambda: self._open(artifact), "artifact")
            self._add(generations=side_by_side(*pair, tokenizer, self._prepared.bos, wanted.prompts, wanted.new_tokens))
        except BadInput as error:
            self._note(f"continuations: {error}")

    def _timing(self, artifact: Path) -> None:
        wanted = self._prepared.wanted.efficiency
        if wanted.timing is None or self._results.efficiency is None:
            return
        try:
            self._watch.step("timing, artifact", 0, 0)
            own = time_model(artifact, wanted.timing, self._results.dtype)
            self._watch.step("timing, original", 0, 0)
            before = time_model(self._folder, wanted.timing, self._results.dtype, is_original=True)
        except BadInput as error:
            self._note(f"timing: {error}")
            return
        price = None if wanted.price_per_hour is None else capacity.cost(wanted.price_per_hour, own)
        more = {"runtime": own, "original_runtime": before, "cost": price}
        self._add(efficiency=self._results.efficiency.model_copy(update=more))

    def _add(self, **sections: Any) -> Results:
        """The results with these sections, judged and saved."""
        seconds = time.monotonic() - self._started
        results = self._results.model_copy(update=sections | {"seconds": seconds})
        self._results = results.model_copy(update={"gates": judge(self._gates, results)})
        self._watch.save(self._results)
        return self._results

    def _note(self, line: str) -> None:
        self._add(notes=(*self._results.notes, line))

    @property
    def _known_as(self) -> list[str]:
        """The original in the keys of caches."""
        how = [] if self._quantization is None else [f"dequantized from {self._quantization}"]
        return [fingerprint(self._folder), self._results.dtype, self._results.device, *how]

    def _original(self) -> tuple[OriginalCheckpoint, Skeleton]:
        return open_original(self._folder, self._device)

    def _open(self, folder: Path) -> Skeleton:
        return open_artifact(folder, self._device, getattr(torch, self._results.dtype))[1]

    def _steps(self, section: str) -> Callable[[int, int], None]:
        return lambda done, total: self._watch.step(section, done, total)

    def _blocks(self, total: int, section: str = "text, both models") -> Callable[[], None]:
        """A callback that counts the blocks of a section."""
        done = 0

        def on_block() -> None:
            nonlocal done
            done += 1
            self._watch.step(section, done, total)

        return on_block
