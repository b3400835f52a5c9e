"""One call of the denoiser, and where a tensor was met within it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from interp.branches import Held, split_held


@dataclass(frozen=True)
class At:
    """Where a tensor was met.

    site; step (0 = first, noisiest) and its scheduler timestep; evaluation (0 = the step's first); branch (`cond` or
    `uncond`; "" in a text encoder, which runs before the first step, at step −1, for either); samples: how many samples
    the tensor holds, its first dimension; members: which of the batch these are, in order (a branch may have been
    dropped for some samples alone); call: kernel calls within one run of an attention module are counted from 0.
    """

    site: str
    step: int
    timestep: float
    evaluation: int
    branch: str
    samples: int
    call: int = 0
    members: tuple[int, ...] = ()


@dataclass
class DenoiserCall:
    """One call of the denoiser, before it runs: its arguments may be exchanged, its branches dropped.

    held: branch → samples whose rows the tensors hold, in row order: as given, and, once the call runs, what is left;
    one branch alone if guidance takes a call per branch. samples: of the whole batch.

    keep: the branches that will be evaluated; leave: samples that are taken out of a branch besides. Every row that is
    not evaluated receives the output of its sample's kept branch, so that guidance `u + w·(c − u)` returns the kept
    prediction exactly. A call that keeps nothing is not run at all. scale: the guidance scale with which both branches
    are combined instead of the pipeline's own, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    held: Held
    step: int
    time: Callable[[], float]
    evaluation: int
    samples: int
    keep: tuple[str, ...] = ()
    leave: dict[str, frozenset[int]] = field(default_factory=dict)
    scale: float | None = None
    stood_in: set[str] = field(default_factory=set)
    """Modules that did not run in this call, because something stood in for them."""

    @cached_property
    def timestep(self) -> float:
        """The scheduler's timestep; asking for it waits for the device, if the timesteps are there."""
        return self.time()

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that the tensors hold, in row order."""
        return tuple(self.held)

    @property
    def rows(self) -> int:
        """Rows of the tensors that pass."""
        return sum(len(members) for members in self.held.values())

    def left(self) -> dict[str, tuple[int, ...]]:
        """What `keep` and `leave` leave of the rows that are held."""
        wanted = {
            b: tuple(s for s in m if s not in self.leave.get(b, ())) for b, m in self.held.items() if b in self.keep
        }
        return {b: members for b, members in wanted.items() if members}

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split rows into branch → (sample, …), views; `torch.cat` of the values is the inverse."""
        return split_held(tensor, self.held)

    def __str__(self) -> str:
        branches = " and ".join(self.branches) or "no branch"
        return f"the call's {self.rows} rows ({self.samples} samples of {branches})"

    def at(self, site: str, branch: str, call: int = 0) -> At:
        """Describe a tensor met within this call."""
        members = self.held.get(branch, ())
        return At(site, self.step, self.timestep, self.evaluation, branch, len(members), call, members)


@dataclass(frozen=True)
class Prediction:
    """What the denoiser really evaluated in one call: branch → (sample, channel, y, x), as the scheduler understands it.

    The samples are those of `call.held[branch]`.
    """

    outputs: dict[str, torch.Tensor]
    call: DenoiserCall
