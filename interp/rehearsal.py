"""One denoiser call on tensors without data, to learn the shapes that a recording will meet."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from interp.families import Family
from interp.hooks import At, HookRegistry

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[tuple, dict[str, tuple[int, ...]]]] = WeakKeyDictionary()


def site_shapes(family: Family, sites: Sequence[str], height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return one sample's shape at each site (`path:quantity`); sites that do not run in a plain call are left out."""
    denoiser = family.denoiser
    known = _KNOWN.setdefault(denoiser, {})
    key = (height, width, *sites, *(id(m) for m in denoiser.modules()))  # LoRA and the like exchange modules
    if key not in known:
        if len(known) > 8:
            known.clear()
        known[key] = _met(family, sites, height, width)
    return dict(known[key])


def _met(family: Family, sites: Sequence[str], height: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def meet(tensor: torch.Tensor, at: At) -> None:
        shapes.setdefault(at.site, tuple(int(n) for n in tensor.shape[1:]))

    with without_hooks(family.denoiser), HookRegistry(family.pipe, family) as hooks:
        for site in sites:
            hooks.read(site, meet)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, torch.no_grad(), torch.device(str(family.denoiser.device)):
            hooks.rehearse(family.dry_inputs(height, width))
    return shapes


@contextmanager
def without_hooks(module: torch.nn.Module) -> Iterator[None]:
    """Put aside all hooks within a module: nobody else's is to meet tensors without data."""
    kept = [(m, name, getattr(m, name)) for m in module.modules() for name in _HOOKS]
    try:
        for m, name, _ in kept:
            setattr(m, name, OrderedDict())
        yield
    finally:
        for m, name, hooks in kept:
            setattr(m, name, hooks)
