"""A tiny model, recipes for it and the commands on them, for the campaigns that disturb them."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..file_operations import Happens, code
from ..forked import Done, Started
from ..tiny import build, text

_DEBRIS = (".quantpress-*", "*.partial", ".*.tmp", ".*.new")
# What a finished run says of its clock and of its machine.
_TIMES = ("timing", "machine", "stages", "seconds", "date", "made")
_MEASURED = ("eval/", "report/")


@dataclass(frozen=True)
class Place:
    """A folder with a model, a text and recipes `a` and `b`; runs go into folders beside them."""

    folder: Path
    python: Started

    def prepare(self) -> None:
        build("llama", self.folder / "model", torch.bfloat16)
        (self.folder / "words.txt").write_text(text(3000))
        words = self.folder / "words.txt"
        for name, method in (("a", "gptq"), ("b", "rtn")):
            (self.folder / f"{name}.yaml").write_text(
                f"name: {name}\nmodel: {self.folder / 'model'}\nmethod: {method}\nweights: {{group_size: 32}}\n"
                + (f"calibration: {{source: {words}, samples: 4, seq_len: 32}}\n" if method == "gptq" else "")
                + f"evaluation: {{source: {words}, windows: 2, window: 32, new_tokens: 2, domains: []}}\n"
                "targets: [vllm]\n"
            )

    def quantize(self, out: Path, recipe: str = "a", *more: str) -> list[str]:
        return ["quantize", str(self.folder / f"{recipe}.yaml"), "--out", str(out), "--ignore-limits", *more]

    def disturbed(self, command: list[str], out: Path, number: int, happens: Happens) -> Done:
        """The command, to which something happens at its file operation `number` in `out`."""
        return self.python.run(command, self.before() + code(str(out), number, happens))

    def whole(self, command: list[str]) -> Done:
        return self.python.run(command, self.before())

    def before(self) -> str:
        """Its own cache, no network, hidden states kept after each block, a random model no reason not to publish."""
        return (
            f"import os; os.environ.update(QUANTPRESS_CACHE={str(self.folder / 'cache')!r}, HF_HUB_OFFLINE='1')\n"
            f"os.chdir({str(self.folder)!r})\n"
            "import quantpress.engine.journal as j; j.DUMP_SECONDS = 0; j.DUMP_SHARE = 1e9\n"
            "import quantpress.eval.release.publish as publish; publish.doubt = lambda results: None\n"
        )


def content(folder: Path) -> dict[str, bytes]:
    """The files below a folder, without the times in the manifest; of what was measured the names, as times are too."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            found[name] = b"" if name.startswith(_MEASURED) else file.read_bytes()
            if file.name == "manifest.json":
                document = json.loads(found[name])
                found[name] = json.dumps({k: v for k, v in document.items() if k not in _TIMES}).encode()
    return found


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def debris(folder: Path) -> list[str]:
    return [str(file) for pattern in _DEBRIS for file in folder.rglob(pattern)]


def aged(folder: Path) -> None:
    """A folder that is just being made is left alone for two seconds: what a kill has left is older now."""
    for place in folder.rglob(_DEBRIS[0]):
        os.utime(place, (0, 0))


def fresh(source: Path | None, out: Path) -> None:
    """`out` as `source` is; absent without one."""
    shutil.rmtree(out, ignore_errors=True)
    if source is not None:
        shutil.copytree(source, out, symlinks=True)


def told_in_one_line(done: Done) -> bool:
    """Whether a command that failed says why in its last line, and has no traceback."""
    lines = done.stderr.strip().splitlines()
    return "Traceback" not in done.stderr and bool(lines) and lines[-1].startswith("quantpress: ")
