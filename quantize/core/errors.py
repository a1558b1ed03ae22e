"""The exceptions that the command line ends with in one line."""


class BadInput(ValueError):
    """What is wrong, the values and what to do, in one line; the command line exits with code 2."""


class OutOfMemory(Exception):
    """Memory ended; the message says in one line what was being done, and what to lower."""
