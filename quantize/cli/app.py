"""The application: order of the commands, errors in one line.

Exit codes: 0 fine, 1 failed, 2 bad input, 3 a gate was missed, 4 a gate is too close to call.
"""

import difflib
import errno
import gc
import os
import re
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..core.errors import BadInput, LostRank, OutOfMemory
from .printing import say, show
from .ranks import LAUNCHED, LOST

_ORDER = (  # of the commands in the help
    "run", "fit", "sweep", "recommend", "plan", "quantize", "export", "verify", "eval", "smoke", "check",
    "report", "compare", "card", "publish", "convert", "gguf", "reproduce", "recipes", "schema", "doctor",
)  # fmt: skip


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: _ORDER.index(name) if name in _ORDER else 99)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Turn a Hugging Face model into a quantized, measured, servable release, by one YAML recipe.",
)
_INTERRUPTED = 130
_RESUMED = ("run", "quantize", "sweep")  # commands that continue where they were interrupted
_OF_THE_MACHINE = {  # errors of the machine, not mistakes of ours: no traceback
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "EMFILE", "ENFILE", "ESTALE", "ENXIO")
    if hasattr(errno, name)
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust, safetensors' for one, say the machine's number
_OF_THE_PATH = {
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}  # errors of a path that was given


def _tell_version(wanted: bool) -> None:
    if wanted:
        show(f"quantpress {version('quantpress')}")
        raise typer.Exit


@app.callback()
def _options(
    told: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="print the installed version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; a mistake of the user is one line on stderr and exit code 2."""
    # Before torch is imported: its threads must not spin while they wait, which slows a busy machine down, and large
    # tensors shall use huge pages where the system gives them on request.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    gc.set_threshold(100_000, 20, 100)  # imports create millions of objects and hardly any garbage
    try:
        status = app(standalone_mode=False)
        if status == _INTERRUPTED:  # typer turns Ctrl-C into this status
            raise KeyboardInterrupt
        sys.exit(status if isinstance(status, int) else 0)
    except BadInput as error:
        _fail(str(error), 2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail(_stopped(sys.argv[1:]), _INTERRUPTED)
    except LostRank as error:
        if LAUNCHED in os.environ:
            sys.exit(LOST)
        if os.environ.get("RANK") == "0":
            _fail(f"{error}; {_goes_on(sys.argv[1:])}", 1)
        sys.exit(1)  # the first process speaks
    except OutOfMemory as error:
        _fail(f"{error}; {_goes_on(sys.argv[1:])}", 1)
    except BrokenPipeError:  # the reader of our output has gone away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail_without_memory(error)
        if error.errno in _OF_THE_PATH and error.filename:
            _fail(f"{error.filename}: {error.strerror}; give another path", 2)
        if error.errno not in _OF_THE_MACHINE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror}; once that is fixed, {_goes_on(sys.argv[1:])}", 1)
    except Exception as error:
        if _was_interrupted(error):
            _fail(_stopped(sys.argv[1:]), _INTERRUPTED)
        _fail_without_memory(error)
        if isinstance(error, _usage_error()):
            said = error.format_message()  # type: ignore[attr-defined]
            if not said:  # no command: the help was shown
                sys.exit(2)
            _fail(f"{said}{_meant(said)} (see quantpress --help)", 2)
        number = _OS_ERROR.search(str(error))
        if number is not None and int(number[1]) in _OF_THE_MACHINE:
            _fail(f"{os.strerror(int(number[1]))}; once that is fixed, {_goes_on(sys.argv[1:])}", 1)
        raise


def _fail_without_memory(error: Exception) -> None:
    """End in one line for memory that ended where nothing says what was being done."""
    from ..core.memory import is_out_of_memory, told  # they know torch's errors, and torch takes seconds to import

    if is_out_of_memory(error):
        words = [word for word in sys.argv[1:2] if not word.startswith("-")]
        doing = f"{' '.join(['quantpress', *words])} was at work"
        _fail(f"{told(error, doing, 'free some, or use a machine with more')}; {_goes_on(sys.argv[1:])}", 1)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused it: transformers reports an interrupted import as a missing module."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _stopped(arguments: list[str]) -> str:
    if arguments[:1] == ["eval"]:
        return "stopped; what was measured until then is in eval/results.json (complete: false)"
    return f"stopped; {_goes_on(arguments)}" if arguments[:1] and arguments[0] in _RESUMED else "stopped"


def _goes_on(arguments: list[str]) -> str:
    """How the command is resumed."""
    if not arguments or arguments[0] not in _RESUMED:
        return "run the command again"
    same = "the same command without --overwrite" if "--overwrite" in arguments else "the same command"
    return f"{same} continues from what is finished"


def _usage_error() -> type[Exception]:
    """The base of what typer raises for a wrong command line: click's ClickException, or typer's own copy of it."""
    return next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _meant(said: str) -> str:
    """The command nearest to one that does not exist, where typer has not named it already."""
    unknown = re.match(r"No such command '(.*?)'", said)
    near = difflib.get_close_matches(unknown[1], _ORDER, n=1) if unknown and "id you mean" not in said else []
    return f" Did you mean {near[0]!r}?" if near else ""


def _fail(message: str, code: int) -> None:
    say(f"quantpress: {BadInput(message)}")  # one line, whatever is in it
    sys.exit(code)
