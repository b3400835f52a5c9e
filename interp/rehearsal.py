"""One denoiser call on tensors without data, to learn what a recording will meet: shapes, and what they are made of."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interp.families import Arguments, DenoiserInputs, Family
from interp.hooks import At, HookRegistry
from interp.structure import structure
from interp.undressing import dry

LATENTS, TEXT = "latents", "text"
BESIDE = "text beside"
"""Of a sequence that holds the image and the text where neither has met the other: the text's positions depend on the text."""
_CHANGING = ("sample", "hidden_states", "x", "timestep", "t")
"""Names that models give what differs from step to step."""
_FIXED = (
    "guidance",
    "original_size",
    "target_size",
    "crop_coords",
    "image_meta_size",
    "style",
    "resolution",
    "aspect_ratio",
)
"""Names of what is the same for all rows and steps."""


@dataclass(frozen=True)
class Passing:
    """What passes at a site: one sample's shape, and what it depends on: `latents` (and the time), `text`, `text beside`."""

    shape: tuple[int, ...]
    of: frozenset[str]


_KNOWN: dict[Hashable, dict[str, Passing | None]] = {}


class Following(TorchDispatchMode):
    """Follow marks from tensors to all that is made of them, while active."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[int, frozenset[str]] = {}
        self._kept: list[torch.UntypedStorage] = []  # so that no other comes to have its number

    def mark(self, tree: Any, marks: frozenset[str]) -> None:
        """Put marks on all tensors in nested containers."""
        for storage in _storages(tree):
            if id(storage) not in self._marks:
                self._kept.append(storage)
            self._marks[id(storage)] = self._marks.get(id(storage), frozenset()) | marks

    def marks(self, *trees: Any) -> frozenset[str]:
        """Return the marks that have come to tensors."""
        return frozenset().union(*(self._marks.get(id(s), frozenset()) for s in _storages(trees)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        marks = self.marks(args, kwargs)
        if func is torch.ops.aten.cat.default:
            marks = _side_by_side([self.marks(t) for t in args[0]])
        elif BESIDE in marks and self._mixes(func, args, out):
            marks = marks - {BESIDE} | {TEXT}
        if marks:
            self.mark(out, marks)
        return out

    def _mixes(self, func: Any, args: Any, out: Any) -> bool:
        """Tell whether positions of a sequence may meet in an operation: in any that is not known to keep them apart."""
        if func.is_view or torch.Tag.pointwise in func.tags or func in _APART:
            return False
        if func in _PRODUCTS:  # with weights
            return sum(bool(self.marks(t)) for t in args if isinstance(t, torch.Tensor)) > 1
        if func is torch.ops.aten.mean.dim:  # over the features
            return [d % args[0].ndim for d in args[1]] != [args[0].ndim - 1]
        return True


_APART = {
    torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten._unsafe_view.default,
    torch.ops.aten.copy_.default, torch.ops.aten.stack.default, torch.ops.aten.native_layer_norm.default,
    torch.ops.aten._fused_rms_norm.default,
}  # fmt: skip
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def _side_by_side(parts: Sequence[frozenset[str]]) -> frozenset[str]:
    """Marks of parts that lie beside each other: the text is beside, if a part is free of it."""
    whole = frozenset().union(*parts)
    return whole - {TEXT} | {BESIDE} if TEXT in whole and not all(TEXT in p for p in parts) else whole


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def passing(family: Family, sites: Sequence[str], arguments: Arguments) -> dict[str, Passing]:
    """Return what passes at each site (`path:quantity`); sites that do not run in a plain call are left out."""
    key = structure(family, arguments)
    if key not in _KNOWN and len(_KNOWN) > 64:
        _KNOWN.clear()
    met = _KNOWN.setdefault(key, {})
    new = [site for site in sites if site not in met]
    if new:
        met |= {**dict.fromkeys(new), **_met(family, new, arguments)}
    return {site: there for site in sites if (there := met[site]) is not None}


def _met(family: Family, sites: Sequence[str], arguments: Arguments) -> dict[str, Passing]:
    found: dict[str, Passing] = {}
    following = Following()

    def meet(tensor: torch.Tensor, at: At) -> None:
        found.setdefault(at.site, Passing(tuple(int(n) for n in tensor.shape[1:]), following.marks(tensor)))

    with family.rehearsing(), HookRegistry(family.pipe, family) as hooks:
        for site in sites:
            hooks.read(site, meet)

        def call() -> None:
            found.clear()
            with following:
                inputs = family.dry_inputs(arguments)
                _mark(family, inputs, following)
                hooks.rehearse(inputs)

        dry(family.denoiser, call, at_home=family.fallback)
    return found


def _mark(family: Family, inputs: DenoiserInputs, following: Following) -> None:
    """Latents and time come first, or go by their names; all else is of the text, unless it is the same for all rows."""
    following.mark(inputs.args[:2], frozenset({LATENTS}))
    following.mark(inputs.args[2:], frozenset({TEXT}))
    for name, value in inputs.kwargs.items():
        if name not in (*family.shared, *_FIXED):
            following.mark(value, frozenset({LATENTS if name in _CHANGING else TEXT}))
