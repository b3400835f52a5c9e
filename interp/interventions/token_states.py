"""Replacing the states of some tokens: by role, word or position; by nothing, noise, or states of other tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from interp.errors import InterpError, nearest, sentence_list
from interp.families import Arguments, EncodedPrompt, Family
from interp.interventions.base import Batch, is_number
from interp.interventions.claims import token_claims
from interp.interventions.text import Exchange, Prompts, TextChange, check_count, check_text, dry_text, positions
from interp.prompts import fill
from interp.stores.table import ROLES
from interp.token_choice import chosen_tokens
from interp.tokens import Tokens

VALUES = ("zero", "random", "bos", "eos", "pad", "repeat", "prompt")


@dataclass(frozen=True, repr=False)
class ReplaceTokens(TextChange):
    """Replace the text states of chosen tokens in the cond branch.

    Args:
        roles: `"bos"`, `"word"`, `"eos"` (the first end-of-text token), `"pad"`. The [EOS] of Yi et al. (2405.15330) is
            `("eos", "pad")`.
        words: Words or phrases, all their tokens; `"{subject}"` takes them from a column of the prompt table.
        occurrence: Which one, counted from 0, where a word appears several times; default all.
        indices: Positions in the text, counted from 0. Roles, words and indices add up.
        count: Only so many of the chosen positions, counted from the first (of each encoder's).
        value: What the states become. `"zero"` (default). `"random"`: normal noise of mean 0 and, at scale 1, the
            standard deviation of the sample's own states (over its positions and features, those of one encoder); drawn
            on the CPU from `seed` and the sample's seed, the same at every step, in every condition and on every device.
            `"bos"`, `"eos"`: the prompt's own first or first end-of-text state. `"pad"`: clean padding (Toker et al.,
            2501.06751), the state that an empty prompt has at that position (its first padding, where it has bos or
            eos). `"repeat"`: the states of the prompt's remaining words, from the first, over and over (appendix C of Yi
            et al.); these are repeated as states, which keep the positions they were encoded at. To repeat words as text,
            write them in the prompt. `"prompt"`: the states of `prompt` at the same positions.
        prompt: Another prompt, or `"{target}"` from a column of the prompt table; makes `value="prompt"`.
        scale: Of the noise.
        seed: Of the noise, mixed with each sample's.
        pooled: `"keep"` (default) or `"replace"` the pooled vector by the same value (zero, random, pad, prompt), or
            replace it `"only"`.

    Masks (T5) go with states that come from another token; zero and random leave the mask as it is.

    >>> ReplaceTokens(roles=("eos", "pad"), value="random", scale=0.5)
    ReplaceTokens(roles=('eos', 'pad'), value='random', scale=0.5)
    >>> ReplaceTokens(words="red", prompt="{target}").value
    'prompt'
    """

    pooled: Literal["replace", "keep", "only"] = field(default="keep", kw_only=True)
    roles: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    occurrence: int | None = None
    indices: tuple[int, ...] = ()
    count: int | None = None
    value: Literal["zero", "random", "bos", "eos", "pad", "repeat", "prompt"] | None = None
    prompt: str | None = None
    scale: float = 1.0
    seed: int = 0

    name: ClassVar[str] = "replace_tokens"

    def __post_init__(self) -> None:
        if self.value is None:
            object.__setattr__(self, "value", "zero" if self.prompt is None else "prompt")
        for several in ("roles", "words", "indices"):
            self.as_tuples(several)
        super().__post_init__()
        self.one_of("value", VALUES)
        check_count(self, 0, self.count)
        wrong = [r for r in self.roles if r not in ROLES]
        if wrong:
            raise InterpError(f"{self!r}: a role is {sentence_list(ROLES)}, not {wrong[0]!r}{nearest(wrong[0], ROLES)}")
        if not (self.roles or self.words or self.indices) and self.pooled != "only":
            raise InterpError(
                f"{self!r} names no token; give roles=('word',), words=('red',) or indices=(3,), or pooled='only'"
            )
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in self.indices):
            raise InterpError(f"{self!r}: indices are whole numbers, counted from 0")
        if not all(isinstance(w, str) and w.strip() for w in self.words):
            raise InterpError(f"{self!r}: words are texts, e.g. words=('red', 'blue square')")
        if self.occurrence is not None and not (
            self.words and isinstance(self.occurrence, int) and self.occurrence >= 0
        ):
            raise InterpError(
                f"{self!r}: occurrence counts from 0 which of several equal words is meant; it needs words"
            )
        if (self.value == "prompt") != (self.prompt is not None):
            raise InterpError(f"{self!r}: value='prompt' and prompt='…' go together; another value takes no prompt")
        if self.prompt is not None:
            check_text(self, self.prompt)
        if not is_number(self.scale, least=0):
            raise InterpError(f"{self!r}: scale is a number from 0, in standard deviations of the states")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InterpError(f"{self!r}: seed is a whole number")
        if self.value in ("bos", "eos", "repeat") and self.pooled != "keep":
            raise InterpError(
                f"{self!r}: a pooled vector has no {self.value}; it can be zero, random, pad or a prompt's"
            )

    def tokens_claimed(self) -> frozenset[str]:
        """The roles, words and positions, as far as they are known without a prompt."""
        return token_claims("text", self.words, self.roles, self.indices, self.occurrence, self.count)

    # Before the run

    def check(self, table: Mapping[str, Sequence[Any]], guided: bool) -> None:
        """Columns that words and prompt name must exist."""
        row = {name: values[0] for name, values in table.items()}
        for text in (*self.words, self.prompt or ""):
            fill(text, row)

    def check_model(self, family: Family, prompts: Prompts, arguments: Arguments) -> None:
        """Every prompt must have the words and positions, some prompt the roles, and the value must have a meaning."""
        super().check_model(family, prompts, arguments)
        if self.pooled == "only":
            return
        model = type(family.pipe).__name__
        there = list(dict.fromkeys(role for tokens, _ in prompts for role in tokens.role))
        for role in self.roles:
            if role not in there:
                raise InterpError(
                    f"{self!r}: the text of {model} has no {role!r}; its roles are {sentence_list(there)}"
                )
        only_pad = self.roles == ("pad",) and not (self.words or self.indices)
        if only_pad and self.value in ("zero", "random", "pad") and dry_text(family, arguments).mask is not None:
            raise InterpError(f"{self!r}: {model} masks the padding, so nothing reads what would be replaced")
        empty = family.tokenize("", arguments)
        for tokens, row in prompts:
            if self.value == "pad" and len(empty.ids) != len(tokens.ids):
                raise InterpError(f"{self!r}: {model} does not pad its text, so there is no clean padding")
            if self.prompt is not None:
                other = family.tokenize(fill(self.prompt, row), arguments)
                if len(other.ids) != len(tokens.ids):
                    raise InterpError(
                        f"{self!r}: the other prompt has {len(other.ids)} text positions and this one {len(tokens.ids)}; "
                        f"with {model} both must have the same number of tokens"
                    )
            self._sources(family, tokens, row, empty, arguments)

    # In a run

    def exchange(self, family: Family, batch: Batch) -> Exchange:
        """Where each token's state comes from: the own states, another prompt's, zeros or noise."""
        empty = family.tokenize("", batch.arguments)
        found = [
            [-1] * len(tokens.ids) if self.pooled == "only" else self._sources(family, tokens, row, empty, batch.arguments)
            for tokens, row in zip(batch.tokens, batch.rows, strict=True)
        ]  # fmt: skip
        width = max(map(len, found))
        source = torch.tensor([[*one, *[-1] * (width - len(one))] for one in found])
        if self.value in ("pad", "prompt"):
            texts = ["" if self.prompt is None else fill(self.prompt, row) for row in batch.rows]
            encoded = family.encode(texts, batch.arguments)
            return Exchange(source, lambda own: encoded)
        if self.value in ("bos", "eos", "repeat"):
            return Exchange(source, lambda own: own)
        if self.value == "zero":
            return Exchange(source, _zeros)
        parts = list(positions(family, batch.arguments, source.shape[1]).values())
        return Exchange(source, _Noise(self.scale, self.seed, batch.seeds, parts))

    def _sources(
        self, family: Family, tokens: Tokens, row: Mapping[str, Any], empty: Tokens, arguments: Arguments
    ) -> list[int]:
        """The position that each token's new state comes from, −1 where it keeps its own."""
        source = [-1] * len(tokens.ids)
        chosen = chosen_tokens(
            self, tokens, row, words=self.words, roles=self.roles, indices=self.indices, occurrence=self.occurrence
        )
        held = set()
        for where in positions(family, arguments, len(tokens.ids)).values():
            inside = [p for p in where if p in chosen][: self.count]
            held |= set(where)
            for p, q in zip(inside, self._from(where, inside, tokens, empty), strict=True):
                source[p] = q
        outside = sorted({*chosen} - held) if self.indices else []
        if outside:
            raise InterpError(f"{self!r}: no text encoder fills position {outside[0]} in {type(family.pipe).__name__}")
        return source

    def _from(self, where: range, chosen: list[int], tokens: Tokens, empty: Tokens) -> list[int]:
        """Positions whose states the chosen ones of one encoder take."""
        if self.value in ("zero", "random", "prompt") or not chosen:
            return chosen
        if self.value == "repeat":
            words = [p for p in where if tokens.role[p] == "word" and p not in chosen]
            if not words:
                raise InterpError(f"{self!r}: there are no words to repeat beside those that are replaced")
            return [words[i % len(words)] for i in range(len(chosen))]
        if self.value == "pad":
            pads = [p for p in where if empty.role[p] == "pad"]
            if not pads:
                raise InterpError(f"{self!r}: an empty prompt has no padding, so there is no clean padding")
            return [p if empty.role[p] == "pad" else pads[0] for p in chosen]
        found = [p for p in where if tokens.role[p] == self.value]
        if not found:
            raise InterpError(
                f"{self!r}: position {chosen[0]} belongs to a text encoder that has no {self.value!r}; its tokens are "
                f"{sentence_list(dict.fromkeys(tokens.role[p] for p in where))}"
            )
        return found[:1] * len(chosen)


def _zeros(own: EncodedPrompt) -> EncodedPrompt:
    pooled = None if own.pooled is None else torch.zeros_like(own.pooled)
    return EncodedPrompt(torch.zeros_like(own.embeddings), pooled)


class _Noise:
    """Seeded normal noise as large as the states; what a model leaves at 0 (unused features) stays 0."""

    def __init__(self, scale: float, seed: int, seeds: Sequence[int], parts: Sequence[range]) -> None:
        self._scale, self._seed, self._seeds, self._parts = scale, seed, seeds, parts
        self._drawn: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, own: EncodedPrompt) -> EncodedPrompt:
        states, noise = own.embeddings.float(), self._noise(own.embeddings)
        sized = torch.zeros_like(states)
        for where in self._parts:
            part = slice(where.start, where.stop)
            sized[:, part] = noise[:, part] * _deviation(states[:, part])
        pooled = None
        if own.pooled is not None:
            vector = own.pooled.float()[:, None]
            pooled = (self._noise(own.pooled)[:, None] * _deviation(vector))[:, 0] * self._scale
        return EncodedPrompt(sized * self._scale, pooled)

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normal (sample, …); a position's noise does not depend on which others are replaced."""
        shape = tuple(like.shape[1:])
        if shape not in self._drawn:
            drawn = [torch.randn(shape, generator=self._generator(s, len(shape))) for s in self._seeds]
            self._drawn[shape] = torch.stack(drawn).to(like.device)
        return self._drawn[shape]

    def _generator(self, sample: int, kind: int) -> torch.Generator:
        entropy = [self._seed % 2**64, sample % 2**64, kind]
        return torch.Generator("cpu").manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def _deviation(states: torch.Tensor) -> torch.Tensor:
    """Standard deviation of (sample, token, feature) over tokens and features in use, 0 for features that are not."""
    there = ~states.isnan().any(2, keepdim=True)  # not so behind the end of a shorter prompt
    states = states.nan_to_num()
    used = (states != 0).any(1, keepdim=True)
    number = used.sum((1, 2), keepdim=True).clamp(min=1) * there.sum(1, keepdim=True)
    mean = states.sum((1, 2), keepdim=True) / number
    variance = ((states - mean) ** 2 * used * there).sum((1, 2), keepdim=True) / number
    return variance.sqrt() * used
