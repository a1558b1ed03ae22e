"""Choosing one option for each thing within a number of bytes, so that the predictions change least."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import TypeVar

from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

_T = TypeVar("_T")


def assign(costs: Mapping[str, Mapping[_T, float]], sizes: Mapping[str, Mapping[_T, int]], room: int) -> dict[str, _T]:
    """The options with the least total cost that take at most `room` bytes; those of `costs`, by name.

    An integer program: one option a name, one limit. Raises ValueError when even the smallest options do not fit.
    """
    options = [(name, option) for name in costs for option in costs[name]]
    if sum(min(sizes[name][option] for option in costs[name]) for name in costs) > room:
        raise ValueError("the smallest options do not fit")
    index = {name: i for i, name in enumerate(costs)}
    rows = [index[name] for name, _ in options]
    one = coo_array(([1.0] * len(options), (rows, range(len(options)))), shape=(len(index), len(options)))
    unit = math.gcd(*(sizes[name][option] for name, option in options))
    bytes_of = [sizes[name][option] // unit for name, option in options]
    least = [min((cost for cost in each.values() if cost > 0), default=0.0) for each in costs.values()]
    scale = sum(least) or 1.0  # the solver's tolerances are absolute
    limit = room // unit
    while True:
        with _silent():
            found = milp(
                [costs[name][option] / scale for name, option in options],
                constraints=[LinearConstraint(one.tocsr(), 1, 1), LinearConstraint([bytes_of], ub=limit)],
                integrality=[1] * len(options),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 1e-6},
            )
        assert found.x is not None, found.message
        chosen = [x > 0.5 for x in found.x]
        over = sum(size for size, taken in zip(bytes_of, chosen, strict=True) if taken) - room // unit
        if over <= 0:
            return {name: option for (name, option), taken in zip(options, chosen, strict=True) if taken}
        limit -= over  # the solver allows its own rounding


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What is written to standard output meanwhile is dropped: of one budget in ten the solver says a line of its own
    debugging there, which would stand before our JSON."""
    null, kept = os.open(os.devnull, os.O_WRONLY), os.dup(1)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)
