"""Errors that are the user's to mend: one clear sentence, no traceback on the command line."""

from collections.abc import Iterable
from difflib import get_close_matches


class InterpError(ValueError):
    """A mistake that the user can mend; its text says what was asked, found, possible, and what to do."""


class StoreError(InterpError):
    """A run store is missing, damaged, of another format, or not what was asked for."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name closest to `name`, or "" when none is close.

    >>> nearest("head", ["heads", "tokens"])
    "; did you mean 'heads'?"
    """
    match = get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
