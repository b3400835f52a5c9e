"""Warnings that point at the user's own line, however deep in `interp` they arise."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class InterpWarning(UserWarning):
    """Something that the user may not have meant, in one sentence."""


@contextmanager
def plainly() -> Iterator[None]:
    """Show these warnings as sentences: the user of a command has no line of code to be pointed at."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, InterpWarning):
                print(f"interp: {message}", file=sys.stderr)  # noqa: T201
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


def warn(message: str) -> None:
    """Warn once a line of the user's code."""
    level, frame = 1, sys._getframe(1)
    inside = ("interp", "contextlib", "functools")
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, InterpWarning, stacklevel=level + 1)
