"""Branches of a denoiser call: as rows of one call, or as calls of their own; taking some out, and what replaces them."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from interp.errors import InterpError


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
    return dict(zip(branches, tensor.chunk(len(branches)), strict=True)) if branches else {}


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


class SkippedCalls:
    """Denoiser calls of one evaluation that are not run: each gives the kept branch's output.

    With sequential guidance the kept branch may run after the skipped one. Then the skipped call returns a tensor full
    of NaN that is filled in place as soon as the kept one has run, which is before the pipeline combines the two:
    u + w·(c − u) is the kept prediction exactly, and a pipeline that copied the tensor too early shows NaN, never a
    wrong number.
    """

    def __init__(self) -> None:
        self._waiting: list[torch.Tensor] = []
        self._kept: torch.Tensor | None = None
        self.dropped = False
        """Some branch of this evaluation was dropped."""

    def give(self, blank: Callable[[], torch.Tensor], as_tuple: bool) -> Any:
        """Return the output of a call that is skipped."""
        self.dropped = True
        if self._kept is not None:
            sample = self._kept.clone()
        else:
            sample = blank().fill_(float("nan"))
            self._waiting.append(sample)
        return (sample,) if as_tuple else Transformer2DModelOutput(sample=sample)

    def ran(self, sample: torch.Tensor, dropped: bool) -> None:
        """Note the output of a call that was run, (sample, …) of the first kept branch, and fill those that wait."""
        self._kept, self.dropped = sample, self.dropped or dropped
        for waiting in self._waiting:
            if waiting.shape != sample.shape or waiting.dtype != sample.dtype:
                raise InterpError(
                    f"a skipped denoiser call returned {tuple(waiting.shape)} {waiting.dtype}, but the kept branch gives "
                    f"{tuple(sample.shape)} {sample.dtype}; this pipeline's branches cannot be dropped"
                )
            waiting.copy_(sample)
        self._waiting.clear()

    def end(self) -> None:
        """End the evaluation.

        Raises:
            InterpError: every call of it was skipped.
        """
        waiting, self._waiting, self._kept, self.dropped = self._waiting, [], None, False
        if waiting:
            raise InterpError(
                "every denoiser call of a step was skipped: the branch that was to be kept did not run; is guidance on?"
            )
