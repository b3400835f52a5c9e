"""Which tokens of the prompts become the columns of a run, and how the columns are labelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.errors import InterpError
from interp.stores import TokenTable
from interp.stores.rows import Rows
from interp.token_list import Column, TokenList


@dataclass(frozen=True)
class TokenSelection:
    """Which token positions become which columns of a run: positions (sample, column), -1 = unused column.

    `pads` (sample, position) marks the padding that is summed into the last column; None where nothing is summed. Those of
    a whole run may be `Rows`.
    """

    positions: np.ndarray | Rows
    pads: np.ndarray | Rows | None
    table: TokenTable

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.positions.shape[1])

    def of(self, members: Sequence[int]) -> "TokenSelection":
        """Return the positions and pads of some samples."""
        rows = list(members)
        return TokenSelection(self.positions[rows], None if self.pads is None else self.pads[rows], self.table)


def select_tokens(cond: TokenList, uncond: TokenList, tokens: str | tuple[int, ...], width: int = 0) -> TokenSelection:
    """Choose the columns for a list of prompts, as `Capture.tokens` says.

    Args:
        cond, uncond: Tokenised prompts and negative prompts, one a sample.
        tokens: `"prompt"`, `"all"` or positions.
        width: Make at least this many columns (a run that is appended to has its width already).
    """
    length = int(cond.lengths.max())
    if tokens == "prompt":
        used = cond.lengths - cond.count_of("pad")
        columns = max(int(used.max()) + 1, width)
        pads = padding(cond)

        def kept(rows: np.ndarray) -> np.ndarray:
            """The positions that are no padding, in order."""
            absent = pads[rows] | (np.arange(length) >= cond.lengths[rows][:, None])
            order = np.argsort(absent, axis=1, kind="stable")
            order = np.pad(order, ((0, 0), (0, max(0, columns - length))))[:, :columns]
            return np.where(np.arange(columns) < used[rows][:, None], order, -1)

        positions = Rows((len(cond), columns), "int64", kept)
        return TokenSelection(positions, pads, label_columns(cond, uncond, positions, pads))
    wanted = range(length) if tokens == "all" else tokens
    wrong = [p for p in wanted if not 0 <= int(p) < length]
    if wrong:
        raise InterpError(f"Capture(tokens={list(wanted)}): the text has positions 0–{length - 1}")
    chosen = np.asarray(wanted, int)
    if tokens == "all":
        chosen = np.pad(chosen, (0, max(0, width - length)), constant_values=-1)
    positions = Rows(
        (len(cond), len(chosen)), "int64", lambda rows: np.where(chosen < cond.lengths[rows][:, None], chosen, -1)
    )
    return TokenSelection(positions, None, label_columns(cond, uncond, positions, None))


def padding(tokens: TokenList) -> Rows:
    """Tell which positions are padding: (sample, position), bool."""
    return Rows((len(tokens), int(tokens.lengths.max())), bool, lambda rows: tokens.are("pad", rows))


def label_columns(
    cond: TokenList, uncond: TokenList, positions: np.ndarray | Rows, pads: np.ndarray | Rows | None
) -> TokenTable:
    """Describe chosen positions: the table of their columns, made when it is asked for."""

    def shown(rows: np.ndarray) -> np.ndarray:
        """The position that each column is labelled by; summed padding by its first."""
        found = np.array(positions[rows])
        if pads is not None:
            summed = pads[rows]
            some = summed.any(1)
            found[some, -1] = summed[some].argmax(1)
        return found

    def count(rows: np.ndarray) -> np.ndarray:
        found = (positions[rows] >= 0).astype("int32")
        if pads is not None:
            summed = pads[rows].sum(1)
            found[:, -1] = np.where(summed > 0, summed, found[:, -1])
        return found

    def column(tokens: TokenList, name: Column, dtype: Any) -> Rows:
        return Rows(positions.shape, dtype, lambda rows: tokens.at(name, rows, shown(rows)))

    return TokenTable(
        text=column(cond, "text", object), id=column(cond, "id", "int32"), role=column(cond, "role", object),
        word=column(cond, "word", "int32"), count=Rows(positions.shape, "int32", count),
        text_uncond=column(uncond, "text", object),
    )  # fmt: skip
