"""Branches of a denoiser call: which rows hold them, taking rows out, and what stands in for those that were not run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from interp.errors import InterpError

Held = Mapping[str, tuple[int, ...]]
"""Branch → the samples of the batch whose rows a call holds, in row order."""


def _map_tensors(tree: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `fn` to every tensor in nested tuples, lists, dicts and model outputs."""
    if isinstance(tree, torch.Tensor):
        return fn(tree)
    if isinstance(tree, tuple):
        return tuple(_map_tensors(x, fn) for x in tree)
    if isinstance(tree, list):
        return [_map_tensors(x, fn) for x in tree]
    if isinstance(tree, dict):
        changed = {k: _map_tensors(v, fn) for k, v in tree.items()}
        return changed if type(tree) is dict else type(tree)(**changed)
    return tree


def split_held(tensor: torch.Tensor, held: Held) -> dict[str, torch.Tensor]:
    """Split rows into branch → (sample, …), views in row order, where branches may hold some samples alone."""
    return dict(zip(held, tensor.split([len(members) for members in held.values()]), strict=True)) if held else {}


def row_numbers(given: Held, kept: Held) -> list[int]:
    """Return the numbers of the kept rows among the given ones."""
    pairs = [(branch, sample) for branch, members in given.items() for sample in members]
    return [i for i, (branch, sample) in enumerate(pairs) if sample in kept.get(branch, ())]


def numbers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return whole numbers on a device, without waiting for it, as indexing with a list would."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


def take_rows(tensor: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    """Return some rows: a view where they follow each other."""
    if index and list(index) == list(range(index[0], index[0] + len(index))):
        return tensor[index[0] : index[0] + len(index)]
    return tensor.index_select(0, numbers(index, tensor.device))


def keep_rows(tree: Any, rows: int, index: Sequence[int]) -> Any:
    """Keep the rows of these numbers in every tensor whose first dimension holds all `rows`."""
    return _map_tensors(tree, lambda x: x if x.ndim == 0 or x.shape[0] != rows else take_rows(x, index))


def stand_ins(given: Held, kept: Held) -> list[int]:
    """Return, for each given row, the number of the kept row whose output it gets: its own, or its sample's first.

    Raises:
        InterpError: no row of a sample is kept.
    """
    number, own = {}, [(branch, sample) for branch, members in kept.items() for sample in members]
    for i, (branch, sample) in enumerate(own):
        number[branch, sample] = i
        number.setdefault(("", sample), i)
    try:
        return [
            number.get((branch, sample), number["", sample]) for branch, members in given.items() for sample in members
        ]
    except KeyError as error:
        raise InterpError("every branch of a sample was dropped from a denoiser call; keep at least one") from error


def stack_rows(tree: Any, rows: int, source: Sequence[int]) -> Any:
    """Give every tensor of so many rows its full height back; `source` is that of `stand_ins`."""
    return _map_tensors(tree, lambda x: x if x.ndim == 0 or x.shape[0] != rows else take_rows(x, source))


def spread(tensor: torch.Tensor, members: tuple[int, ...], samples: int) -> torch.Tensor:
    """Return (sample, …) of the whole batch from some of its samples; the others are NaN."""
    if len(members) == samples:
        return tensor
    whole = torch.full((samples, *tensor.shape[1:]), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return whole.index_copy_(0, numbers(members, tensor.device), tensor)


def stack_branches(
    parts: Mapping[str, torch.Tensor], wanted: Sequence[str], shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Stack branches to (sample, branch, …); one that was not evaluated is NaN, never 0.

    shape, dtype: (sample, …) of a branch, for those that are missing. A single branch that is there is not copied.
    """
    if len(wanted) == 1 and wanted[0] in parts:
        return parts[wanted[0]].unsqueeze(1)
    given = {b: parts[b] for b in wanted if b in parts}
    if len(given) < len(wanted):
        device = next((t.device for t in parts.values()), None)
        absent = torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)
        given = {b: given.get(b, absent) for b in wanted}
    return torch.stack(list(given.values()), dim=1)
