"""Where an intervention acts: a site, and which branch, text tokens, region and channels of the tensor that passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from interp.capture import Capture, Region
from interp.capture_values import check_region
from interp.captured import grid_of
from interp.catalog import dry_run, match_sites, split_site
from interp.errors import InterpError, nearest, sentence_list
from interp.families import Family
from interp.hooks import At, HookRegistry
from interp.interventions.base import Batch, Intervention
from interp.rehearsal import site_shapes
from interp.token_choice import Item, find_tokens
from interp.tokens import Tokens, tokenize

BRANCHES = {"cond": ("cond",), "uncond": ("uncond",), "both": ("cond", "uncond")}
DIMS = {1: "(channel)", 2: "(position, channel)", 3: "(channel, y, x)"}

Change = Callable[[torch.Tensor, At, str], torch.Tensor | None]
"""(tensor (sample, …), at, branch) → what takes its place, or None to leave it."""


@dataclass(frozen=True)
class Place:
    """One site of a model as an intervention sees it: `path:quantity`, and whether it is a text encoder's."""

    site: str
    family: Family
    batch: Batch

    @property
    def root(self) -> str:
        """The pipeline's attribute that holds the site."""
        return self.site.partition(".")[0].partition(":")[0]

    @property
    def of_text_encoder(self) -> bool:
        """Whether the site is met once, before the first step."""
        return self.root in self.family.text_encoders

    @cached_property
    def shape(self) -> tuple[int, ...] | None:
        """One sample's shape in the denoiser, without running it; None in a text encoder.

        Raises:
            InterpError: nothing passes there.
        """
        if self.of_text_encoder:
            return None
        path, quantity = split_site(self.site)
        if quantity == "out":
            found = dry_run(self.family, self.batch.arguments)[0].get(path)
        else:
            found = site_shapes(self.family, [self.site], self.batch.arguments).get(self.site)
        if found is None:
            raise InterpError(
                f"no tensor passes at {self.site!r} in a call of the denoiser, so nothing can be changed there"
            )
        return found

    @cached_property
    def tokens(self) -> list[Tokens]:
        """The prompts' tokens at the positions of this site's text."""
        if not self.of_text_encoder:
            return self.batch.tokens
        span = self.family.text_segments(self.batch.arguments).get(self.root)
        if span is not None:
            return [t.part(span) for t in self.batch.tokens]
        tokenizer = self.family.text_encoders[self.root][0]
        return [tokenize(tokenizer, str(row["prompt"])) for row in self.batch.rows]


@dataclass(frozen=True, kw_only=True, repr=False)
class _Part(Intervention):
    branch: Literal["cond", "uncond", "both"] = "cond"
    tokens: tuple[Item, ...] | None = None
    region: Region | None = None
    channels: tuple[int, ...] | None = None


class AtSite(_Part):
    """Change what passes at a site, in the window's steps and in the chosen part of the tensor.

    Args:
        branch: `"cond"` (default), `"uncond"` or `"both"`. A text encoder reads the prompt first, then the negative
            prompt: these are its branches.
        tokens: Text positions to change, where the site has text positions: numbers, words (`"red"`, `"{subject}"` for
            the text in a column of the prompt table) and roles (`"bos"`, `"word"`, `"eos"`, `"pad"`). Default all.
        region: (top, left, bottom, right) in fractions of the picture, where the site is a picture. Default all of it.
        channels: Numbers of the channels to change. Default all.
    """

    site: str

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "channels"):
            value = getattr(self, name)
            if value is not None:
                one = isinstance(value, (str, int))
                object.__setattr__(self, name, (value,) if one else tuple(value))
        if self.region is not None:
            object.__setattr__(self, "region", tuple(self.region))
            check_region(self.region, type(self).__name__)
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
        part = [f"{k}={v}" for k in ("tokens", "region", "channels") if (v := getattr(self, k)) is not None]
        site = ":".join(split_site(self.site))
        return frozenset(":".join([f"site {site}", branch, *part]) for branch in BRANCHES[self.branch])

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
                self.mask(place, place.shape)
            elif self.region is not None:
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
        return [Place(site, family, batch) for site in match_sites(family, self.site)]

    def _writer(self, hooks: HookRegistry, place: Place) -> Callable[[torch.Tensor, At], torch.Tensor | None]:
        wanted, change = BRANCHES[self.branch], self.change(hooks, place)
        reading = TextCalls(hooks, place.root) if place.of_text_encoder else None
        masks: dict[tuple[int, ...], torch.Tensor | None] = {}

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
            if shape not in masks:
                mask = self.mask(place, shape)
                masks[shape] = mask if mask is None else mask.to(tensor.device)
            new, mask = change(tensor, at, branch), masks[shape]
            if mask is not None and len(mask) > 1:
                mask = mask[here]
            return new if mask is None or new is None else torch.where(mask, new.to(tensor), tensor)

        return write

    # The chosen part

    def mask(self, place: Place, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Return which entries are changed: bool (sample, …) or (1, …), or None for all.

        shape: one sample's, without the sample dimension.

        Raises:
            InterpError: the site has no such part.
        """
        chosen = [
            self._of_channels(place, shape) if self.channels is not None else None,
            self._of_region(place, shape) if self.region is not None else None,
            self._of_tokens(place, shape) if self.tokens is not None else None,
        ]
        found = None
        for one in chosen:
            if one is not None:
                found = one if found is None else found & one
        return found

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

    def _of_region(self, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
        cells = Capture(region=self.region).chosen_cells
        mask = torch.zeros(1, *shape, dtype=torch.bool)
        if len(shape) == 3:
            rows, columns = cells((shape[1], shape[2]))
            mask[:, :, rows, columns] = True
            return mask
        _, grids = dry_run(place.family, place.batch.arguments)
        grid = grid_of(("position", "feature"), shape, split_site(place.site)[0], grids) if len(shape) == 2 else None
        if grid is None:
            raise InterpError(
                f"{self!r}: what passes at {place.site!r} is {self._dims(shape)} and no picture; leave region out"
            )
        rows, columns = cells(grid)
        mask.view(*grid, shape[1])[rows, columns] = True
        return mask

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


def present(at: At) -> list[int]:
    """Return which of the batch's samples a tensor holds, in order: a branch may have been dropped for some alone."""
    return list(at.members) if at.members else list(range(at.samples))


class TextCalls:
    """Which prompt a text encoder is reading: pipelines encode the prompt first, then the negative prompt."""

    def __init__(self, hooks: HookRegistry, encoder: str) -> None:
        self._calls = 0
        self._hooks = hooks
        hooks.read(f"{encoder}:in", self._begin)

    def _begin(self, tensor: torch.Tensor, at: At) -> None:
        self._calls += self._hooks.arguments is not None

    @property
    def branch(self) -> str:
        """`cond`, `uncond`, or "" outside of the pipeline's own call, where another prompt is encoded."""
        if self._hooks.arguments is None:
            return ""
        return {1: "cond", 2: "uncond"}.get(self._calls, "")


def neighbours(names: Sequence[str], width: int = 3) -> list[tuple[str, ...]]:
    """Return every run of `width` neighbours of a list, e.g. of the cross-attention layers in running order.

    The layer sweep of LocoGen (Basu et al., arXiv:2405.01008) lets three neighbouring layers read another prompt.

    >>> neighbours(["a", "b", "c", "d"], width=3)
    [('a', 'b', 'c'), ('b', 'c', 'd')]
    """
    if not 1 <= width <= len(names):
        raise InterpError(f"runs of {width} neighbours do not fit {len(names)} names; give a width of 1–{len(names)}")
    return [tuple(names[i : i + width]) for i in range(len(names) - width + 1)]
