"""Branches as rows: taking some out of a denoiser call, and putting its output back to full height."""

from collections.abc import Callable
from typing import Any

import torch


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


def split_rows(tensor: torch.Tensor, branches: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Split (branch·sample, …) into branch → (sample, …), views in row order."""
    return dict(zip(branches, tensor.chunk(len(branches)), strict=True))


def keep_rows(tree: Any, rows: int, branches: tuple[str, ...], kept: tuple[str, ...]) -> Any:
    """Keep the rows of some branches in every tensor whose first dimension holds all `rows`."""

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 0 or x.shape[0] != rows:
            return x
        parts = split_rows(x, branches)
        return parts[kept[0]] if len(kept) == 1 else torch.cat([parts[b] for b in kept])

    return _map_tensors(tree, keep)


def stack_rows(out: Any, branches: tuple[str, ...], kept: tuple[str, ...]) -> Any:
    """Give every dropped branch the first kept branch's output."""

    def stack(x: torch.Tensor) -> torch.Tensor:
        parts = split_rows(x, kept)
        return torch.cat([parts.get(b, parts[kept[0]]) for b in branches])

    return _map_tensors(out, stack)
