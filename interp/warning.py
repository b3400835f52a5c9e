"""Warnings that point at the user's own line, however deep in `interp` they arise."""

import sys
import warnings


def warn(message: str) -> None:
    """Warn once a line of the user's code."""
    level, frame = 1, sys._getframe(1)
    inside = ("interp", "contextlib")
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)
