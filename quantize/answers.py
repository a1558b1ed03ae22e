"""What functions of the public API answer with; notebooks show them as tables."""

from collections.abc import Mapping
from dataclasses import dataclass

from quantpress.exports.load_check import LoadAnswer

from .core import notebook
from .core.text import duration, size
from .engine.plan import Plan

_LONG = 86400.0  # seconds on a CPU after which a plan names what is faster


@dataclass(frozen=True)
class Forecast:
    """What a run would need and make.

    linears: (kind, how many, scheme) of the linear layers, a `*` for any expert. targets: the format that each target
    will load. servability: what servers would make of it.
    """

    plan: Plan
    linears: tuple[tuple[str, int, str], ...]
    targets: Mapping[str, str]
    servability: tuple[str, ...]

    @property
    def time(self) -> str:
        """How long quantizing takes here, in words; evaluation, export and smoke test come on top of it."""
        p = self.plan
        where = "CPU" if p.device == "cpu" else "GPU"
        advice = ": use a GPU or an rtn recipe" if p.device == "cpu" and p.passes and p.seconds > _LONG else ""
        return f"about {duration(p.seconds)} to quantize on this {where}{advice}"

    def _repr_html_(self) -> str:
        p = self.plan
        rows: list[tuple[str, ...]] = [
            ("artifact", f"{size(p.artifact_bytes)} of {size(p.original_bytes)}"),
            ("memory", size(p.memory_bytes)),
            ("disk", size(p.disk_bytes)),
            ("time", self.time),
        ]
        rows += [(f"{number} x {module}", scheme) for module, number, scheme in self.linears]
        rows += [(f"target {name}", f"loads the {format} files") for name, format in self.targets.items()]
        return notebook.table("Plan", rows, (*p.notes, *self.servability))


@dataclass(frozen=True)
class Verification:
    """Whether an artifact is whole.

    files: how many were compared with a list of checksums. problems: a line for each thing that is wrong. reached: what
    was compared with what, in words; not_reached: what was not, each with what it would need. loads: the answer of each
    target that was asked, by its name.
    """

    files: int
    problems: tuple[str, ...]
    reached: tuple[str, ...]
    not_reached: tuple[str, ...]
    loads: Mapping[str, LoadAnswer]

    @property
    def sound(self) -> bool:
        """Nothing is wrong, and every target that was asked loads it."""
        return not self.problems and all(answer.loads for answer in self.loads.values())

    def _repr_html_(self) -> str:
        rows = [("problem", line) for line in self.problems]
        rows += [(name, answer.reason or f"loads, by {answer.by}") for name, answer in self.loads.items()]
        return notebook.table("Sound" if self.sound else "Not sound", [*rows, ("files compared", self.files)])
