"""Products with a symmetric matrix, of which about half is read or written."""

_PANELS = 8


def panels(n: int) -> list[slice]:
    """Runs of the columns 0 … n - 1, to be multiplied with what is on one side of the diagonal only."""
    width = max(128, -(-n // _PANELS))
    return [slice(start, min(start + width, n)) for start in range(0, n, width)]
