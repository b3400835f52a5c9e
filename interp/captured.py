"""What a capture selects of a pipeline: attention sites, module sites and reductions, with their shapes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from interp.capture import AttentionPart, Capture, Reducer
from interp.catalog import attention_sites, dry_run, match_sites
from interp.errors import InterpError
from interp.families import Arguments, Family
from interp.hooks import At
from interp.named_reductions import Named, named
from interp.rehearsal import BESIDE, LATENTS, TEXT, Passing, passing
from interp.stores.table import ROLES

UPDATE = "update"
"""Quantity of a module: output − input, what a block adds to the residual stream."""


@dataclass(frozen=True)
class SiteCapture:
    """A site to keep: its name `path:quantity`, one sample's dims and shape, and what of it is kept.

    `cells` are the flat positions (dims `position`) or the rows and columns (dims `y`, `x`) of the captured region,
    None where everything is kept; `grid` (height, width) is what the positions are a picture of, if they are one.
    """

    site: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    grid: tuple[int, int] | None = None
    cells: np.ndarray | tuple[slice, slice] | None = field(default=None, compare=False)
    image: Literal["first", "last"] | None = None
    """Where the image's positions lie, if the text's beside them are left out: they are as many as a prompt has tokens."""
    of: frozenset[str] = frozenset({LATENTS, TEXT})
    """What it depends on: the latents (and the time), the text, both, or neither; or on text that is left out of it."""

    @property
    def quantity(self) -> str:
        """What of the module: `in`, `out`, `update`, `q`, `k` or `v`."""
        return self.site.rpartition(":")[2]

    @property
    def sources(self) -> tuple[str, ...]:
        """The sites that are read for it."""
        path = self.site.rpartition(":")[0]
        return (f"{path}:in", f"{path}:out") if self.quantity == UPDATE else (self.site,)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cut a batch's tensor (sample, …) to what is kept, as a copy: later modules may work in place."""
        if self.image is not None and self.grid is not None:
            dim, count = 1 + self.dims.index("position"), math.prod(self.grid)
            tensor = tensor.narrow(dim, 0 if self.image == "first" else tensor.shape[dim] - count, count)
        if isinstance(self.cells, tuple):
            return tensor.detach()[(..., *self.cells)].clone()
        if self.cells is not None:
            index = torch.from_numpy(self.cells).to(tensor.device, non_blocking=True)
            return tensor.detach().index_select(1 + self.dims.index("position"), index)
        return tensor.detach().clone()


@dataclass(frozen=True)
class ReduceCapture:
    """A reduction of attention to keep: its name, function, layers in order, and dims and shape of one sample's result.

    named: one of those that go by name, whose result may be added up over steps and layers.
    """

    name: str
    layers: list[AttentionPart]
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    fn: Reducer | None = None
    named: Named | None = None

    @property
    def over(self) -> tuple[str, ...]:
        """What it is added up over, of `step` and `layer`."""
        return () if self.named is None else self.named.over

    @property
    def largest(self) -> tuple[int, int]:
        """The largest of its layers' grids."""
        return max((one.site.grid for one in self.layers), key=math.prod)


def captured_attention(family: Family, capture: Capture, arguments: Arguments) -> list[AttentionPart]:
    """Return the parts of attention that a capture selects; their sites have grids."""
    if capture.attention is None:
        return []
    _, grids = dry_run(family, arguments)
    sites = [replace(s, grid=grids[s.name]) for s in attention_sites(family)]
    return capture.chosen_attention(sites, family.without_probabilities())


def captured_sites(family: Family, capture: Capture, arguments: Arguments) -> list[SiteCapture]:
    """Return the sites that a capture selects, in the order of its patterns, each once.

    Raises:
        InterpError: a pattern matches nothing, or a site has no labelled shape or does not run.
    """
    wanted = dict.fromkeys(site for pattern in capture.sites for site in _matched(family, pattern))
    if not wanted:
        return []
    sources = [s for site in wanted for s in SiteCapture(site, (), ()).sources]
    met = passing(family, sorted({*sources}), arguments)
    _, grids = dry_run(family, arguments)
    kinds = {s.name: s.kind for s in attention_sites(family)}
    found = [_site(family, capture, site, met, grids, kinds) for site in wanted]
    return _of_the_image(family, capture, found, arguments) if family.ragged else found


def _of_the_image(
    family: Family, capture: Capture, sites: list[SiteCapture], arguments: Arguments
) -> list[SiteCapture]:
    """Leave the text out of sites that hold it beside the image, where its length depends on the prompt."""
    shorter = {**arguments, "max_sequence_length": family.text_length(arguments) // 2}
    sources = sorted({s.sources[0] for s in sites})
    whole, less = ({s: p.shape for s, p in passing(family, sources, a).items()} for a in (arguments, shorter))
    grid, found = family.grid(arguments), []
    assert grid is not None
    for site in sites:
        if whole[site.sources[0]] == less[site.sources[0]]:
            found.append(site)
            continue
        count = whole[site.sources[0]][site.dims.index("position")] if "position" in site.dims else 0
        if count - family.text_length(arguments) < math.prod(grid):
            raise InterpError(
                f"Capture(sites={site.site!r}): it holds as many positions as a prompt has tokens, which differ in number; "
                "read it with interp.HookRegistry"
            )
        shape = tuple(math.prod(grid) if d == "position" else n for d, n in zip(site.dims, site.shape, strict=True))
        plain = SiteCapture(site.site, site.dims, shape, grid, of=site.of - {BESIDE})
        found.append(replace(_cropped(capture, plain), image=family.image_lies))
    return found


def _matched(family: Family, pattern: str) -> list[str]:
    if pattern.endswith(f":{UPDATE}"):
        return [f"{s.rpartition(':')[0]}:{UPDATE}" for s in match_sites(family, pattern.removesuffix(UPDATE) + "out")]
    found = match_sites(family, pattern)
    if found[0].endswith(":probs"):
        captured_attention(family, Capture(attention=pattern), family.arguments())  # refuses what it has no place for
        raise InterpError(
            f"Capture(sites={pattern!r}) asks for attention probabilities; keep them by Capture(attention={pattern!r})"
        )
    return found


def _site(
    family: Family, capture: Capture, site: str, met: dict[str, Passing],
    grids: dict[str, tuple[int, int]], kinds: dict[str, str],
) -> SiteCapture:  # fmt: skip
    one = SiteCapture(site, (), ())
    missing = [s for s in one.sources if s not in met]
    path = site.rpartition(":")[0]
    if missing:
        where = (
            " (text='layers' keeps the text encoders' hidden states)"
            if path.split(".")[0] in family.text_encoders
            else ""
        )
        raise InterpError(
            f"Capture(sites={site!r}): no tensor passes there in a plain call of the denoiser, so it cannot be kept{where}"
        )
    first, last = met[one.sources[0]].shape, met[one.sources[-1]].shape
    if first != last:
        raise InterpError(
            f"Capture(sites={site!r}): the module's input has shape {first} and its output {last}, so there is no "
            "difference; name a residual block"
        )
    dims = _dims(one.quantity, first, kinds.get(path, ""))
    if dims is None:
        raise InterpError(f"{site!r} has shape {first}, which has no labels; read it with interp.HookRegistry")
    of = frozenset().union(*(met[s].of for s in one.sources))
    return _cropped(capture, SiteCapture(site, dims, first, grid_of(dims, first, path, grids), of=of))


def _dims(quantity: str, shape: tuple[int, ...], kind: str) -> tuple[str, ...] | None:
    if quantity in ("q", "k", "v"):
        keys = quantity != "q"
        return ("head", "token" if keys and kind == "cross" else "position", "feature")
    return {1: ("feature",), 2: ("position", "feature"), 3: ("channel", "y", "x")}.get(len(shape))


def grid_of(
    dims: tuple[str, ...], shape: tuple[int, ...], path: str, grids: dict[str, tuple[int, int]]
) -> tuple[int, int] | None:
    """The grid that a site's positions are a picture of: that of the attention within it, or of as many positions."""
    if "position" not in dims:
        return None
    count = shape[dims.index("position")]
    near = [g for name, g in grids.items() if name.startswith(f"{path}.") or name == path]
    fitting = {g for g in near or grids.values() if g[0] * g[1] == count}
    return fitting.pop() if len(fitting) == 1 else None


def _cropped(capture: Capture, site: SiteCapture) -> SiteCapture:
    if capture.region is None:
        return site
    if site.dims == ("channel", "y", "x"):
        rows, columns = capture.chosen_cells((site.shape[1], site.shape[2]))
        cut = (site.shape[0], rows.stop - rows.start, columns.stop - columns.start)
        return replace(site, shape=cut, cells=(rows, columns))
    if "position" not in site.dims or site.quantity in ("k", "v"):
        return site
    if site.grid is None:
        raise InterpError(
            f"Capture(region=…, sites={site.site!r}): its {site.shape[site.dims.index('position')]} positions are no "
            "picture; capture it without region"
        )
    cells = np.arange(site.grid[0] * site.grid[1]).reshape(site.grid)[capture.chosen_cells(site.grid)].ravel()
    shape = tuple(len(cells) if d == "position" else n for d, n in zip(site.dims, site.shape, strict=True))
    return replace(site, shape=shape, cells=cells)


def captured_reductions(family: Family, capture: Capture, arguments: Arguments, columns: int) -> list[ReduceCapture]:
    """Return the reductions that a capture names; functions are tried on uniform probabilities for their shape.

    `columns` is the number of token columns.

    Raises:
        InterpError: a glob matches nothing, the function fails, or its shape differs between layers.
    """
    found = []
    for name, (glob, fn) in capture.reducers.items():
        layers = captured_attention(family, Capture(attention=glob), arguments)
        if isinstance(fn, str):
            found.append(_named_reduction(capture, name, fn, layers, columns))
            continue
        shapes = {
            _reduced_shape(
                name, fn, one, math.prod(c.stop - c.start for c in capture.chosen_cells(one.site.grid)),
                family.text_length(arguments),
            )
            for one in layers
        }  # fmt: skip
        if len(shapes) > 1:
            raise InterpError(
                f"Capture(reduce={name!r}) gives different shapes for different layers ({sorted(shapes)}); return one "
                "shape, or name layers of one grid: reduce={name: (glob, function)}"
            )
        shape = shapes.pop()
        found.append(ReduceCapture(name, layers, shape, tuple(f"axis_{i}" for i in range(len(shape))), fn))
    return found


def _named_reduction(
    capture: Capture, name: str, reduction: str, layers: list[AttentionPart], columns: int
) -> ReduceCapture:
    chosen = named(reduction, name)
    wrong = [one.name for one in layers if chosen.of_text and one.part != "cross"]
    if wrong:
        raise InterpError(
            f"Capture(reduce={name!r}): {reduction!r} is of image → text, which {wrong[0]!r} has not; choose other layers "
            "by (glob, name)"
        )
    one = ReduceCapture(name, layers, (), chosen.dims, named=chosen)
    y, x = (cells.stop - cells.start for cells in capture.chosen_cells(one.largest))
    sizes = {"head": max(one.site.heads for one in layers), "role": len(ROLES), "token": columns, "y": y, "x": x}
    return replace(one, shape=tuple(sizes[d] for d in chosen.dims))


def _reduced_shape(name: str, fn: Reducer, one: AttentionPart, image: int, text: int) -> tuple[int, ...]:
    site = one.site
    sizes = {
        "cross": (image, text),
        "self": (image, math.prod(site.grid)),
        "text": (text, image),
        "within_text": (text, text),
    }
    queries, keys = sizes[one.part]
    at = At(f"{site.name}:probs", 0, 0.0, 0, "cond", 1)
    try:
        result = fn(torch.full((1, site.heads, queries, keys), 1 / keys), at)
        shape = tuple(result.shape)
    except Exception as error:
        raise InterpError(
            f"Capture(reduce={name!r}) fails on probabilities (sample 1, head {site.heads}, query {queries}, key {keys}): "
            f"{type(error).__name__}: {error}"
        ) from error
    if not shape or shape[0] != 1:
        raise InterpError(f"Capture(reduce={name!r}) must return (sample, …), but gave shape {shape} for one sample")
    return shape[1:]


def attention_groups(attention: Sequence[AttentionPart]) -> dict[str, list[AttentionPart]]:
    """Sort parts of attention into the store's groups, one a part and grid."""
    groups: dict[str, list[AttentionPart]] = {}
    for one in attention:
        node = "attention" if one.part == "cross" else f"{one.part}_attention"
        groups.setdefault(f"{node}/{one.site.grid[0]}x{one.site.grid[1]}", []).append(one)
    return groups


def site_node(site: str) -> str:
    """Return the store's group of a site: `sites/unet.mid_block` for its output, `sites/unet.mid_block:in`, …."""
    return f"sites/{site.removesuffix(':out')}"
