"""What a run keeps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

from interp.errors import InterpError, nearest, sentence_list
from interp.families import AttentionSite

Reducer = Callable[..., Any]
"""(probabilities (sample, head, query, key), at) → tensor (sample, …)."""

Selection = tuple[int, ...] | str


@dataclass(frozen=True, init=False)
class Capture:
    """What a run keeps; frozen, serialisable, stored with the run.

    Args:
        attention: `"cross"`, `"self"`, `"all"`, a glob or several over attention sites, or None.
        heads: `"mean"`, `"all"`, or head indices.
        tokens: `"prompt"` keeps bos, words and the first eos and sums the padding into one last column; `"all"`;
            or token positions.
        branches: `("cond",)`, `("uncond",)` or both: the branches whose attention and sites are kept.
        steps: `slice`, list of steps, or None for all; a float in (0, 1) keeps that share, evenly spread.
        latents, noise_pred: keep x_t entering each step; keep the raw model output of both branches.
        sites: Globs over module sites, e.g. `("unet.mid_block:out",)`, kept as they are.
        text: Keep the text states that the denoiser received.
        image: Keep the decoded picture.
        reduce: Your own reductions of attention, done on the device: name → function, or name → (glob over attention
            sites, function). The function gets probabilities (sample, head, query, key) of one layer and `at`, and
            returns a tensor (sample, …) of the same shape for all its layers; `sites/<name>` keeps it.
        dtype: `"float16"` or `"float32"` for attention probabilities.

    Raises:
        InterpError: a field does not exist (the nearest is named), or a value is of the wrong kind.

    >>> Capture(heads="all", steps=slice(0, 10))
    Capture(heads='all', steps=slice(0, 10, None))
    >>> Capture(head="all")
    Traceback (most recent call last):
        ...
    interp.stores.errors.InterpError: Capture has no field 'head'; did you mean 'heads'? It has: attention, heads, \
tokens, branches, steps, latents, noise_pred, sites, text, image, reduce, dtype
    """

    attention: str | tuple[str, ...] | None = "cross"
    heads: Selection = "mean"
    tokens: Selection = "prompt"
    branches: tuple[str, ...] = ("cond",)
    steps: slice | tuple[int, ...] | float | None = None
    latents: bool = True
    noise_pred: bool = True
    sites: tuple[str, ...] = ()
    text: bool = False
    image: bool = True
    reduce: Mapping[str, Reducer | tuple[str, Reducer]] = field(default_factory=dict)
    dtype: Literal["float16", "float32"] = "float16"

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
        if isinstance(self.branches, str):
            object.__setattr__(self, "branches", (self.branches,))
        if isinstance(self.sites, str):
            object.__setattr__(self, "sites", (self.sites,))
        wrong = [b for b in self.branches if b not in ("cond", "uncond")]
        if wrong or not self.branches:
            raise InterpError(f"Capture(branches={list(self.branches)}): a branch is 'cond' or 'uncond'")
        for name, words in (
            ("heads", ("mean", "all")),
            ("tokens", ("prompt", "all")),
            ("dtype", ("float16", "float32")),
        ):
            value = getattr(self, name)
            if isinstance(value, str) and value not in words:
                raise InterpError(
                    f"Capture({name}={value!r}): choose {' or '.join(map(repr, words))}"
                    f"{'' if name == 'dtype' else ', or a list of indices'}{nearest(value, words)}"
                )
        if isinstance(self.steps, float) and not 0 < self.steps <= 1:
            raise InterpError(f"Capture(steps={self.steps}): a share of the steps lies in (0, 1]")

    def __repr__(self) -> str:
        changed = [
            (f.name, getattr(self, f.name))
            for f in fields(self)
            if getattr(self, f.name) != (f.default if f.name != "reduce" else {})
        ]
        return f"Capture({', '.join(f'{n}={v!r}' for n, v in changed)})"

    def spec(self) -> dict[str, Any]:
        """Return all fields as JSON-able values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["reduce"] = {name: [glob, _qualified(fn)] for name, (glob, fn) in self.reducers.items()}
        if isinstance(self.steps, slice):
            values["steps"] = {"slice": [self.steps.start, self.steps.stop, self.steps.step]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Capture":
        """Rebuild what `spec` described; unknown fields raise as in the constructor."""
        values = dict(spec)
        if values.get("reduce"):
            raise InterpError(
                f"the reductions {sentence_list(values['reduce'])} are functions, of which a spec holds the names alone; "
                "build the Capture in Python"
            )
        if isinstance(values.get("steps"), Mapping):
            values["steps"] = slice(*values["steps"]["slice"])
        return cls(**values)

    @property
    def reducers(self) -> dict[str, tuple[str, Reducer]]:
        """Reductions by name: the glob over attention sites, and the function."""
        return {name: given if isinstance(given, tuple) else ("*attn2", given) for name, given in self.reduce.items()}

    def chosen_steps(self, steps: int) -> list[int]:
        """Return which of `steps` sampling steps attention and sites are kept of."""
        if self.steps is None:
            return list(range(steps))
        if isinstance(self.steps, slice):
            return list(range(steps))[self.steps]
        if isinstance(self.steps, float):
            kept = max(1, round(self.steps * steps))
            return sorted({round(i * (steps - 1) / max(1, kept - 1)) for i in range(kept)})
        wrong = [s for s in self.steps if not -steps <= s < steps]
        if wrong:
            raise InterpError(f"Capture(steps={list(self.steps)}): step {wrong[0]} is outside the run's 0–{steps - 1}")
        return sorted({s % steps for s in self.steps})

    def chosen_attention(self, sites: list[AttentionSite]) -> list[AttentionSite]:
        """Return the attention sites to keep.

        Raises:
            InterpError: a glob matches none.
        """
        if self.attention is None:
            return []
        if self.attention in ("cross", "self", "all"):
            return [s for s in sites if self.attention in ("all", s.kind)]
        globs = (self.attention,) if isinstance(self.attention, str) else self.attention
        chosen: set[str] = set()
        for pattern in globs:
            path = pattern.removesuffix(":probs")
            found = {s.name for s in sites if fnmatchcase(s.name, path)}
            if not found:
                names = [s.name for s in sites]
                raise InterpError(
                    f"Capture(attention={pattern!r}) matches no attention site{nearest(path, [*names, 'cross', 'self', 'all'])}"
                    f"{'' if nearest(path, names) else ';'} this model has {len(names)}, e.g. {sentence_list(names, 2)}"
                )
            chosen |= found
        return [s for s in sites if s.name in chosen]

    def chosen_heads(self, heads: int) -> list[int]:
        """Return head indices; the mean is taken over all."""
        if isinstance(self.heads, str):
            return list(range(heads))
        wrong = [h for h in self.heads if not 0 <= h < heads]
        if wrong:
            raise InterpError(f"Capture(heads={list(self.heads)}): the model has heads 0–{heads - 1}")
        return list(self.heads)


def _qualified(fn: Reducer) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', type(fn).__name__)}"


def _frozen(value: Any) -> Any:
    """Lists become tuples, so that a capture can be compared and hashed by value."""
    return tuple(value) if isinstance(value, (list, range)) else value
