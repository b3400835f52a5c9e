"""Putting other activations in place of those at a site: another sample's, zeros, or means."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from interp.errors import InterpError, nearest
from interp.hooks import At, HookRegistry
from interp.interventions.at_site import AtSite, Change
from interp.interventions.places import BRANCHES, Place, present
from interp.interventions.sources import BATCH, Choice, Sourced, Stored, kept_source, opened
from interp.stores import Run


class _FromRun(Sourced, AtSite):
    """What `Patch` and `Ablate` share: activations of a stored run."""

    condition: str | None
    source_step: int | None

    def _choice(self) -> Choice:
        return Choice(self.condition)

    def _stored(self, place: Place, positions: Sequence[int]) -> Stored:
        assert self.source is not None
        return Stored(opened(self.source), place.site, positions, self.source_step)

    def _check_stored(self, place: Place, positions: Sequence[int]) -> None:
        try:
            steps = sorted(self.steps(place.batch.timeline))
            self._stored(place, positions).check(place.shape or (), BRANCHES[self.branch], steps, place.batch)
        except InterpError as error:
            raise InterpError(f"{self._named()}: {error}") from error


@dataclass(frozen=True, repr=False)
class Patch(_FromRun):
    """Put another sample's activation in place of what passes at a site (activation patching, causal tracing).

    Args:
        source: A run or its path, whose capture holds the site (`Capture(sites=(site,))`); or `"batch"`: a live sample
            of the same batch.
        site: A site or glob `path:in` or `path:out`, see `interp.sites`. In a text encoder, whose states a run does
            not hold, the state that the source's prompt has there is computed again.
        condition: Whose samples are taken; default is the only one, or `baseline`.
        row: Row of the prompt table whose sample is taken; `"{column}"` names a column that holds it. Default is the
            sample's own row. The seed is always the sample's own.
        sample: Number of the one sample that is taken for all, instead.
        source_step: The step to take; default is the step that is being computed.
        branch, tokens, region, mask, channels: The part that is changed; the same part is taken. See `AtSite`.
        start, stop, unit: The window of steps.

    A run keeps the first evaluation of each step, so further ones (Heun) are left as they are. A patch from the same
    sample changes nothing, to the last bit. Source: Meng et al., arXiv:2202.05262; for diffusion Basu et al.,
    arXiv:2310.13730.

    >>> Patch("clean.zarr", "unet.mid_block:out", stop=0.4)
    Patch(stop=0.4, source='clean.zarr', site='unet.mid_block:out')
    """

    source: str | Run
    site: str
    condition: str | None = None
    row: int | str | None = None
    sample: int | None = None
    source_step: int | None = None

    name: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "source", kept_source(self.source, type(self).__name__))
        if self.sample is not None and (self.row is not None or self.condition is not None):
            raise InterpError(f"{self!r}: a sample number says all; leave out row and condition")

    def _choice(self) -> Choice:
        return Choice(self.condition, self.row, self.sample)

    def check_place(self, place: Place) -> None:
        """The source must hold the site, and a sample for each of the batch's."""
        if self.source == BATCH:
            if self.source_step is not None:
                raise InterpError(f"{self!r}: a live sample is at the same step; leave out source_step")
            self._rows(place)
        elif place.of_text_encoder:
            self._prompts(place)
        else:
            self._check_stored(place, self._positions(place))

    def change(self, hooks: HookRegistry, place: Place) -> Change:
        """The other sample's tensor, whole."""
        if self.source == BATCH:
            rows = self._rows(place)
            return lambda tensor, at, branch: tensor[self._alive(rows, at)]
        if place.of_text_encoder:
            return self._encoded(hooks, place)
        stored = self._stored(place, self._positions(place))
        return lambda tensor, at, branch: (
            None if at.evaluation else stored.read(at.step, branch)[present(at)].to(tensor)
        )

    def _alive(self, rows: list[int], at: At) -> list[int]:
        """Where the samples that are taken lie in a tensor."""
        here = present(at)
        lacking = [rows[i] for i in here if rows[i] not in here]
        if lacking:
            raise InterpError(
                f"{self!r}: sample {lacking[0]} of the batch is not evaluated in the branch {at.branch!r} of step {at.step}, "
                "so its activation cannot be taken alive"
            )
        return [here.index(rows[i]) for i in here]

    def _rows(self, place: Place) -> list[int]:
        try:
            return self._choice().within(place.batch)
        except InterpError as error:
            raise InterpError(f"{self!r}: {error}") from error

    def _positions(self, place: Place) -> list[int]:
        assert self.source is not None
        try:
            return self._choice().positions(opened(self.source), place.batch)
        except InterpError as error:
            raise InterpError(f"{self._named()}: {error}") from error

    def _prompts(self, place: Place) -> list[str]:
        """The source samples' prompts, whose states are computed again: so the source must not have changed them."""
        if self.branch != "cond":
            raise InterpError(
                f"{self!r}: at a text encoder's site a prompt's states are put back, so branch must be 'cond'"
            )
        table, positions = opened(self.source).samples, self._positions(place)
        changed = dict(opened(self.source).attrs.get("conditions") or {})
        for condition in dict.fromkeys(table["condition"].iloc[positions]):
            if changed.get(condition):
                raise InterpError(
                    f"{self._named()}: its condition {condition!r} is changed, and the states of a text encoder are not stored "
                    "but computed again from the prompt; name an unchanged condition"
                )
        return [str(p) for p in table["prompt"].iloc[positions]]

    def _encoded(self, hooks: HookRegistry, place: Place) -> Change:
        caught: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, at: At) -> None:
            if hooks.arguments is None:
                caught.append(tensor.clone())

        hooks.read(place.site, keep)
        hooks.family.encode(self._prompts(place), place.batch.arguments)
        if len(caught) != 1:
            raise InterpError(
                f"{self!r}: {place.site!r} ran {len(caught)} times while a prompt was encoded, where one was expected"
            )
        return lambda tensor, at, branch: caught[0]


@dataclass(frozen=True, repr=False)
class Ablate(_FromRun):
    """Take out what passes at a site: zeros, or a mean in its place.

    Args:
        site: A site or glob `path:in` or `path:out`.
        value: `"zero"`; or `"mean"`: without `source` each sample's own mean over positions (of the picture, or of the
            text), channel by channel; with `source` the mean over the samples of a stored run that captured the
            site, position by position (mean ablation).
        source: That run or its path.
        condition: Whose samples are averaged; default is the only one, or `baseline`.
        source_step: The step to take; default is the step that is being computed.
        branch, tokens, region, mask, channels: The part that is changed; see `AtSite`.
        start, stop, unit: The window of steps.

    >>> Ablate("unet.mid_block.attentions.0:out", start=0.5)
    Ablate(start=0.5, site='unet.mid_block.attentions.0:out')
    """

    site: str
    value: Literal["zero", "mean"] = "zero"
    source: str | Run | None = None
    condition: str | None = None
    source_step: int | None = None

    name: ClassVar[str] = "ablate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value not in ("zero", "mean"):
            raise InterpError(f"{self!r}: value is 'zero' or 'mean'{nearest(str(self.value), ('zero', 'mean'))}")
        if self.source is None:
            if self.condition is not None or self.source_step is not None:
                raise InterpError(f"{self!r}: condition and source_step choose within a source; give source=")
            return
        object.__setattr__(self, "source", kept_source(self.source, type(self).__name__))
        if self.value != "mean" or self.source == BATCH:
            raise InterpError(
                f"{self!r}: a source is a stored run whose mean is taken: value='mean', source='run.zarr'"
            )

    def check_place(self, place: Place) -> None:
        """A mean needs positions, or a source that captured the site."""
        if self.source is not None:
            if place.of_text_encoder:
                raise InterpError(f"{self!r}: runs hold no states within text encoders, so there is no mean of them")
            self._check_stored(place, self._all(place))
        elif self.value == "mean" and place.shape is not None and len(place.shape) < 2:
            raise InterpError(
                f"{self!r}: what passes at {place.site!r} has no positions to average over; give source=, or value='zero'"
            )

    def change(self, hooks: HookRegistry, place: Place) -> Change:
        """Zeros, or the mean."""
        if self.value == "zero":
            return lambda tensor, at, branch: torch.zeros_like(tensor)
        if self.source is None:
            return lambda tensor, at, branch: _over_positions(tensor)
        stored, known = self._stored(place, self._all(place)), dict[tuple[int, str], torch.Tensor]()

        def mean(tensor: torch.Tensor, at: At, branch: str) -> torch.Tensor:
            if (at.step, branch) not in known:
                known.clear()  # of the step before
                known[at.step, branch] = stored.read(at.step, branch).mean(0, keepdim=True)
            return known[at.step, branch].to(tensor).expand_as(tensor)

        return mean

    def _all(self, place: Place) -> list[int]:
        """Positions in the source of all finished samples of the condition."""
        assert self.source is not None
        try:
            run = opened(self.source)
            rows = (run.samples["condition"] == self._choice().condition_of(run)) & (run.samples["status"] == 1)
        except InterpError as error:
            raise InterpError(f"{self._named()}: {error}") from error
        return [int(i) for i in np.flatnonzero(rows)]


def _over_positions(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over positions, channel by channel: (sample, channel, y, x) or (sample, position, channel)."""
    dims = (2, 3) if tensor.ndim == 4 else (1,)
    return tensor.mean(dims, keepdim=True).expand_as(tensor)
