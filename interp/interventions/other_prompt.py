"""Text states of another prompt: all of them, or those of its end-of-text run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from interp.errors import InterpError, sentence_list
from interp.families import Arguments, Family
from interp.interventions.base import Batch
from interp.interventions.text import Exchange, Prompts, TextChange, check_count, check_text, positions
from interp.prompts import fill
from interp.tokens import Tokens


@dataclass(frozen=True, repr=False)
class OtherPrompt(TextChange):
    """Exchange text states for those of another prompt; `"{target}"` takes it from a column of the prompt table."""

    prompt: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text(self, self.prompt)

    def check(self, table: Mapping[str, Sequence[Any]], guided: bool) -> None:
        """A column that the prompt names must exist."""
        fill(self.prompt, {name: values[0] for name, values in table.items()})

    def check_model(self, family: Family, prompts: Prompts, arguments: Arguments) -> None:
        """The other prompts must fit the context and be as long as these, padding included."""
        super().check_model(family, prompts, arguments)
        exchanged = False
        for mine, row in prompts:
            other = family.tokenize(fill(self.prompt, row), arguments)
            if len(other.ids) != len(mine.ids) and not family.ragged:
                raise InterpError(
                    f"{self!r}: the other prompt has {len(other.ids)} text positions and this one {len(mine.ids)}; with "
                    f"{type(family.pipe).__name__} both must have the same number of tokens"
                )
            known = not (
                family.ragged or family.fallback
            )  # else room is made for them, or nothing is known of the text
            exchanged = exchanged or not known or max(self._source(family, mine, other, arguments), default=-1) >= 0
        if not exchanged and self.pooled != "only":
            raise InterpError(f"{self!r} would change nothing: it leaves no position of any prompt to be exchanged")

    def exchange(self, family: Family, batch: Batch) -> Exchange:
        """Encode the other prompts, once for the batch."""
        prompts = [fill(self.prompt, row) for row in batch.rows]
        others = [family.tokenize(p, batch.arguments) for p in prompts]
        tokens = batch.tokens
        if family.ragged:  # behind each prompt there is room for the other's end
            room = max(len(t.ids) for t in tokens) + max(len(t.ids) for t in others)
            tokens, others = ([t.lengthened(room) for t in some] for some in (tokens, others))
        encoded = family.widened(family.encode(prompts, batch.arguments), len(tokens[0].ids))
        found = [self._source(family, mine, other, batch.arguments) for mine, other in zip(tokens, others, strict=True)]
        return Exchange(torch.tensor(found), lambda own: encoded)

    def _source(self, family: Family, mine: Tokens, other: Tokens, arguments: Arguments) -> list[int]:
        """The position that each token's new state comes from, −1 where it keeps its own."""
        source = [-1] * len(mine.ids)
        for where in positions(family, arguments, len(mine.ids)).values():
            part = slice(where.start, where.stop)
            for p, q in self.take(mine.part(part), other.part(part)).items():
                source[where[p]] = where[q]
        return source

    def take(self, mine: Tokens, other: Tokens) -> dict[int, int]:
        """Return which positions of one encoder are taken from which of the other prompt's."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class ReplaceEOS(OtherPrompt):
    """Let the prompt's [EOS] come from another prompt: `[BOS] + A + [EOS]_B` of Yi et al. (2405.15330), §5.1.

    Their "[EOS]" is the first end-of-text token and all padding after it (Stable Diffusion 1 pads with it). A T5 encoder
    has one end-of-text token, and PixArt masks the padding after it: there the exchange is of that one state.

    Args:
        prompt: B; `"{target}"` takes it from a column of the prompt table.
        align: The paper does not say what happens when A and B differ in length. `"first_eos"`: B's run of EOS is
            shifted to begin after A's last word, and cut or extended (by its last state) to fill the context.
            `"position"`: states are copied at the positions that are EOS in both.
        skip, count: Exchange `count` positions of the run (None: all the rest) after the first `skip`; which of them
            matter is the paper's appendix C.

    >>> ReplaceEOS("{target}", side="v", count=5)
    ReplaceEOS(side='v', prompt='{target}', count=5)
    """

    align: Literal["first_eos", "position"] = "first_eos"
    skip: int = 0
    count: int | None = None

    name: ClassVar[str] = "replace_eos"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("align", ("first_eos", "position"))
        check_count(self, self.skip, self.count)

    def tokens_claimed(self) -> frozenset[str]:
        """Positions of the run that begins with the first EOS."""
        return frozenset({f"text:eos[{self.skip}:{'' if self.count is None else self.skip + self.count}]"})

    def check_model(self, family: Family, prompts: Prompts, arguments: Arguments) -> None:
        """There must be an end-of-text token."""
        tokens = prompts[0][0]
        if self.pooled != "only" and "eos" not in tokens.role:
            raise InterpError(
                f"{self!r}: the text of {type(family.pipe).__name__} has no end-of-text token; its tokens are "
                f"{sentence_list(dict.fromkeys(tokens.role))}"
            )
        super().check_model(family, prompts, arguments)

    def take(self, mine: Tokens, other: Tokens) -> dict[int, int]:
        """A's positions after its last word, from B's run of EOS."""
        if self.align == "position":
            first = max(mine.eos, other.eos)
            run = {p: p for p in range(first, len(mine.ids))}
        else:
            first, last = mine.eos, len(other.ids) - 1
            run = {p: min(other.eos + p - first, last) for p in range(first, len(mine.ids))}
        stop = len(mine.ids) if self.count is None else first + self.skip + self.count
        return {p: q for p, q in run.items() if first + self.skip <= p < stop}


@dataclass(frozen=True, repr=False)
class ReplacePrompt(OtherPrompt):
    """Let the denoiser read another prompt within the window, in all layers or in some (LocoGen, 2405.01008).

    >>> ReplacePrompt("{target}", start=0.5)
    ReplacePrompt(start=0.5, prompt='{target}')
    """

    name: ClassVar[str] = "replace_prompt"

    def tokens_claimed(self) -> frozenset[str]:
        """All text states."""
        return frozenset({"text"})

    def take(self, mine: Tokens, other: Tokens) -> dict[int, int]:
        """Every position."""
        return {p: p for p in range(len(mine.ids))}
