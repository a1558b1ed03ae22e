"""Plug-ins: what other installed packages add to a table of ours, by entry points."""

from collections.abc import Iterator, Mapping, MutableMapping
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .errors import BadInput

T = TypeVar("T")
GROUPS = ("quantpress.methods", "quantpress.rounders", "quantpress.file_formats", "quantpress.formats",
          "quantpress.servers")  # fmt: skip


def added(group: str, wanted: type | None = None, taken: Mapping[str, Any] | None = None) -> Any:
    """What installed packages add to `group`, by name: {name: object}.

    wanted: what each has to be, an instance or a subclass of it. taken: names that are ours. Raises BadInput for
    a plug-in that cannot be imported, is something else, or has a name that is taken.
    """
    found: dict[str, Any] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        if point.name in (taken or {}) or point.name in found:
            raise BadInput(f"{_label(point)}: the name {point.name!r} is taken; rename it in its package")
        try:
            value = point.load()
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise BadInput(f"{_label(point)} cannot be imported ({why}); mend or uninstall the package") from error
        is_one = isinstance(value, type) and wanted is not None and issubclass(value, wanted)
        if wanted is not None and not is_one and not isinstance(value, wanted):
            kinds = wanted if isinstance(wanted, tuple) else (wanted,)
            raise BadInput(f"{_label(point)} has to be a {' or '.join(kind.__name__ for kind in kinds)}, not {value!r}")
        found[point.name] = value
    return found


@cache
def packages() -> dict[str, str]:
    """The packages that add something, with their versions; nothing is imported."""
    all_points = entry_points()  # at once: each call reads what all installed packages say
    points = [point for group in GROUPS for point in all_points.select(group=group)]
    return {point.dist.name: point.dist.version for point in points if point.dist is not None}


def _label(point: EntryPoint) -> str:
    package = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    return f"plug-in {point.group}:{point.name} ({point.value}){package}"


class Table(MutableMapping[str, T], Generic[T]):
    """Things of one kind by their names: ours, and from the first look on those that plug-ins add."""

    def __init__(self, group: str, own: Mapping[str, T], wanted: type | None = None) -> None:
        self._group, self._own, self._wanted = group, dict(own), wanted

    @cached_property
    def _all(self) -> dict[str, T]:
        found = added(self._group, self._wanted, self._own)
        return self._own | {name: v() if isinstance(v, type) else v for name, v in found.items()}

    def __getitem__(self, name: str) -> T:
        return self._own[name] if name in self._own else self._all[name]

    def __setitem__(self, name: str, value: T) -> None:
        self._own[name] = self._all[name] = value

    def __delitem__(self, name: str) -> None:
        self._own.pop(name, None)
        del self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)
