"""Tables along `sample` whose rows are made when they are asked for."""

from collections.abc import Callable
from typing import Any

import numpy as np


class Rows:
    """A table (sample, …) that is not held: `make` gives the rows of these numbers, an array (row, …).

    The labels of ten thousand prompts' tokens are written a hundred samples at a time; more need never be there.

    >>> squares = Rows((1000, 1), "int32", lambda rows: rows[:, None] ** 2)
    >>> squares[2:4].tolist()
    [[4], [9]]
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, make: Callable[[np.ndarray], np.ndarray]) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._make = make

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Return the rows of a slice or list."""
        return np.asarray(self._make(np.arange(len(self))[rows]), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def changed(table: Any, width: int, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Return a table (sample, column) with its columns changed, `width` then; one that is not held is not held then either."""
    if isinstance(table, Rows):
        return Rows((len(table), width), table.dtype, lambda rows: change(table[rows]))
    return change(np.asarray(table))
