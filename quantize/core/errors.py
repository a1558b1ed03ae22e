"""The exceptions that the command line ends with in one line."""

from .text import printable

_FIRST, _LAST = 1500, 300  # characters of a message too long for a screen that are kept


class BadInput(ValueError):
    """What is wrong, the values and what to do, in one line; the command line exits with code 2.

    Whatever names and values of others a message holds, it is one line of printable characters, no longer than a
    screen.
    """

    def __init__(self, message: str) -> None:
        text = printable(" ".join(message.split()))
        super().__init__(text if len(text) <= _FIRST + _LAST else f"{text[:_FIRST]} … {text[-_LAST:]}")


class OutOfMemory(Exception):
    """Memory ended; the message says in one line what was being done, and what to lower."""


class LostRank(Exception):
    """A run that several processes share cannot go on: one of them has ended, or has said why it cannot."""
