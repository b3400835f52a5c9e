"""The one error a user's mistake raises, and the words it is made of."""

from collections.abc import Iterable

from interp.stores.errors import InterpError, nearest

__all__ = ["InterpError", "nearest", "sentence_list"]


def sentence_list(names: Iterable[str], limit: int = 6) -> str:
    """Return `names` as an English list, cut after `limit`.

    >>> sentence_list(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    names = list(names)
    shown = ", ".join(repr(n) for n in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
