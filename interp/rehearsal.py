"""One denoiser call on tensors without data, to learn the shapes that a recording will meet."""

from collections.abc import Hashable, Sequence

import torch

from interp.families import Arguments, Family
from interp.hooks import At, HookRegistry
from interp.structure import structure
from interp.undressing import without_data

_KNOWN: dict[Hashable, dict[str, tuple[int, ...] | None]] = {}


def site_shapes(family: Family, sites: Sequence[str], arguments: Arguments) -> dict[str, tuple[int, ...]]:
    """Return one sample's shape at each site (`path:quantity`); sites that do not run in a plain call are left out."""
    key = structure(family, arguments)
    if key not in _KNOWN and len(_KNOWN) > 64:
        _KNOWN.clear()
    met = _KNOWN.setdefault(key, {})
    new = [site for site in sites if site not in met]
    if new:
        met |= {**dict.fromkeys(new), **_met(family, new, arguments)}
    return {site: there for site in sites if (there := met[site]) is not None}


def _met(family: Family, sites: Sequence[str], arguments: Arguments) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def meet(tensor: torch.Tensor, at: At) -> None:
        shapes.setdefault(at.site, tuple(int(n) for n in tensor.shape[1:]))

    with family.rehearsing(), HookRegistry(family.pipe, family) as hooks:
        for site in sites:
            hooks.read(site, meet)
        with without_data(family.denoiser):
            hooks.rehearse(family.dry_inputs(arguments))
    return shapes
