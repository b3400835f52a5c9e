"""A region of the picture, as the cells of an attention grid."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from interp.kernels import AttentionCall


@dataclass(frozen=True)
class Cells:
    """Rows and columns of a grid (height, width)."""

    grid: tuple[int, int]
    rows: slice
    columns: slice

    @property
    def size(self) -> tuple[int, int]:
        """How many rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def all(self) -> bool:
        """Whether that is the whole grid."""
        return self.size == self.grid

    @property
    def positions(self) -> np.ndarray:
        """Flat positions, row by row."""
        return np.arange(self.grid[0] * self.grid[1]).reshape(self.grid)[self.rows, self.columns].ravel()

    def crop(self, call: AttentionCall, start: int = 0) -> AttentionCall:
        """Return the kernel call with these queries alone; the grid's first position is the query `start`."""
        some = call.probs if call.probs is not None else call.query
        assert some is not None
        index = torch.from_numpy(start + self.positions).to(some.device, non_blocking=True)
        mask = call.mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask.index_select(-2, index)
        return replace(
            call,
            query=None if call.query is None else call.query.index_select(-2, index),
            probs=None if call.probs is None else call.probs.index_select(-2, index),
            mask=mask,
        )
