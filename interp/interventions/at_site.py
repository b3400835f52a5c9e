"""Changing what passes at a site: which branch, text tokens, region and channels of the tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch

from interp.capture import Capture, Region
from interp.capture_values import check_region
from interp.captured import grid_of
from interp.catalog import dry_run, match_sites, split_site
from interp.errors import InterpError, nearest, sentence_list
from interp.families import Family
from interp.hooks import At, HookRegistry
from interp.interventions.base import Batch, Intervention, frozen
from interp.interventions.claims import claim
from interp.interventions.masks import Mask, kept_mask, on_grid, read_mask
from interp.interventions.places import BRANCHES, Place, TextCalls, present
from interp.token_choice import Item, find_tokens

DIMS = {1: "(channel)", 2: "(position, channel)", 3: "(channel, y, x)"}

Change = Callable[[torch.Tensor, At, str], torch.Tensor | None]
"""(tensor (sample, …), at, branch) → what takes its place, or None to leave it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class _Part(Intervention):
    branch: Literal["cond", "uncond", "both"] = "cond"
    tokens: tuple[Item, ...] | None = None
    region: Region | None = None
    mask: Mask | None = None
    channels: tuple[int, ...] | None = None


class AtSite(_Part):
    """Change what passes at a site, in the window's steps and in the chosen part of the tensor.

    Args:
        branch: `"cond"` (default), `"uncond"` or `"both"`. A text encoder reads the prompt first, then the negative
            prompt: these are its branches.
        tokens: Text positions to change, where the site has text positions: numbers, words (`"red"`, `"{subject}"` for
            the text in a column of the prompt table) and roles (`"bos"`, `"word"`, `"eos"`, `"pad"`). Default all.
        region: (top, left, bottom, right) in fractions of the picture, where the site is a picture. Default all of it.
        mask: The places to change, where the site is a picture: (height, width), above 0 inside, of any resolution; or the
            path of a `.npy` or `.safetensors` file that holds it. A cell of the site is changed if at least half of it is
            inside.
        channels: Numbers of the channels to change. Default all.
    """

    site: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.as_tuples("tokens", "channels")
        if self.region is not None:
            object.__setattr__(self, "region", frozen(self.region))
            check_region(self.region, type(self).__name__)
        if self.mask is not None:
            object.__setattr__(self, "mask", kept_mask(self.mask))
        if self.branch not in BRANCHES:
            raise InterpError(f"{self!r}: branch is {sentence_list(BRANCHES)}{nearest(str(self.branch), BRANCHES)}")
        if not isinstance(self.site, str):
            raise InterpError(f"{self!r}: site is a name or glob, e.g. 'unet.mid_block:out'")
        if split_site(self.site)[1] not in ("in", "out"):
            raise InterpError(
                f"{self!r}: give a site's ':in' or ':out'; attention itself is changed by ScaleAttention, InjectAttention "
                "and AblateHeads"
            )
        if self.branch != "cond" and any(isinstance(t, str) for t in self.tokens or ()):
            raise InterpError(f"{self!r}: words and roles are those of the prompt, so they need branch='cond'")

    def claims(self) -> frozenset[str]:
        """The site's part; interventions that *add* to it claim nothing and compose."""
        return self._claimed([":".join(split_site(self.site))])

    def claims_in(self, family: Family) -> frozenset[str]:
        """The same, of the sites by name."""
        return self._claimed(self.writes(family))

    def _claimed(self, sites: Sequence[str]) -> frozenset[str]:
        cells = None
        if self.mask is not None:
            inside = read_mask(self.mask)
            cells = ["x".join(map(str, inside.shape)), *inside.flatten().nonzero().flatten().tolist()]
        parts = {"tokens": self.tokens, "region": self.region, "channels": self.channels, "cells": cells}
        return frozenset(claim(f"site {site}", branch=BRANCHES[self.branch], **parts) for site in sites)

    def writes(self, family: Family) -> list[str]:
        """The sites that it names."""
        return match_sites(family, self.site)

    def acts_on(self) -> tuple[str, ...]:
        """The branches whose rows are changed."""
        return BRANCHES[self.branch]

    def change(self, hooks: HookRegistry, place: Place) -> Change:
        """Return what is done to each tensor of one branch; the part that is not chosen is put back afterwards."""
        raise NotImplementedError

    def check_place(self, place: Place) -> None:
        """Raise InterpError if a site cannot be changed this way."""

    def check_batch(self, family: Family, batch: Batch) -> None:
        """Every site must exist and have the chosen part."""
        for place in self._places(family, batch):
            if place.of_text_encoder and self.steps(batch.timeline) not in ({*range(len(batch.timeline))}, frozenset()):
                raise InterpError(
                    f"{self!r}: a text encoder runs once, before the first step, so a window has no meaning at {place.site!r}"
                )
            if place.shape is not None:
                self.part(place, place.shape)
            elif self.region is not None or self.mask is not None:
                raise InterpError(f"{self!r}: a text encoder has no picture, so no region of it")
            elif self.tokens is not None:
                self._text_positions(place)
            self.check_place(place)

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Write at each site in the window's steps."""
        steps = self.steps(batch.timeline)
        if steps:
            for place in self._places(hooks.family, batch):
                hooks.write(place.site, self._writer(hooks, place), {-1} if place.of_text_encoder else steps)

    def _places(self, family: Family, batch: Batch) -> list[Place]:
        return [Place(site, family, batch) for site in self.writes(family)]

    def _writer(self, hooks: HookRegistry, place: Place) -> Callable[[torch.Tensor, At], torch.Tensor | None]:
        wanted, change = BRANCHES[self.branch], self.change(hooks, place)
        reading = TextCalls(hooks, place.root) if place.of_text_encoder else None
        if reading is not None:
            hooks.on_step(lambda _: self._check_read(place, reading.read))
        parts: dict[tuple[int, ...], torch.Tensor | None] = {}

        def write(tensor: torch.Tensor, at: At) -> torch.Tensor | None:
            branch = at.branch if reading is None else reading.branch
            if branch not in wanted:
                return None
            here = present(at)
            if len(tensor) != len(here) or max(here) >= len(place.batch.rows):
                raise InterpError(
                    f"{self!r}: {len(tensor)} rows pass at {place.site!r} where {len(place.batch.rows)} samples run"
                )
            shape = tuple(tensor.shape[1:])
            if shape not in parts:
                part = self.part(place, shape)
                parts[shape] = part if part is None else part.to(tensor.device)
            new, part = change(tensor, at, branch), parts[shape]
            if part is not None and len(part) > 1:
                part = part[here]
            return new if part is None or new is None else torch.where(part, new.to(tensor), tensor)

        return write

    def _check_read(self, place: Place, read: Sequence[str]) -> None:
        """Some pipelines take zeros for an empty negative prompt, and no encoder runs."""
        guided = place.family.guided(place.batch.arguments)
        lacking = [b for b in BRANCHES[self.branch] if b not in read and (guided or b == "cond")]
        if lacking:
            raise InterpError(
                f"{self!r}: {place.root!r} read no prompt of the branch {lacking[0]!r}, so nothing could be changed there at "
                f"{place.site!r}; {'give a negative prompt, or say' if lacking == ['uncond'] else 'say'} branch='cond'"
            )

    # The chosen part

    def part(self, place: Place, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Return which entries are changed: bool (sample, …) or (1, …), or None for all.

        shape: one sample's, without the sample dimension.

        Raises:
            InterpError: the site has no such part.
        """
        chosen = [
            self._of_channels(place, shape) if self.channels is not None else None,
            self._of_picture(place, shape) if self.region is not None or self.mask is not None else None,
            self._of_tokens(place, shape) if self.tokens is not None else None,
        ]
        given = [one for one in chosen if one is not None]
        return reduce(torch.logical_and, given) if given else None

    def _of_channels(self, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
        axis = 1 if len(shape) == 2 else 0
        wrong = [c for c in self.channels or () if not 0 <= c < shape[axis]]
        if wrong:
            raise InterpError(
                f"{self!r}: there is no channel {wrong[0]} at {place.site!r}, which has 0–{shape[axis] - 1}"
            )
        mask = torch.zeros(1, *shape, dtype=torch.bool)
        mask.index_fill_(1 + axis, torch.tensor(self.channels), True)
        return mask

    def _of_picture(self, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
        grid: tuple[int, int] | None = (shape[1], shape[2]) if len(shape) == 3 else None
        if len(shape) == 2:
            _, grids = dry_run(place.family, place.batch.arguments)
            grid = grid_of(("position", "feature"), shape, split_site(place.site)[0], grids)
        if grid is None:
            raise InterpError(
                f"{self!r}: what passes at {place.site!r} is {self._dims(shape)} and no picture; leave region and mask out"
            )
        cells = torch.ones(grid, dtype=torch.bool) if self.mask is None else on_grid(read_mask(self.mask), grid)
        inside = torch.zeros_like(cells)
        inside[Capture(region=self.region).chosen_cells(grid)] = True
        cells = cells & inside
        if not cells.any():
            raise InterpError(
                f"{self!r}: no cell of {place.site!r}, {grid[0]}×{grid[1]}, lies in the mask by half or more; give a larger one"
            )
        return cells.expand(1, *shape) if len(shape) == 3 else cells.flatten()[:, None].expand(1, *shape)

    def _of_tokens(self, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
        length = max(len(t.ids) for t in place.tokens)
        if len(shape) != 2 or shape[0] != length:
            raise InterpError(
                f"{self!r}: what passes at {place.site!r} is {self._dims(shape)} and not the {length} positions of the text; "
                "leave tokens out"
            )
        mask = torch.zeros(len(place.batch.rows), *shape, dtype=torch.bool)
        for row, positions in zip(mask, self._text_positions(place), strict=True):
            row[positions] = True
        return mask

    def _text_positions(self, place: Place) -> list[list[int]]:
        return [
            find_tokens(self.tokens or (), tokens, row, repr(self))
            for tokens, row in zip(place.tokens, place.batch.rows, strict=True)
        ]

    def _dims(self, shape: tuple[int, ...]) -> str:
        return f"{DIMS.get(len(shape), 'a tensor')} {'×'.join(map(str, shape))}"
