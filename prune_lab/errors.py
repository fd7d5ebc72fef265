"""Refused: the one error a user is meant to read; and the exit codes of every command (README)."""

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


class Refused(ValueError):  # noqa: N818  (it reads as what happened: "Refused: amount=1.5 ...")
    """Refusal: what was asked for cannot be done.

    The message is one short sentence or two: key, value, what is allowed, what to do. The command line
    prints it without a traceback and ends with exit code 2.
    """
