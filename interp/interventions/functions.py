"""Edits that are Python: a function at a site, or blocks that nnsight stored. A run names them and cannot rebuild them."""

import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from interp.catalog import match_sites
from interp.errors import InterpError
from interp.families import Family
from interp.hooks import At, HookRegistry, SiteFunction
from interp.interventions.base import Batch, Intervention


@dataclass(frozen=True, repr=False)
class Edit(Intervention):
    """Replace a tensor by what a function of yours returns.

    Args:
        fn: `fn(tensor, at) -> tensor or None`; the tensor is (sample, …) of one branch, None leaves it as it is.
        site: A site or glob, e.g. `"unet.mid_block:out"`; see `interp.sites`.

    The function itself is not written into the run: its name and source text are, marked `serialisable: False`.

    >>> Edit(abs, "unet.mid_block:out", start=0.5)
    Edit(start=0.5, fn=<built-in function abs>, site='unet.mid_block:out')
    """

    fn: SiteFunction
    site: str

    name: ClassVar[str] = "edit"
    serialisable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn) or not isinstance(self.site, str):
            raise InterpError(f"{self!r}: give a function of (tensor, at), and a site, e.g. 'unet.mid_block:out'")

    def writes(self, family: Family) -> list[str]:
        """The sites that it names."""
        return match_sites(family, self.site)

    def check_batch(self, family: Family, batch: Batch) -> None:
        """The site must exist; a text encoder's is met once, whatever the window."""
        partial = len(self.steps(batch.timeline)) not in (0, len(batch.timeline))
        for site in self.writes(family):
            if partial and site.partition(".")[0].partition(":")[0] in family.text_encoders:
                raise InterpError(
                    f"{self!r}: a text encoder runs once, before the first step, so a window has no meaning at {site!r}"
                )

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Write at the site in the steps of the window."""
        steps = self.steps(batch.timeline)
        whole = len(steps) == len(batch.timeline)

        def write(tensor: torch.Tensor, at: At) -> torch.Tensor | None:
            if at.step < 0:  # a text encoder, before the first step; not when it encodes another intervention's prompt
                return self.fn(tensor, at) if whole and hooks.arguments is not None else None
            return self.fn(tensor, at) if at.step in steps else None

        hooks.write(self.site, write, {-1, *steps})

    def spec(self) -> dict[str, Any]:
        """Name, window, site, and what can be said of the function."""
        return self.written({"site": self.site, "fn": _named(self.fn), "source": _source(self.fn)})


@dataclass(frozen=True, repr=False)
class NNsightEdit(Intervention):
    """Run the edits that an nnsight model stores, within the window.

    Args:
        model: What `with interp.nnsight(pipe).edit() as (tracer, edited): …` calls `edited`.

    A block begins with the window's first step: `tracer.iter[0]` is that step, `tracer.iter[:]` all of the window. It
    sees all rows of a call, both branches. The blocks are written into the run as text, marked `serialisable: False`.
    """

    model: Any

    name: ClassVar[str] = "nnsight_edit"
    serialisable: ClassVar[bool] = False

    def __repr__(self) -> str:
        window = "".join(f", {k}={v!r}" for k, v in self.window().items() if v not in (None, "fraction"))
        return f"NNsightEdit(…{window})"

    def check(self, table: Mapping[str, Sequence[Any]], guided: bool) -> None:
        """The model must be ours and hold edits."""
        from interp.envoy import edits

        edits(self.model)

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Let the blocks run in the steps of the window."""
        from interp.envoy import run_edits

        steps = self.steps(batch.timeline)
        if steps:
            run_edits(hooks, self.model, steps, whole=len(steps) == len(batch.timeline))

    def spec(self) -> dict[str, Any]:
        """Name, window, and the blocks as they were written."""
        from interp.envoy import edits, source

        return self.written({"edits": [source(e) for e in edits(self.model)]})


def _named(fn: Any) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', type(fn).__name__)}"


def _source(fn: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(fn)).strip()
    except (OSError, TypeError):
        return ""
