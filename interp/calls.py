"""One call of the denoiser, and where a tensor was met within it."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class At:
    """Where a tensor was met.

    site; step (0 = first, noisiest) and its scheduler timestep; evaluation (0 = the step's first); branch (`cond` or
    `uncond`; "" in a text encoder, which runs before the first step, at step −1, for either); samples: how many samples
    the call holds, the tensor's first dimension; call: kernel calls within one
    run of an attention module are counted from 0.
    """

    site: str
    step: int
    timestep: float
    evaluation: int
    branch: str
    samples: int
    call: int = 0


@dataclass
class DenoiserCall:
    """One call of the denoiser, before it runs: its arguments may be exchanged, its branches dropped.

    branches: in row order, as given; one alone if guidance takes a call per branch. keep: the branches that will be
    evaluated; every other one receives the kept one's output, so that guidance `u + w·(c − u)` returns the kept
    prediction exactly. A call that keeps none of its branches is not run at all.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    branches: tuple[str, ...]
    step: int
    timestep: float
    evaluation: int
    samples: int
    keep: tuple[str, ...] = field(default=())

    @property
    def rows(self) -> int:
        """Rows of the tensors that pass: all samples of all branches."""
        return self.samples * len(self.branches)

    def __str__(self) -> str:
        branches = " and ".join(self.branches) or "no branch"
        return f"the call's {self.rows} rows ({self.samples} samples of {branches})"

    def at(self, site: str, branch: str, call: int = 0) -> At:
        """Describe a tensor met within this call."""
        return At(site, self.step, self.timestep, self.evaluation, branch, self.samples, call)


@dataclass(frozen=True)
class Prediction:
    """What the denoiser really evaluated in one call: branch → (sample, channel, y, x), as the scheduler understands it."""

    outputs: dict[str, torch.Tensor]
    call: DenoiserCall
