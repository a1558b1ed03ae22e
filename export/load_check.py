"""Will a target load the artifact? Answered by the real server, else by its own parser, else by the contract."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from quantpress.calibrate.tokens import open_tokenizer
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.gguf.chat import template_arguments
from quantpress.gguf.reader import gguf_files

from . import contracts
from .package import find_artifact
from .servers import launchers
from .servers.loader import CannotAsk, ParserQuestion
from .servers.served_model import ServedModel
from .servers.target_settings import ServerSettings
from .serving.against_reference import hold
from .serving.client import Client
from .serving.process import ServerFailed, ServerTooSlow, inherited
from .serving.record import Check
from .serving.reference import find_reference, read_reference
from .serving.starting import Options, Running, installed, interpreter, serve

Way = Literal["server", "parser", "contract"]
_PARSER_SECONDS = 600
_LENGTH = 1024  # tokens of prompt and answer, where the target does not set them


@dataclass(frozen=True)
class LoadAnswer:
    """loads: whether the target will load the artifact. way: what answered, `by`: the same in words; reason: why not.

    passed_over: stronger ways that could not be used, each with the reason.
    """

    loads: bool
    way: Way
    by: str
    reason: str = ""
    passed_over: tuple[str, ...] = ()


def will_load(
    where: Path,
    target: ServerSettings,
    *,
    python: str | None = None,
    way: Way | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> LoadAnswer:
    """Ask in the strongest way available here, or in `way`.

    where: a run or an artifact folder; python: the interpreter that has the server. What the contract refuses counts as
    refused unless the real server loads it. Raises BadInput when `way` cannot be used.
    """
    folder = find_artifact(where)
    model = contracts.of_folder(folder)
    refused = contracts.problems(target, model)
    label = target.loader.label
    passed_over: list[str] = []
    for name, ask in (("server", _by_server), ("parser", _by_parser)):
        if way not in (None, name):
            continue
        try:
            by, reason = ask(folder, target, model, python, tell)
        except CannotAsk as why:
            if way == name:
                raise BadInput(f"--way {name}: {why}") from None
            passed_over.append(f"{name}: {why}")
            continue
        if name == "server" or reason or not refused:
            return LoadAnswer(not reason, "server" if name == "server" else "parser", by, reason, tuple(passed_over))
        passed_over.append(f"{by} has no objection")
    by = f"quantpress's table of what {label} loads"
    return LoadAnswer(not refused, "contract", by, contracts.sentence(refused) if refused else "", tuple(passed_over))


def _by_server(
    folder: Path, target: ServerSettings, model: ServedModel, python: str | None, tell: Callable[[str], None]
) -> tuple[str, str]:
    """Start the server. Returns what was asked, and why it did not load ("" when it did)."""
    launcher, device = launchers().get(target.name), machine.device().type
    if launcher is None:
        raise CannotAsk(f"{target.loader.label} is not a server that is started here")
    if target.required_device not in (None, device):
        raise CannotAsk(f"the target is on {target.required_device}, and this machine has {device}")
    if target.gpus > 1:
        raise CannotAsk("a server over several devices is not started here")
    if installed(launcher, python) is None:
        raise CannotAsk(f"{launcher.name} is not installed; {launcher.install}")
    gguf = gguf_files(folder)
    if (launcher.reads == "gguf") != bool(gguf):
        raise CannotAsk(f"{launcher.name} reads {launcher.reads} artifacts, and this is not one")
    length = min(target.max_model_len or _LENGTH, model.positions or _LENGTH)
    said = template_arguments(open_tokenizer(folder)) if (folder / "tokenizer_config.json").is_file() else {}
    options = Options(python, None, min(target.max_num_seqs, 4), length)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with serve(launcher, gguf[0] if gguf else folder, Path(scratch) / "log", options, tell, said) as running:
                by = f"the real server ({running.version}), healthy after {running.load_seconds or 0:.0f} s"
                return by, _unlike_the_evaluated(folder, running, length)
        except ServerTooSlow:
            late = f"{launcher.name} was not healthy within {options.deadline_s:.0f} s, which is no answer"
            raise CannotAsk(late) from None
        except ServerFailed as error:
            return f"the real server ({installed(launcher, python)})", str(error)


def _unlike_the_evaluated(folder: Path, running: Running, context: int) -> str:
    """How the served model differs from what the run evaluated; "" where it does not, or there is no reference."""
    file = find_reference(folder)
    if file is None:
        return ""
    checks: list[Check] = []
    with Client(running.url, running.model) as client:
        hold(client, read_reference(file), context, running.lacks, checks.append)
    return "; ".join(f"{check.name}: {check.reason}" for check in checks if check.status == "fail")


def _by_parser(
    folder: Path, target: ServerSettings, model: ServedModel, python: str | None, tell: Callable[[str], None]
) -> tuple[str, str]:
    """Ask the loader's own classes. Returns what was asked, and why it refuses ("" when it does not)."""
    loader = target.loader
    if loader.parse is None:
        raise CannotAsk(f"{loader.label} has no parser that runs here")
    return loader.parse(ParserQuestion(folder, model, target.gpus, target.max_model_len, partial(_run, python)))


def _run(python: str | None, server: str, script: Path, *arguments: str) -> dict[str, Any]:
    """The JSON object that `script` prints, run by `python` or the Python that has `server`."""
    try:
        found, _ = interpreter(launchers()[server], python)
    except BadInput as why:
        raise CannotAsk(str(why)) from None
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [found, "-I", str(script), *arguments]  # -I: the modules beside the script are not to be imported
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PARSER_SECONDS, env=inherited(os.environ) | quiet,
            cwd=tempfile.gettempdir(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotAsk(f"{found} could not be asked: {error}") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CannotAsk(f"{found} could not be asked: {last}") from None
    return answer
