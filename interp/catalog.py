"""The catalogue of sites: every place of a pipeline where a tensor can be read or written."""

from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from interp.errors import InterpError, nearest, sentence_list
from interp.families import Arguments, AttentionSite, Family, find_family
from interp.observing import HookProbs
from interp.patterns import REGEX, matching
from interp.structure import structure
from interp.undressing import dry

ALIASES = {"pattern": "probs", "attn": "probs", "output": "out", "input": "in"}
_DRY_RUNS: dict[Hashable, Any] = {}
QUANTITIES = ("in", "out", "q", "k", "v", "probs")


@dataclass(frozen=True)
class Site:
    """One row of the catalogue: name `path:quantity`, kind, and the shape of one sample's tensor.

    kind: `cross`, `self`, `joint` or `text` (from text to text) for attention probabilities (head, query, key), `module` for
    a module's output.
    """

    name: str
    kind: str
    shape: tuple[int, ...]


class SiteTable(list[Site]):
    """A list of sites that prints as a table; attention first, then modules."""

    def __repr__(self) -> str:
        width = max((len(s.name) for s in self), default=4)
        rows = [f"{'site':<{width}}  {'kind':<6}  shape"]
        rows += [f"{s.name:<{width}}  {s.kind:<6}  {'×'.join(map(str, s.shape))}" for s in self]
        return "\n".join(rows)

    __str__ = __repr__


def sites(pipe: Any, match: str = "*", height: int | None = None, width: int | None = None) -> SiteTable:
    """List every site of a pipeline's denoiser and text encoders; nothing is computed.

    Args:
        pipe: A diffusers pipeline, or what `interp.load` accepts.
        match: Glob over site names, e.g. `"*attn2:probs"`, or `"re:"` and a regular expression.
        height, width: Picture size in pixels; default is the model's own.

    Returns:
        Sites with name, kind and one sample's shape: attention probabilities (head, query, key), module outputs
        (channel, y, x) or (position, feature).

    Raises:
        InterpError: nothing matches; the nearest sites are named.

    >>> import interp
    >>> interp.sites(interp.load("scenes"), "*mid_block*attn2:probs")[0].kind
    'cross'
    """
    from interp.loading import load

    pipe = load(pipe) if isinstance(pipe, str) else pipe
    family = find_family(pipe)
    arguments = family.arguments({"height": height, "width": width})
    shapes, grids = dry_run(family, arguments)
    rows = [
        Site(f"{s.name}:probs", s.kind, probs_shape(family, s, grids[s.name], arguments))
        for s in attention_sites(family)
    ]
    rows += [Site(f"{path}:out", "module", shape) for path, shape in shapes.items()]
    rows += [
        Site(f"{name}.{path}:out" if path else f"{name}:out", "module", ())
        for name, (_, encoder) in family.text_encoders.items()
        for path, module in encoder.named_modules()
        if not isinstance(module, torch.nn.ModuleList)
    ]
    wanted = {*matching(match, [s.name for s in rows]), *matching(match, [s.name.partition(":")[0] for s in rows])}
    found = SiteTable(s for s in rows if {s.name, s.name.partition(":")[0]} & wanted)
    if not found:
        raise InterpError(_no_match(family, match))
    return found


def attention_sites(family: Family) -> list[AttentionSite]:
    """Attention modules in running order."""
    return family.attention_sites()


def probs_shape(
    family: Family, site: AttentionSite, grid: tuple[int, int], arguments: Arguments
) -> tuple[int, int, int]:
    """Shape of one sample's probabilities at a site: (head, query, key)."""
    image = grid[0] * grid[1]
    if site.kind == "joint":
        length = family.joint_length(arguments)
        return site.heads, length, length
    text = family.text_length(arguments)
    return site.heads, text if site.kind == "text" else image, image if site.kind == "self" else text


def dry_run(
    family: Family, arguments: Arguments | None = None
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
    """Run the denoiser on tensors without data; return each module's output shape and each attention site's grid.

    Shapes are those of one sample, without the row dimension; grids are (height, width). `arguments` are those of a
    pipeline call: its size decides.
    """
    arguments = family.arguments() if arguments is None else arguments
    key = structure(family, arguments)
    if key not in _DRY_RUNS:
        if len(_DRY_RUNS) > 64:
            _DRY_RUNS.clear()
        _DRY_RUNS[key] = _dry_run(family, arguments)
    shapes, grids = _DRY_RUNS[key]
    missing = [s.name for s in attention_sites(family) if s.name not in grids]
    if missing:
        raise InterpError(f"{missing[0]!r} does not run in a plain forward pass, so its grid is unknown; leave it out")
    return dict(shapes), dict(grids)


def _dry_run(family: Family, arguments: Arguments) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
    shapes: dict[str, tuple[int, ...]] = {}
    grids: dict[str, tuple[int, int]] = {}
    spatial: list[tuple[int, int]] = []
    own = {id(s.module): s.name for s in attention_sites(family)}
    (root, denoiser), *_ = family.denoisers.items()
    everywhere = family.grid(arguments)

    def enter(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        first = args[0] if args else kwargs.get("hidden_states")
        if isinstance(first, torch.Tensor) and first.ndim == 4:
            spatial.append((int(first.shape[2]), int(first.shape[3])))
        if id(module) in own and (everywhere or spatial):
            grids[own[id(module)]] = everywhere or spatial[-1]

    def leave(path: str, out: Any) -> None:
        name = f"{root}.{path}" if path else root
        if isinstance(out, tuple):
            out = out[family.output_index(name)] if out else None
        elif isinstance(out, Mapping):
            out = next(iter(out.values()))
        if isinstance(out, torch.Tensor):
            shapes[name] = tuple(int(n) for n in out.shape[1:])

    with family.rehearsing(), ExitStack() as undo:
        for path, module in denoiser.named_modules():
            if isinstance(module, HookProbs):
                continue
            undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(lambda _, args, out, path=path: leave(path, out)).remove)

        def call() -> None:
            inputs = family.dry_inputs(arguments)
            leave("", denoiser.forward(*inputs.args, **inputs.kwargs))  # not its __call__, a registry may hold it

        dry(denoiser, call, at_home=family.fallback)  # which gets its inputs by calling the pipeline
    return shapes, grids


def split_site(site: str) -> tuple[str, str]:
    """Split `path:quantity`; the quantity defaults to `out`, aliases are resolved.

    Raises:
        InterpError: the quantity is unknown.
    """
    path, _, quantity = site.partition(":")
    if site.startswith(REGEX):  # which may hold colons of its own
        path, _, quantity = site.rpartition(":")
        if quantity not in {*QUANTITIES, *ALIASES}:
            path, quantity = site, ""
    quantity = ALIASES.get(quantity, quantity) or "out"
    if quantity not in QUANTITIES:
        raise InterpError(
            f"{site!r} asks for the quantity {quantity!r}; a site has {', '.join(QUANTITIES)}{nearest(quantity, QUANTITIES)}"
        )
    return path, quantity


def match_sites(family: Family, pattern: str) -> list[str]:
    """Return all `path:quantity` names that a glob, or `re:` and a regular expression for the path, selects.

    Raises:
        InterpError: none does.
    """
    path, quantity = split_site(pattern)
    if quantity in ("q", "k", "v", "probs"):
        paths = [s.name for s in attention_sites(family)]
    else:
        paths = module_paths(family)
    found = [f"{p}:{quantity}" for p in matching(path, paths)]
    if not found:
        lacking = family.without_probabilities()
        unfit = [*lacking] if family.fallback else matching(path, lacking)
        if quantity not in ("in", "out") and unfit:
            raise InterpError(f"{pattern!r}: {lacking[unfit[0]]}; read what goes in (':in') and comes out (':out')")
        raise InterpError(_no_match(family, pattern))
    return found


def module_paths(family: Family) -> list[str]:
    """Paths of all modules of the denoiser and the text encoders."""
    roots = {**family.denoisers, **{name: encoder for name, (_, encoder) in family.text_encoders.items()}}
    return [
        f"{root}.{path}" if path else root
        for root, m in roots.items()
        for path, module in m.named_modules()
        if not isinstance(
            module, (torch.nn.ModuleList, HookProbs)
        )  # holds modules, and is never called; is a site's probs
    ]


def _no_match(family: Family, pattern: str) -> str:
    path = pattern.partition(":")[0]
    known = module_paths(family)
    close = nearest(path, known)
    examples = sentence_list([s.name for s in attention_sites(family)], limit=2)
    return (
        f"no site matches {pattern!r}{close or f'; attention sites are e.g. {examples}'} "
        f"(interp.sites(pipe) lists all {len(known)} modules)"
    )
