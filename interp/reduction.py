"""From query and key to what a run keeps: softmax once per group of equally shaped layers, then selection, on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from interp.branches import numbers
from interp.kernels import AttentionCall
from interp.token_columns import TokenSelection

CHUNK_BYTES = 256 * 2**20
"""Float32 probabilities formed at once: bounds the memory whatever the model's size."""


@dataclass(frozen=True)
class Layer:
    """One layer's kernel call: which rows are the branch's, which queries and keys the part that is kept.

    members: the samples of the batch that the rows are.
    """

    call: AttentionCall
    rows: slice
    queries: slice
    keys: slice
    members: tuple[int, ...]

    def probabilities(self) -> torch.Tensor:
        """Probabilities of the part: (sample, head, query, key)."""
        return self.call.probabilities(self.rows, self.queries)[..., self.keys]


class AttentionReducer:
    """Reduce one grid's kernel calls of a step and branch to (sample, layer, head, token, query_y, query_x).

    Args:
        part: `cross` (image → text), `self` (image → image), `text` (text → image), `within_text` (text → text).
        grid: (height, width) of the image positions.
        heads: Head indices to keep, or None for the mean over all.
        selection: Token columns of the batch's samples; None for `self`, which keeps all keys and gives
            (sample, layer, head, query_y, query_x, key_y, key_x). `text` gives (…, token, key_y, key_x), `within_text`
            (…, query_token, token).
        dtype: Of the result.
        keys: (height, width) of the key positions of self-attention; default is `grid`.
    """

    def __init__(
        self,
        part: str,
        grid: tuple[int, int],
        heads: list[int] | None,
        selection: TokenSelection | None,
        dtype: torch.dtype,
        keys: tuple[int, int] | None = None,
    ) -> None:
        self.part, self.grid, self.heads, self.dtype, self.keys = part, grid, heads, dtype, keys or grid
        self._positions = None if selection is None else torch.from_numpy(np.asarray(selection.positions))
        pads = None if selection is None else selection.pads
        self._pads = None if pads is None else torch.from_numpy(np.asarray(pads))
        self._known: dict[object, _Columns] = {}

    def __call__(self, layers: Sequence[Layer]) -> torch.Tensor:
        """Reduce all layers of a branch, in order."""
        whole: torch.Tensor | None = None
        for members in _alike(layers):
            for part in _chunks(layers, members):
                blocks = []
                for queries in _blocks(layers[part[0]]):
                    probs = _probabilities([replace(layers[i], queries=queries) for i in part])
                    blocks.append(self._of_heads(probs))
                probs = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=3)  # (layer, sample, head, query, key)
                chosen = self._selected(probs, layers[part[0]].members).transpose(0, 1)
                if whole is None:  # (sample, layer, head, token, position)
                    shape = (len(chosen), len(layers), *chosen.shape[2:])
                    whole = torch.empty(shape, dtype=self.dtype, device=chosen.device)
                if len(part) == len(layers):  # in order, since they are alike: at one go
                    whole.copy_(chosen)
                    break
                for i, layer in enumerate(part):
                    whole[:, layer] = chosen[:, i]
        assert whole is not None
        height, width = self.grid
        if self.part == "within_text":
            return whole
        if self.part == "self":
            return whole.unflatten(-1, self.keys).unflatten(-3, (height, width))
        return whole.unflatten(-1, (height, width))

    def _of_heads(self, probs: torch.Tensor) -> torch.Tensor:
        """Average or choose heads: (layer, sample, head, query, key)."""
        if self.heads is None:
            return probs.mean(2, keepdim=True)
        if self.heads == list(range(probs.shape[2])):
            return probs
        return probs.index_select(2, numbers(self.heads, probs.device))

    def _selected(self, probs: torch.Tensor, members: tuple[int, ...]) -> torch.Tensor:
        """Select tokens on each side that is the text: (layer, sample, head, query, key) → as the part is stored."""
        if self._positions is None:
            return probs
        if self.part == "text":
            return self._rows(probs, members)
        chosen = self.columns(probs, members)
        return chosen if self.part == "cross" else self._rows(chosen.transpose(-1, -2), members)

    def columns(self, probs: torch.Tensor, members: tuple[int, ...] | None = None) -> torch.Tensor:
        """Select tokens among the keys: (layer, sample, head, query, key) → (layer, sample, head, token, query)."""
        return self._rows(probs.transpose(-1, -2), members)

    def _rows(self, probs: torch.Tensor, members: tuple[int, ...] | None) -> torch.Tensor:
        """Select tokens along the last dimension but one."""
        layers, _, heads, length, image = probs.shape
        key = members, length, probs.device
        if key not in self._known:  # once a run, not at every step
            self._known[key] = self._of_length(length, members, probs.device)
        known = self._known[key]
        columns = probs.gather(-2, known.index.expand(layers, -1, heads, -1, image)).masked_fill(
            known.unused, float("nan")
        )
        if known.pads is not None and known.padless is not None:
            summed = (probs * known.pads).sum(-2, keepdim=True).masked_fill(known.padless, float("nan"))
            columns = torch.cat([columns[..., :-1, :], summed], dim=-2)
        return columns

    def _of_length(self, length: int, members: tuple[int, ...] | None, device: torch.device) -> "_Columns":
        """What `columns` needs of some samples' tokens, beside so many keys; small, so nothing waits for the device."""
        assert self._positions is not None
        chosen = slice(None) if members is None else list(members)
        positions = self._positions[chosen]
        unused = (positions < 0) | (positions >= length)  # the branch without text may be shorter
        index, unused = (
            t[None, :, None, :, None].to(device, non_blocking=True) for t in (positions.clamp(0, length - 1), unused)
        )
        if self._pads is None:
            return _Columns(index, unused)
        pads = torch.nn.functional.pad(self._pads[chosen], (0, length - self._pads.shape[-1]))
        pads, padless = (t.to(device, non_blocking=True) for t in (pads, ~pads.any(-1)))
        return _Columns(index, unused, pads[None, :, None, :, None], padless[None, :, None, None, None])


@dataclass(frozen=True)
class _Columns:
    """Which keys are a run's token columns, and which are summed into the last one, to be broadcast over layers and heads."""

    index: torch.Tensor
    unused: torch.Tensor
    pads: torch.Tensor | None = None
    padless: torch.Tensor | None = None


def _probabilities(layers: Sequence[Layer]) -> torch.Tensor:
    """Softmax of equally shaped layers in one go: (layer, sample, head, query, key)."""
    first = layers[0]
    alone = len(layers) == 1 or any(
        one.call.probs is not None or one.call.mask is not None or one.call.causal for one in layers
    )
    if alone:
        return torch.stack([one.probabilities() for one in layers])
    query = torch.stack([one.call.query[one.rows][:, :, one.queries] for one in layers if one.call.query is not None])
    key = torch.stack([one.call.key[one.rows] for one in layers if one.call.key is not None])
    probs = AttentionCall("", query.flatten(0, 1), key.flatten(0, 1), scale=first.call.scale).probabilities()
    return probs[..., first.keys].unflatten(0, (len(layers), -1))


def _alike(layers: Sequence[Layer]) -> list[list[int]]:
    """Sort layer numbers by the shapes and scale of their calls."""
    groups: dict[object, list[int]] = {}
    for i, one in enumerate(layers):
        c = one.call
        cut = tuple((s.start, s.stop) for s in (one.rows, one.queries, one.keys))
        shape = i if c.query is None or c.key is None else (c.query.shape, c.key.shape, c.scale, cut)
        groups.setdefault(shape, []).append(i)
    return list(groups.values())


def _chunks(layers: Sequence[Layer], members: list[int]) -> list[list[int]]:
    """Split layers so that the probabilities formed at once stay within CHUNK_BYTES."""
    first = layers[members[0]]
    if first.call.query is None:
        return [[i] for i in members]
    count = max(1, CHUNK_BYTES // max(1, _bytes_per_query(first) * (first.queries.stop - first.queries.start)))
    return [members[i : i + count] for i in range(0, len(members), count)]


def _blocks(layer: Layer) -> list[slice]:
    """Split a layer's queries, where a single layer has more probabilities than CHUNK_BYTES."""
    start, stop = layer.queries.start, layer.queries.stop
    if layer.call.query is None:
        return [layer.queries]
    step = max(1, CHUNK_BYTES // max(1, _bytes_per_query(layer)))
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def _bytes_per_query(layer: Layer) -> int:
    query, key = layer.call.query, layer.call.key
    assert query is not None and key is not None
    return 4 * (layer.rows.stop - layer.rows.start) * int(query.shape[1]) * int(key.shape[-2])
