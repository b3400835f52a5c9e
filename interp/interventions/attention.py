"""Changing attention probabilities: the weight of tokens, and heads taken out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any, ClassVar, Literal

import torch

from interp.catalog import attention_sites
from interp.errors import InterpError, nearest, sentence_list
from interp.families import PARTS, AttentionSite, Family
from interp.hooks import At, HookRegistry
from interp.interventions.base import Batch, Intervention
from interp.interventions.places import BRANCHES, present
from interp.patterns import matching
from interp.prompts import fill
from interp.stores.table import ROLES
from interp.token_choice import occurrences
from interp.tokens import Tokens

Prompts = list[tuple[Tokens, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True, repr=False)
class _Where(Intervention):
    branch: Literal["cond", "uncond", "both"] = "cond"
    heads: tuple[int, ...] | None = None


class AttentionChange(_Where):
    """Change the probabilities (head, query, key) of attention layers within the window.

    Args:
        branch: `"cond"` (default), `"uncond"` or `"both"`.
        heads: Numbers of the heads that are changed; default all.
    """

    layers: str | tuple[str, ...] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "heads"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, (str, int)) else tuple(value))
        if self.branch not in BRANCHES:
            raise InterpError(f"{self!r}: branch is {sentence_list(BRANCHES)}{nearest(str(self.branch), BRANCHES)}")
        if not all(isinstance(h, int) and not isinstance(h, bool) for h in self.heads or ()):
            raise InterpError(f"{self!r}: heads are whole numbers, counted from 0")

    @property
    def default_layers(self) -> str:
        """The layers where none are named."""
        return "cross"

    def part_claimed(self, what: str) -> str:
        """A claim on part of the attention, as far as it is known without a model."""
        names = [f"{n}={v}" for n in ("layers", "heads", "branch") if (v := getattr(self, n)) not in (None, "cond")]
        return ":".join([what, *names])

    def sites(self, family: Family) -> list[AttentionSite]:
        """The attention modules that are changed, in running order.

        Raises:
            InterpError: there are none, or one has not so many heads.
        """
        every, chosen = attention_sites(family), set[str]()
        for pattern in self.layers or (self.default_layers,):
            if pattern in ("cross", "self"):
                found = [s.name for s in every if pattern in PARTS[s.kind]]
            else:
                found = matching(pattern.removesuffix(":probs"), [s.name for s in every])
            if not found:
                names = [s.name for s in every]
                raise InterpError(
                    f"{self!r} matches no attention layer by {pattern!r}{nearest(pattern, [*names, 'cross', 'self'])}; this "
                    f"model has {len(every)}, e.g. {sentence_list(names, 2) or 'none'}"
                )
            chosen |= {*found}
        sites = [s for s in every if s.name in chosen]
        for site in sites:
            wrong = [h for h in self.heads or () if not 0 <= h < site.heads]
            if wrong:
                raise InterpError(
                    f"{self!r}: there is no head {wrong[0]} in {site.name!r}, which has 0–{site.heads - 1}"
                )
        return sites

    def check_model(self, family: Family, prompts: Prompts, arguments: Mapping[str, Any]) -> None:
        """The layers and heads must exist."""
        self.sites(family)

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Write the probabilities of the chosen layers in the window's steps; elsewhere they are not formed."""
        steps = self.steps(batch.timeline)
        for site in self.sites(hooks.family) if steps else ():
            change = self.change(hooks, batch, site)

            def write(probs: torch.Tensor, at: At, change: Any = change) -> torch.Tensor | None:
                if at.branch not in BRANCHES[self.branch]:
                    return None
                if self.heads is None:
                    return change(probs, at)
                some = change(probs[:, list(self.heads)], at)
                if some is None:
                    return None
                probs = probs.clone()
                probs[:, list(self.heads)] = some
                return probs

            hooks.write(f"{site.name}:probs", write, steps)

    def change(self, hooks: HookRegistry, batch: Batch, site: AttentionSite) -> Any:
        """Return what is done at one layer: (probs (sample, head, query, key) of the chosen heads, at) → probs or None."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class _OfTokens(AttentionChange):
    """Change the probabilities with which the image attends to chosen tokens."""

    words: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    renormalise: bool = False
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("words", "roles", "indices"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, int)) else tuple(value))
        wrong = [r for r in self.roles if r not in ROLES]
        if wrong:
            raise InterpError(f"{self!r}: a role is {sentence_list(ROLES)}, not {wrong[0]!r}{nearest(wrong[0], ROLES)}")
        if not (self.words or self.roles or self.indices):
            raise InterpError(f"{self!r} names no token; give words=('red',), roles=('pad',) or indices=(3,)")
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in self.indices):
            raise InterpError(f"{self!r}: indices are whole numbers, counted from 0")
        if self.words and self.branch != "cond":
            raise InterpError(f"{self!r}: words are those of the prompt, so they need branch='cond'")

    def claims(self) -> frozenset[str]:
        """These tokens' probabilities; what is cached elsewhere cannot be changed."""
        names = ("words", "roles", "indices")
        tokens = ":".join(f"{n}={','.join(map(str, v))}" for n in names if (v := getattr(self, n)))
        return frozenset({self.part_claimed(f"cross_attention:{self.name}:{tokens}")})

    def check(self, table: Mapping[str, Sequence[Any]], guided: bool) -> None:
        """Columns that words name must exist."""
        row = {name: values[0] for name, values in table.items()}
        for word in self.words:
            fill(word, row)

    def check_model(self, family: Family, prompts: Prompts, arguments: Mapping[str, Any]) -> None:
        """Every prompt must have the words and positions."""
        super().check_model(family, prompts, arguments)
        for tokens, row in prompts:
            chosen_tokens(self, tokens, row, self.words, self.roles, self.indices)

    def change(self, hooks: HookRegistry, batch: Batch, site: AttentionSite) -> Any:
        """Change the columns of the chosen tokens, for the image's queries."""

        @cache
        def positions(sample: int, branch: str) -> list[int]:
            row, tokens = batch.rows[sample], batch.tokens[sample]
            if branch == "uncond":
                tokens = hooks.family.tokenize(str(row.get("negative_prompt") or ""), batch.arguments)
            return chosen_tokens(self, tokens, row, self.words, self.roles, self.indices)

        def change(probs: torch.Tensor, at: At) -> torch.Tensor | None:
            if at.call or self.keeps_all:  # an adapter's own keys are no text
                return None
            queries, keys = hooks.spans_at(at, probs).part("cross")
            probs = probs.clone()
            rows = probs[:, :, queries]
            text = rows[..., keys]
            chosen = torch.zeros(len(probs), text.shape[-1], dtype=torch.bool)
            for mask, sample in zip(chosen, present(at), strict=True):
                mask[[p for p in positions(sample, at.branch) if p < len(mask)]] = True
            everywhere = torch.zeros(len(probs), rows.shape[-1], dtype=torch.bool)
            everywhere[:, keys] = chosen
            probs[:, :, queries] = self.weigh(rows, everywhere[:, None, None].to(rows.device))
            return probs

        return change

    keeps_all: ClassVar[bool] = False

    def weigh(self, probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return changed probabilities (sample, head, query, key), of which `chosen` (sample, 1, 1, key) are the tokens'."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class ScaleAttention(_OfTokens):
    """Multiply the probabilities with which the image attends to chosen tokens (re-weighting, Hertz et al., 2208.01626).

    Args:
        words: Words or phrases, all their tokens; `"{subject}"` takes them from a column of the prompt table.
        roles: `"bos"`, `"word"`, `"eos"`, `"pad"`.
        indices: Positions in the text. Words, roles and indices add up.
        renormalise: False (default): the probabilities stay as the factor leaves them, as in Prompt-to-Prompt. True:
            each query's are divided by their sum over all keys, as if log(scale) had been added to the logits.
        layers: Globs over attention layers, or `"re:…"`; default all that attend to text.
        scale: The factor, at least 0; 1 changes nothing, to the last bit.
        heads, branch: Which heads, and which branch (default `"cond"`).
        start, stop, unit: The window of steps.

    In joint attention (Stable Diffusion 3, FLUX) only what the image's queries give to the text is multiplied.

    >>> ScaleAttention("red", scale=2.0, stop=0.5)
    ScaleAttention(stop=0.5, words=('red',), scale=2.0)
    """

    scale: float = 1.0

    name: ClassVar[str] = "scale_attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.scale, Real) or isinstance(self.scale, bool) or not 0 <= self.scale < float("inf"):
            raise InterpError(f"{self!r}: scale is a number from 0")

    @property
    def keeps_all(self) -> bool:  # type: ignore[override]
        """Whether nothing changes."""
        return self.scale == 1

    def weigh(self, probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The tokens' columns times the factor."""
        scaled = torch.where(chosen, probs * self.scale, probs)
        return normalised(scaled) if self.renormalise else scaled


@dataclass(frozen=True, repr=False)
class SetAttention(_OfTokens):
    """Set the probability with which the image attends to chosen tokens.

    Args:
        words, roles, indices: The tokens, see `ScaleAttention`.
        renormalise: True: the other keys' probabilities are scaled so that each query's sum to 1 again; False
            (default): they stay.
        layers: Globs over attention layers, or `"re:…"`; default all that attend to text.
        value: The probability of each chosen token, 0 to 1; 0 hides them.
        heads, branch: Which heads, and which branch (default `"cond"`).
        start, stop, unit: The window of steps.

    >>> SetAttention(roles=("eos", "pad"), value=0.0, renormalise=True)
    SetAttention(roles=('eos', 'pad'), renormalise=True)
    """

    value: float = 0.0

    name: ClassVar[str] = "set_attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.value, Real) or isinstance(self.value, bool) or not 0 <= self.value <= 1:
            raise InterpError(f"{self!r}: value is a probability, from 0 to 1")

    def check_model(self, family: Family, prompts: Prompts, arguments: Mapping[str, Any]) -> None:
        """Every prompt must have the tokens, and they must leave something to the others."""
        super().check_model(family, prompts, arguments)
        for tokens, row in prompts if self.renormalise else ():
            count = len(chosen_tokens(self, tokens, row, self.words, self.roles, self.indices))
            if count * self.value > 1:
                raise InterpError(
                    f"{self!r}: {count} tokens of the prompt {row['prompt']!r} would have {count * self.value:g} together, and "
                    "probabilities sum to 1; give a smaller value, or renormalise=False"
                )

    def weigh(self, probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The tokens' columns set, and the others scaled to what is left."""
        if self.renormalise:
            rest = probs.masked_fill(chosen, 0)
            left = 1 - self.value * chosen.sum(-1, keepdim=True)
            probs = normalised(rest) * left
        return torch.where(chosen, torch.full_like(probs, self.value), probs)


@dataclass(frozen=True, repr=False)
class AblateHeads(AttentionChange):
    """Take heads out: nothing, their mean over queries, or uniform attention in place of their probabilities.

    Args:
        layers: Attention layers: globs, `"re:…"`, `"cross"` or `"self"` for all of a kind.
        value: `"zero"` (default): the heads put out nothing; the others are untouched. `"mean"`: every query has the
            mean of the head's probabilities over all queries, so that it no longer depends on the place in the
            picture. `"uniform"`: 1/keys, over the keys that are not masked.
        heads: Their numbers; default all of the layer.
        branch: `"cond"` (default), `"uncond"` or `"both"`.
        start, stop, unit: The window of steps.

    In joint attention a head is ablated as a whole, for the queries of image and text.

    >>> AblateHeads("*mid_block*attn2", heads=(0, 3))
    AblateHeads(heads=(0, 3), layers=('*mid_block*attn2',))
    """

    layers: tuple[str, ...]
    value: Literal["zero", "mean", "uniform"] = "zero"

    name: ClassVar[str] = "ablate_heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value not in ("zero", "mean", "uniform"):
            raise InterpError(
                f"{self!r}: value is 'zero', 'mean' or 'uniform'{nearest(str(self.value), ('zero', 'mean', 'uniform'))}"
            )

    def claims(self) -> frozenset[str]:
        """What these heads attend to."""
        return frozenset({self.part_claimed("heads")})

    def change(self, hooks: HookRegistry, batch: Batch, site: AttentionSite) -> Any:
        """Exchange the whole matrix of each head."""

        def change(probs: torch.Tensor, at: At) -> torch.Tensor:
            if self.value == "zero":
                return torch.zeros_like(probs)
            if self.value == "mean":
                return probs.mean(2, keepdim=True).expand_as(probs)
            open_keys = (probs > 0).any(2, keepdim=True).any(1, keepdim=True)  # masked: 0 for every head and query
            return (open_keys / open_keys.sum(-1, keepdim=True)).to(probs).expand_as(probs)

        return change


def normalised(probs: torch.Tensor) -> torch.Tensor:
    """Divide by the sum over keys; what sums to nothing stays nothing."""
    return probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)


def chosen_tokens(
    asker: Intervention, tokens: Tokens, row: Mapping[str, Any], words: Sequence[str], roles: Sequence[str],
    indices: Sequence[int],
) -> list[int]:  # fmt: skip
    """Return the positions of one prompt's tokens that are chosen by word, role or number.

    Raises:
        InterpError: the prompt has no such word or position, or no token of any of the roles.
    """
    chosen = {p for p, role in enumerate(tokens.role) if role in roles}
    if roles and not chosen:
        raise InterpError(
            f"{asker!r}: the prompt {str(row.get('prompt'))!r} has no token of the role {sentence_list(roles)}; it has "
            f"{sentence_list(dict.fromkeys(tokens.role))}"
        )
    for phrase in words:
        found = occurrences(phrase, tokens, row)
        if not found:
            raise InterpError(
                f"{asker!r}: {fill(phrase, row)!r} is not in the prompt {str(row.get('prompt'))!r}"
                f"{nearest(fill(phrase, row), tokens.words)}"
            )
        chosen |= {p for one in found for p in one}
    for i in indices:
        if i >= len(tokens.ids):
            raise InterpError(
                f"{asker!r}: the text of {str(row.get('prompt'))!r} has the positions 0–{len(tokens.ids) - 1}"
            )
        chosen.add(i)
    return sorted(chosen)
