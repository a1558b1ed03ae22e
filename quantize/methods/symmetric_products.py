"""Products with a symmetric matrix that read or write only about half of it."""

_PANELS = 8


def panels(n: int) -> list[slice]:
    """Runs of the columns 0 … n - 1, each to be multiplied with one side of the diagonal only."""
    width = max(128, -(-n // _PANELS))
    return [slice(start, min(start + width, n)) for start in range(0, n, width)]
