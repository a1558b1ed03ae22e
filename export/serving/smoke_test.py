"""The smoke test of one artifact on one server, from start to record."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from quantpress.calibrate.tokens import open_tokenizer
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.engine.sources import resolve
from quantpress.gguf.chat import template_arguments
from quantpress.models.architecture import text_config
from quantpress.models.checkpoint import Checkpoint

from ..servers import launchers
from ..servers.server import Launcher
from . import agreement
from . import timing as figures
from .against_reference import CHECKS as REFERENCE_CHECKS
from .against_reference import hold
from .checks import CHECKS, CheckedServer, make
from .client import Client, ServerError
from .load import Wanted, measure_load
from .outcome import Failed, Skipped, made
from .process import ServerFailed
from .record import Against, Agreement, Check, Load, Serving
from .reference import Reference
from .starting import DEFAULT_CONTEXT, Options, Running, interpreter, reach, serve

_SMALLEST_CONTEXT = 64  # tokens; below it the prompts themselves do not fit


@dataclass(frozen=True)
class Listener:
    """Callbacks during the test: a line of progress, and each check as it is made."""

    line: Callable[[str], None] = lambda text: None
    check: Callable[[Check], None] = lambda check: None


@dataclass(frozen=True)
class _Served:
    """The artifact under test: what the server loads (`artifact`), and the folder that our own forward reads."""

    artifact: Path
    folder: Path
    tokenizer: Any
    context: int  # tokens of prompt and answer
    options: Options
    reference: Reference | None

    @property
    def is_gguf(self) -> bool:
        return self.artifact.suffix == ".gguf"


def smoke(
    artifact: Path,
    server: str | Launcher,
    out: Path,
    options: Options,
    cache: Path,
    listener: Listener | None = None,
    reference: Reference | None = None,
    files: Check | None = None,
) -> Serving:
    """Test `artifact` (a folder or a .gguf file); returns the record, which is also written to the run folder `out`.

    server: a launcher or its name, or `url` for the server that runs at options.url. The server's log goes to
    out/eval. reference: what the server is held against beside our own forward. files: how the check of the artifact's
    checksums ended, which comes first. A server that does not start is a failed check. Raises BadInput for one that is
    not installed or does not load such an artifact.
    """
    listener = listener or Listener()
    row = _row(server, options)
    served = _prepared(artifact, options, cache, reference, started=row is not None and row.port is None)
    log = None if row is None else out / "eval" / f"serving-{row.name}.log"
    checks: list[Check] = []

    def note(check: Check) -> None:
        checks.append(check)
        listener.check(check)

    told = Listener(listener.line, note)
    state = _State()
    if files is not None:
        told.check(files)
    try:
        with _running(row, served, log, listener.line) as server_now:
            state.running = server_now
            _talk(row, server_now, served, told, state)
    except ServerFailed as error:
        told.check(Check(name="start", status="fail", reason=str(error), seconds=0))
        for name in (*CHECKS, *(REFERENCE_CHECKS if reference else ()), "agreement", "speed"):
            told.check(Check(name=name, status="skip", reason="the server did not start", seconds=0))
    else:
        told.check(made("agreement", partial(_agree, row, served, state), {}))
        if options.load is not None and options.original is not None and row is not None and log is not None:
            told.check(made("load, original", partial(_load_of_original, row, served, state, log, listener.line), {}))
    record = _record(row, served, state, checks, None if log is None else log.relative_to(out))
    record.write(out)
    return record


@dataclass
class _State:
    """What the test has found so far."""

    running: Running | None = None
    answers: list[agreement.Continuation] | ServerError | None = None
    agreed: Agreement | None = None
    against: Against | None = None
    speed: figures.Figures | None = None
    load: tuple[Load, ...] = ()
    peak_rss_bytes: int | None = None


def _row(server: str | Launcher, options: Options) -> Launcher | None:
    """The launcher of a server that is started here and is installed; None for a URL."""
    if isinstance(server, Launcher):
        return server
    if (server == "url") != (options.url is not None):
        raise BadInput("--server url and --url http://host:port go together")
    if server == "url":
        return None
    if server not in launchers():
        raise BadInput(f"server {server!r} is none of {', '.join(launchers())} and url")
    interpreter(launchers()[server], options.python)
    return launchers()[server]


def _prepared(artifact: Path, options: Options, cache: Path, reference: Reference | None, *, started: bool) -> _Served:
    """Open the artifact and choose the context, at most its model's; started: whether the server is started with it."""
    if not artifact.exists():
        raise BadInput(f"{artifact}: no such artifact")
    folder = resolve(str(artifact), cache=cache).path if artifact.suffix == ".gguf" else artifact
    config = text_config(Checkpoint(folder).config)
    most = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    wanted = options.max_model_len or (DEFAULT_CONTEXT if started else most)
    context = min(wanted, most)
    if context < _SMALLEST_CONTEXT:
        raise BadInput(f"{artifact}: a context of {context} tokens; the smoke test needs {_SMALLEST_CONTEXT}")
    return _Served(
        artifact, folder, open_tokenizer(folder), context, replace(options, max_model_len=context), reference
    )


@contextlib.contextmanager
def _running(row: Launcher | None, served: _Served, log: Path | None, tell: Callable[[str], None]) -> Iterator[Running]:
    if row is None or log is None:
        with reach(str(served.options.url), served.options.api_key, served.options.lacks) as found:
            yield found
    else:
        said = template_arguments(served.tokenizer)
        with serve(row, served.artifact, log, served.options, tell, said) as found:
            yield found


def _talk(row: Launcher | None, running: Running, served: _Served, told: Listener, state: _State) -> None:
    """Everything that needs the server: checks, answers to compare, speed. If the server dies, the rest fails."""
    key, own = served.options.api_key, running.child is not None
    if own:
        told.check(Check(name="start", status="pass", reason="healthy", seconds=running.load_seconds or 0))
    with Client(running.url, running.model, key, loopback=own) as client:
        if running.name not in launchers():
            with contextlib.suppress(ServerError):  # the checks report what is wrong
                running = replace(running, lacks={**running.lacks, **agreement.refused(client, served.tokenizer)})
        subject = CheckedServer(running, client, served.tokenizer, served.context, served.options.concurrency)
        make(subject, told.check)
        lacks = running.lacks
        if served.reference is not None:
            rounds = agreement.rounds_inputs(may=row is None or row.may_round_inputs)
            state.against = hold(
                client, served.reference, served.context, lacks, told.check, rounds_inputs=rounds or served.is_gguf
            )
        try:
            state.answers = agreement.ask(client, served.tokenizer, lacks)
        except ServerError as error:
            state.answers = error

        def speed() -> str:
            state.speed = found = figures.measure(client, served.options.concurrency)
            rates = ", ".join(f"{rate:.1f} tokens/s at {n}" for n, rate in found.tokens_per_second.items())
            return rates if found.ttft_ms is None else f"{rates}; first token after {found.ttft_ms:.0f} ms"

        told.check(made("speed", speed, {}))
        if served.options.load is not None:
            told.check(made("load", partial(_load, client, served.options.load, state, "artifact"), {}))
    if running.child is not None:
        if "memory" not in running.lacks:
            state.peak_rss_bytes = running.child.peak_rss_bytes
        if (status := running.child.ended()) is not None:
            reason = f"ended by itself with status {status}:\n{running.child.last_lines()}"
            told.check(Check(name="alive", status="fail", reason=reason, seconds=0))


def _load(client: Client, wanted: Wanted, state: _State, what: Literal["artifact", "original"]) -> str:
    found = measure_load(client, wanted).model_copy(update={"what": what})
    state.load += (found,)
    if not found.completed:
        raise Failed(f"none of {found.requests} requests was answered: {found.error}")
    first, token = found.ttft_ms, found.itl_ms
    return (
        f"{found.completed} of {found.requests} requests at {found.rate:g}/s answered, {found.goodput:.2f}/s within "
        f"{found.limit_ttft_ms:.0f} ms to the first token and {found.limit_tpot_ms:.0f} ms a token"
        + (f"; first token p50 {first.p50:.0f}, p99 {first.p99:.0f} ms" if first else "")
        + (f"; between chunks p50 {token.p50:.1f}, p99 {token.p99:.1f} ms" if token else "")
    )


def _load_of_original(row: Launcher, served: _Served, state: _State, log: Path, tell: Callable[[str], None]) -> str:
    """The same load on the original, once the artifact's server has ended."""
    options, log = served.options, log.with_name(f"{log.stem}-original.log")
    assert options.original is not None
    assert options.load is not None
    try:
        with (
            serve(row, options.original, log, options, tell) as running,
            Client(running.url, running.model, options.api_key) as client,
        ):
            return _load(client, options.load, state, "original")
    except (ServerFailed, BadInput) as error:
        raise Failed(str(error)) from None


def _agree(row: Launcher | None, served: _Served, state: _State) -> str:
    if isinstance(state.answers, ServerError):
        raise state.answers
    if not state.answers:
        raise Skipped("the server gives no token ids with log-probabilities: its text cannot be held to our forward")
    rounds = row is None or row.may_round_inputs
    tolerance = agreement.tolerance_for(served.artifact, served.folder, may_round_inputs=rounds)
    state.agreed = agreement.compare(served.folder, state.answers, tolerance)
    within, line = agreement.judged(state.agreed)
    if not within:
        raise Failed(line)
    return line


def _record(row: Launcher | None, served: _Served, state: _State, checks: list[Check], log: Path | None) -> Serving:
    running, found = state.running, state.speed
    return Serving(
        schema=1,
        server="url" if row is None else row.name,
        version=None if running is None else running.version,
        artifact=served.artifact.name,
        device=machine.describe(machine.device())["device"],
        command=() if running is None else running.command,
        verdict="FAILED" if any(check.status == "fail" for check in checks) else "PASSED",
        checks=tuple(checks),
        agreement=state.agreed,
        against=state.against,
        max_model_len=served.context,
        load_seconds=None if running is None else running.load_seconds,
        requests=0 if found is None else found.requests,
        prompt_tokens=None if found is None else found.prompt_tokens,
        ttft_ms=None if found is None else found.ttft_ms,
        itl_ms=None if found is None else found.itl_ms,
        tokens_per_second={} if found is None else found.tokens_per_second,
        peak_rss_bytes=state.peak_rss_bytes,
        load=state.load,
        log=None if log is None else str(log),
    )
