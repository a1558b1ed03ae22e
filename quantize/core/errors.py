"""The one exception a user's mistake raises."""


class BadInput(ValueError):
    """What is wrong, the values and what to do, in one line; the command line exits with code 2."""
