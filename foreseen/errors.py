"""The one exception that a user is meant to read."""


class BadInput(ValueError):
    """What the user gave cannot work.

    The message is one sentence with the value, the bounds and the key or option to change. The command line prints
    it without a traceback and exits with 2; from Python it is an ordinary ValueError.
    """
