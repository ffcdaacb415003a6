"""The exceptions for what a person can mend (a setting, a file, a loss), and the check that most settings need."""


class BilevelError(ValueError):
    """A setting, file or loss is wrong; the message names it and says what to do.

    ``bilevel-fit`` prints the message in one line and ends with exit status 2, without a traceback.
    """


class Diverged(BilevelError):  # noqa: N818 (it says what happened)
    """A computation gave what is not finite; the message says which setting to lower."""


def positive(name: str, value: float) -> float:
    """Returns ``value`` if it is a finite number above zero.

    Raises:
        BilevelError: if it is not; the message starts with ``name``.
    """
    if not 0 < value < float("inf"):
        raise BilevelError(f"{name} must be a positive number, got {value}.")
    return value
