"""From query and key to what a run keeps: softmax once per group of equally shaped layers, then selection, on the device."""

from collections.abc import Sequence

import numpy as np
import torch

from interp.kernels import AttentionCall
from interp.tokens import TokenSelection

CHUNK_BYTES = 256 * 2**20
"""Float32 probabilities formed at once: bounds the memory whatever the model's size."""


class AttentionReducer:
    """Reduce one grid's kernel calls of a step to (sample, layer, head, token, query_y, query_x).

    Args:
        grid: (height, width) of the query positions.
        heads: Head indices to keep, or None for the mean over all.
        selection: Token columns of the batch's samples; None for self-attention, which keeps all keys and gives
            (sample, layer, head, query_y, query_x, key_y, key_x).
        dtype: Of the result.
        keys: (height, width) of the key positions of self-attention; default is `grid`.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        heads: list[int] | None,
        selection: TokenSelection | None,
        dtype: torch.dtype,
        keys: tuple[int, int] | None = None,
    ) -> None:
        self.grid, self.heads, self.dtype, self.keys = grid, heads, dtype, keys or grid
        self._positions = None if selection is None else torch.from_numpy(selection.positions)
        pads = None if selection is None else selection.pads
        self._pads = None if pads is None else torch.from_numpy(pads)

    def __call__(self, calls: Sequence[AttentionCall], rows: slice) -> torch.Tensor:
        """Reduce the calls of all layers, in order; `rows` are one branch's."""
        reduced: list[torch.Tensor | None] = [None] * len(calls)
        for members in _alike(calls):
            for part in _chunks(calls, members, rows):
                probs = _probabilities([calls[i] for i in part], rows)  # (layer, sample, head, query, key)
                probs = probs.mean(2, keepdim=True) if self.heads is None else probs[:, :, self.heads]
                for i, layer in zip(part, self._tokens(probs), strict=True):
                    reduced[i] = layer.to(self.dtype)
        stacked = torch.stack([r for r in reduced if r is not None], dim=1)  # (sample, layer, head, token, query)
        height, width = self.grid
        if self._positions is None:
            return stacked.unflatten(-1, self.keys).unflatten(-3, (height, width))
        return stacked.unflatten(-1, (height, width))

    def _tokens(self, probs: torch.Tensor) -> torch.Tensor:
        """Select keys: (layer, sample, head, query, key) → (layer, sample, head, token, query)."""
        if self._positions is None:
            return probs
        layers, _, heads, queries, _ = probs.shape
        positions = self._positions.to(probs.device)
        index = positions.clamp(min=0)[None, :, None, None, :].expand(layers, -1, heads, queries, -1)
        columns = probs.gather(-1, index)
        columns = columns.masked_fill((positions < 0)[None, :, None, None, :], float("nan"))
        if self._pads is not None:
            pads = self._pads.to(probs.device)
            summed = (probs * pads[None, :, None, None, :]).sum(-1)
            summed = summed.masked_fill(~pads.any(-1)[None, :, None, None], float("nan"))
            columns = torch.cat([columns[..., :-1], summed[..., None]], dim=-1)
        return columns.transpose(-1, -2)


def _probabilities(calls: Sequence[AttentionCall], rows: slice) -> torch.Tensor:
    """Softmax of equally shaped layers in one go: (layer, sample, head, query, key)."""
    if len(calls) == 1 or any(c.probs is not None or c.mask is not None or c.causal for c in calls):
        return torch.stack([c.probabilities(rows) for c in calls])
    query = torch.stack([c.query[rows] for c in calls if c.query is not None])
    key = torch.stack([c.key[rows] for c in calls if c.key is not None])
    return (
        AttentionCall("", query.flatten(0, 1), key.flatten(0, 1), scale=calls[0].scale)
        .probabilities()
        .unflatten(0, (len(calls), -1))
    )


def _alike(calls: Sequence[AttentionCall]) -> list[list[int]]:
    """Sort layer numbers by the shapes and scale of their calls."""
    groups: dict[object, list[int]] = {}
    for i, c in enumerate(calls):
        shape = i if c.query is None or c.key is None else (c.query.shape, c.key.shape, c.scale)
        groups.setdefault(shape, []).append(i)
    return list(groups.values())


def _chunks(calls: Sequence[AttentionCall], members: list[int], rows: slice) -> list[list[int]]:
    first = calls[members[0]]
    if first.query is None or first.key is None:
        return [[i] for i in members]
    samples = len(range(*rows.indices(first.query.shape[0])))
    each = 4 * samples * int(np.prod(first.query.shape[1:3])) * first.key.shape[-2]
    count = max(1, CHUNK_BYTES // max(1, each))
    return [members[i : i + count] for i in range(0, len(members), count)]
