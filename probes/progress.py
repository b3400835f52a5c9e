"""Progress bars for long answers: shown where somebody watches, as `interp probe` does, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from dask.diagnostics.progress import ProgressBar
from tqdm import tqdm

T = TypeVar("T")
DELAY = 1.0
"""Seconds after which a bar appears."""

_WATCHED = ContextVar("watched", default=False)


@contextmanager
def watched() -> Iterator[None]:
    """Within it, dask computations and loops over `counted` that take more than a second show a bar on stderr."""
    token = _WATCHED.set(True)
    try:
        with ProgressBar(minimum=DELAY, out=sys.stderr):
            yield
    finally:
        _WATCHED.reset(token)


def counted(items: Iterable[T]) -> Iterable[T]:
    """Return `items`, of which a bar counts those that are through; for loops over samples.

    >>> [i for i in counted(range(3))]
    [0, 1, 2]
    """
    if not _WATCHED.get():
        return items
    return tqdm(items, unit="sample", delay=DELAY, leave=False)
