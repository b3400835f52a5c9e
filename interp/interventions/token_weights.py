"""Changing the probabilities with which the image attends to chosen tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch

from interp.errors import InterpError, nearest, sentence_list
from interp.families import AttentionSite, Family
from interp.hooks import At, HookRegistry
from interp.interventions.attention import AttentionChange, normalised
from interp.interventions.base import Batch, is_number
from interp.interventions.claims import token_claims
from interp.interventions.places import BRANCHES, present
from interp.interventions.text import Prompts
from interp.prompts import fill
from interp.stores.table import ROLES
from interp.token_choice import chosen_tokens
from interp.tokens import Tokens


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
        self.as_tuples("words", "roles", "indices")
        wrong = [r for r in self.roles if r not in ROLES]
        if wrong:
            raise InterpError(f"{self!r}: a role is {sentence_list(ROLES)}, not {wrong[0]!r}{nearest(wrong[0], ROLES)}")
        if not (self.words or self.roles or self.indices):
            raise InterpError(f"{self!r} names no token; give words=('red',), roles=('pad',) or indices=(3,)")
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in self.indices):
            raise InterpError(f"{self!r}: indices are whole numbers, counted from 0")
        if self.words and self.branch != "cond":
            raise InterpError(f"{self!r}: words are those of the prompt, so they need branch='cond'")

    @property
    def changed_part(self) -> str:
        """Image → text."""
        return "cross"

    def whats(self) -> frozenset[str]:
        """These tokens' probabilities; what is cached elsewhere cannot be changed."""
        return token_claims(f"cross_attention:{self.name}", self.words, self.roles, self.indices)

    def check(self, table: Mapping[str, Sequence[Any]], guided: bool) -> None:
        """Columns that words name must exist."""
        row = {name: values[0] for name, values in table.items()}
        for word in self.words:
            fill(word, row)

    def check_model(self, family: Family, prompts: Prompts, arguments: Mapping[str, Any]) -> None:
        """Every prompt must have the words and positions."""
        super().check_model(family, prompts, arguments)
        for tokens, row in prompts:
            for branch in BRANCHES[self.branch]:
                self.positions(family, tokens, row, branch, arguments)

    def positions(
        self, family: Family, tokens: Tokens, row: Mapping[str, Any], branch: str, arguments: Mapping[str, Any]
    ) -> list[int]:
        """Where the chosen tokens are in the prompt of a row, or in its negative prompt, which the other branch reads.

        Raises:
            InterpError: it has none of them.
        """
        if branch == "uncond":
            negative = str(row.get("negative_prompt") or "")
            tokens, row = family.tokenize(negative, family.negative_arguments(arguments)), {"prompt": negative}
        chosen = chosen_tokens(self, tokens, row, words=self.words, roles=self.roles, indices=self.indices)
        if not chosen:
            raise InterpError(
                f"{self!r}: the {branch} branch's prompt {str(row.get('prompt'))!r} has no token of the role "
                f"{sentence_list(self.roles)}; it has {sentence_list(dict.fromkeys(tokens.role))}"
            )
        return chosen

    def change(self, hooks: HookRegistry, batch: Batch, site: AttentionSite) -> Any:
        """Change the columns of the chosen tokens, for the image's queries."""

        @cache
        def positions(sample: int, branch: str) -> list[int]:
            return self.positions(hooks.family, batch.tokens[sample], batch.rows[sample], branch, batch.arguments)

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
        if not is_number(self.scale, least=0):
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
        if not is_number(self.value, least=0) or self.value > 1:
            raise InterpError(f"{self!r}: value is a probability, from 0 to 1")

    def check_model(self, family: Family, prompts: Prompts, arguments: Mapping[str, Any]) -> None:
        """Every prompt must have the tokens, and they must leave something to the others."""
        super().check_model(family, prompts, arguments)
        for tokens, row in prompts if self.renormalise else ():
            count = max(len(self.positions(family, tokens, row, b, arguments)) for b in BRANCHES[self.branch])
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
