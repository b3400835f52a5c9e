"""What decides the shapes that pass in a denoiser: equal ones need be run without data but once."""

from collections.abc import Hashable
from weakref import WeakKeyDictionary, ref

import torch

from interp.families import Arguments, Family
from interp.observing import HookProbs

_TREES: WeakKeyDictionary[torch.nn.Module, tuple[tuple[int, ...], Hashable]] = WeakKeyDictionary()


def structure(family: Family, arguments: Arguments) -> Hashable:
    """Identify a family's denoiser by its configuration and the modules within it, and a call by its sizes.

    Of a denoiser without a configuration, or of a pipeline that no family describes, too little is known: it is like
    itself alone.
    """
    denoiser = family.denoiser
    config = getattr(denoiser, "config", None)
    return (
        type(family), family.latent_shape(arguments), family.text_length(arguments), _tree(denoiser), repr(config),
        ref(denoiser) if config is None or family.fallback else None,
    )  # fmt: skip


def _tree(denoiser: torch.nn.Module) -> Hashable:
    """The modules by path, class and what they say of themselves; LoRA and the like exchange them.

    `hook_probs` comes and goes, and is left out.
    """
    modules = {path: m for path, m in denoiser.named_modules() if not isinstance(m, HookProbs)}
    same = tuple(map(id, modules.values()))
    known = _TREES.get(denoiser)
    if known is None or known[0] != same:
        known = same, tuple((path, type(m).__name__, m.extra_repr()) for path, m in modules.items())
        _TREES[denoiser] = known
    return known[1]
