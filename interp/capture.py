"""What a run keeps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from interp.capture_values import check_region, check_values
from interp.errors import InterpError, nearest, sentence_list
from interp.families import PARTS, AttentionSite, find_family
from interp.named_reductions import NAMED, named
from interp.patterns import matching
from interp.warning import warn

Reducer = Callable[..., Any]
"""(probabilities (sample, head, query, key), at) → tensor (sample, …)."""

Reduce = Reducer | str
"""A reduction: a function, or the name of one."""

PART_NAMES = (*PARTS["joint"], "all")
OF_IMAGE = ("cross", "self")
"""Parts whose queries are the image's."""

Selection = tuple[int, ...] | str
Region = tuple[float, float, float, float]

_ALWAYS_IN_SPEC = (
    "attention", "heads", "tokens", "branches", "steps", "latents", "noise_pred", "sites", "text", "image", "reduce",
    "dtype",
)  # fmt: skip
"""Fields of the first version: later ones are written only where they are used, so that old runs can be resumed."""


@dataclass(frozen=True)
class AttentionPart:
    """A part of one attention site's probabilities: `cross`, `self`, `text` or `within_text`, see `interp.families.PARTS`."""

    site: AttentionSite
    part: str

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name


@dataclass(frozen=True, init=False)
class Capture:
    """What a run keeps; frozen, serialisable, stored with the run.

    Args:
        attention: `"cross"` (image → text, of cross- and joint attention alike), `"self"` (image → image), `"text"`
            (text → image of joint attention), `"within_text"` (text → text of joint attention and of layers for the text
            alone), `"all"`, None for none, or attention sites, which keep image → text where there is both, else what they
            attend to: a glob or several, or `"re:"` and a regular expression.
        heads: `"mean"`, `"all"`, or head indices.
        tokens: `"prompt"` keeps bos, words and the first eos and sums the padding into one last column; `"all"`; or a
            list of positions, words (`"red"`, `"navy background"`, `"{target}"` for the text in a column of the prompt
            table) and roles (`"bos"`, `"word"`, `"eos"`, `"pad"`).
        branches: `("cond",)`, `("uncond",)` or both: the branches whose attention and sites are kept.
        steps: `slice`, list of steps, or None for all; a float in (0, 1) keeps that share, evenly spread.
        latents, noise_pred: keep x_t entering each step; keep the raw model output of both branches.
        sites: Globs (or `"re:…"`) over sites `path:quantity`, kept as they are. Every module has `in`, `out` and
            `update` (out − in: what a block adds to the residual stream); attention has `q`, `k` and `v` too.
        text: Keep the text states that the denoiser received; `"layers"` also the hidden states of every text encoder after
            each of its layers, the embeddings first (from an encoding of their own, without interventions).
        image: Keep the decoded picture.
        reduce: Reductions of attention, done on the device; `sites/<name>` keeps the result. By name: `"entropy"`,
            `"role_mass"`, `"token_mass"`, `"mean_map"`, `"daam"` (see `interp.named_reductions.NAMED`), or your own
            function, which gets probabilities (sample, head, query, key) of one layer and `at`, and returns a tensor
            (sample, …) of the same shape for all its layers. A list of names, or name → reduction, or name → (glob over
            attention sites, reduction); without a glob: all cross-attention.
        dtype: `"float16"` or `"float32"` for attention probabilities.
        region: (top, left, bottom, right) in fractions of the picture: only image positions inside are kept, of
            attention the queries, of sites the positions.

        mantissa: Round attention probabilities to so many bits of mantissa, None not at all: 7 bits change a number by at
            most 0.4 % and compress about 1.3 times better.

    Raises:
        InterpError: a field does not exist (the nearest is named), or a value is of the wrong kind.

    >>> Capture(heads="all", steps=slice(0, 10))
    Capture(heads='all', steps=slice(0, 10, None))
    >>> Capture(head="all")
    Traceback (most recent call last):
        ...
    interp.stores.errors.InterpError: Capture has no field 'head'; did you mean 'heads'? It has: attention, heads, \
tokens, branches, steps, latents, noise_pred, sites, text, image, reduce, dtype, region, \
budget, mantissa
    """

    attention: str | tuple[str, ...] | None = "cross"
    heads: Selection = "mean"
    tokens: str | tuple[int | str, ...] = "prompt"
    branches: tuple[str, ...] = ("cond",)
    steps: slice | tuple[int, ...] | float | None = None
    latents: bool = True
    noise_pred: bool = True
    sites: tuple[str, ...] = ()
    text: bool | Literal["layers"] = False
    image: bool = True
    reduce: Mapping[str, Reduce | tuple[str, Reduce]] = field(default_factory=dict)
    dtype: Literal["float16", "float32"] = "float16"
    region: Region | None = None
    budget: str | float | None = None
    mantissa: int | None = None

    def __init__(self, **values: Any) -> None:
        names = [f.name for f in fields(type(self))]
        for name in values:
            if name not in names:
                raise InterpError(
                    f"Capture has no field {name!r}{nearest(name, names) or ';'} It has: {', '.join(names)}"
                )
        for one in fields(type(self)):
            default = {} if one.name == "reduce" else one.default
            object.__setattr__(self, one.name, _frozen(values.get(one.name, default)))
        self._check()

    def _check(self) -> None:
        for name in ("branches", "sites"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        check_values(self)
        if isinstance(self.reduce, str | tuple):
            names = (self.reduce,) if isinstance(self.reduce, str) else self.reduce
            object.__setattr__(self, "reduce", {name: name for name in names})
        for name, (glob, fn) in self.reducers.items():
            if isinstance(fn, str):
                named(fn, name)
            elif not callable(fn) or not isinstance(glob, str):
                raise InterpError(
                    f"Capture(reduce={{{name!r}: …}}): give a function, a name, or (glob over attention sites, one of these)"
                )
        if self.region is not None:
            check_region(self.region, "Capture")

    def __repr__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if not self._is_default(f.name)]
        return f"Capture({', '.join(f'{n}={v!r}' for n, v in changed)})"

    def _is_default(self, name: str) -> bool:
        default = {} if name == "reduce" else type(self).__dataclass_fields__[name].default
        return bool(getattr(self, name) == default)

    def spec(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        names = [f.name for f in fields(self) if f.name in _ALWAYS_IN_SPEC or not self._is_default(f.name)]
        names = [name for name in names if name != "budget"]
        values = {name: getattr(self, name) for name in names}
        values["reduce"] = {name: [glob, _qualified(fn)] for name, (glob, fn) in self.reducers.items()}
        if isinstance(self.steps, slice):
            values["steps"] = {"slice": [self.steps.start, self.steps.stop, self.steps.step]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Capture":
        """Rebuild what `spec` described; unknown fields raise as in the constructor."""
        values = dict(spec)
        given = values.get("reduce")
        if isinstance(given, Mapping):
            values["reduce"] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
            own = [n for n, v in values["reduce"].items() if (v[1] if isinstance(v, tuple) else v) not in NAMED]
            if own:
                raise InterpError(
                    f"the reductions {sentence_list(own)} are functions, of which a spec holds the names alone; build the "
                    f"Capture in Python, or choose from those that go by name: {sentence_list(NAMED, 9)}"
                )
        if isinstance(values.get("steps"), Mapping):
            values["steps"] = slice(*values["steps"]["slice"])
        return cls(**values)

    def changed(self, **changes: Any) -> "Capture":
        """Return the capture with some fields changed."""
        return type(self)(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)

    @property
    def reducers(self) -> dict[str, tuple[str, Reduce]]:
        """Reductions by name: the glob over attention sites, and the function or its name."""
        return {name: given if isinstance(given, tuple) else ("cross", given) for name, given in self.reduce.items()}

    def chosen_steps(self, steps: int) -> list[int]:
        """Return which of `steps` sampling steps attention and sites are kept of."""
        if self.steps is None:
            return list(range(steps))
        if isinstance(self.steps, slice):
            chosen = list(range(steps))[self.steps]
            if not chosen:
                raise InterpError(f"Capture(steps={self.steps}): none of the run's steps 0–{steps - 1} is in it")
            return chosen
        if isinstance(self.steps, float):
            kept = max(1, round(self.steps * steps))
            return sorted({round(i * (steps - 1) / max(1, kept - 1)) for i in range(kept)})
        wrong = [s for s in self.steps if not -steps <= s < steps]
        if wrong:
            raise InterpError(f"Capture(steps={list(self.steps)}): step {wrong[0]} is outside the run's 0–{steps - 1}")
        return sorted({s % steps for s in self.steps})

    def chosen_attention(self, sites: list[AttentionSite], lacking: Mapping[str, str]) -> list[AttentionPart]:
        """Return the parts of attention to keep.

        lacking: attention modules without probabilities, by name → why; what is asked for and left out is said.

        Raises:
            InterpError: a glob matches none, or the model has no such attention.
        """
        if self.attention is None:
            return []
        if self.attention in PART_NAMES:
            parts = [AttentionPart(s, p) for s in sites for p in PARTS[s.kind] if self.attention in ("all", p)]
            if lacking and (not parts or self.attention == "all"):
                self._leave_out(next(iter(lacking.values())), parts)
            if not parts and self.attention in ("text", "within_text"):
                goes = {"text": "text → image", "within_text": "text → text"}[self.attention]
                raise InterpError(
                    f"Capture(attention={self.attention!r}) keeps {goes}, which joint attention alone has; this model has "
                    f"{' and '.join(sorted({s.kind for s in sites}))} attention"
                )
            return parts
        if not sites and lacking:
            self._leave_out(next(iter(lacking.values())), [])
        globs = (self.attention,) if isinstance(self.attention, str) else self.attention
        chosen: set[str] = set()
        for pattern in globs:
            path, names = pattern.removesuffix(":probs"), [s.name for s in sites]
            found = matching(path, names)
            unfit = matching(path, lacking)
            if unfit:
                self._leave_out(lacking[unfit[0]], found)
            if not found:
                raise InterpError(
                    f"Capture(attention={pattern!r}) matches no attention site"
                    f"{nearest(path, [*names, *PART_NAMES]) or ';'} this model has {len(names)}, e.g. {sentence_list(names, 2)}"
                )
            chosen |= {*found}
        return [AttentionPart(s, PARTS[s.kind][0]) for s in sites if s.name in chosen]

    def _leave_out(self, why: str, kept: Sequence[object]) -> None:
        if not kept:
            raise InterpError(
                f"Capture(attention={self.attention!r}): {why}; leave it out, which with nothing else is attention=None"
            )
        warn(f"Capture(attention={self.attention!r}): {why}; the other attention is kept")

    def chosen_heads(self, heads: int) -> list[int]:
        """Return head indices; the mean is taken over all."""
        if isinstance(self.heads, str):
            return list(range(heads))
        wrong = [h for h in self.heads if not 0 <= h < heads]
        if wrong:
            raise InterpError(f"Capture(heads={list(self.heads)}): the model has heads 0–{heads - 1}")
        return list(self.heads)

    def chosen_cells(self, grid: tuple[int, int]) -> tuple[slice, slice]:
        """Return the rows and columns of a grid (height, width) that the region touches."""
        if self.region is None:
            return slice(0, grid[0]), slice(0, grid[1])
        top, left, bottom, right = self.region
        rows, columns = (
            slice(math.floor(a * size + 1e-9), math.ceil(b * size - 1e-9))
            for a, b, size in ((top, bottom, grid[0]), (left, right, grid[1]))
        )
        return rows, columns


def default_capture(pipe: Any) -> Capture:
    """What is kept if nothing is asked for; attention only where the model's family knows it, which is said."""
    family = find_family(pipe)
    if not family.fallback:
        return Capture()
    why = next(iter(family.without_probabilities().values()))
    warn(f"{why}; latents, predictions and pictures are kept, as by Capture(attention=None)")
    return Capture(attention=None)


def _qualified(fn: Reduce) -> str:
    if isinstance(fn, str):
        return fn
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', type(fn).__name__)}"


def _frozen(value: Any) -> Any:
    """Lists become tuples, so that a capture can be compared and hashed by value."""
    return tuple(value) if isinstance(value, (list, range)) else value
