"""Errors that a user's input can cause."""


class UserError(Exception):
    """Something is wrong with a file, a flag or a value that the user gave.

    The message is one line that names the file, the line or the flag. The command lines print it as
    ``error: <message>`` and exit with status 2; library users catch it like any exception.
    """


class Terminated(BaseException):
    """The process was asked to end (``SIGTERM``)."""
