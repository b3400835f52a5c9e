"""Exchanging what the denoiser reads: the text states of the branch with text, everywhere or in some layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from interp.branches import split_rows
from interp.catalog import attention_sites
from interp.errors import InterpError, nearest, sentence_list
from interp.families import Arguments, EncodedPrompt, Family
from interp.hooks import At, DenoiserCall, HookRegistry
from interp.interventions.base import Batch, Intervention
from interp.prompts import fill
from interp.tokens import Tokens

Prompts = list[tuple[Tokens, dict[str, Any]]]
"""Tokenised prompts, each with its row of the prompt table."""


@dataclass(frozen=True)
class Exchange:
    """Where a batch's new text states come from.

    source: (sample, token), the position in the other states that each token takes, −1 where it keeps its own.
    other: the other states, made from the samples' own; a mask or pooled vector that it leaves out is kept.
    """

    source: torch.Tensor
    other: Callable[[EncodedPrompt], EncodedPrompt]


@dataclass(frozen=True, kw_only=True, repr=False)
class TextChange(Intervention):
    """Exchange text states of the cond branch; the branch without text (a negative prompt) is never touched.

    Args:
        side: `"kv"` both keys and values read the new states, `"k"` or `"v"` only these. A mask goes with the keys.
        layers: Globs over cross-attention sites that read the new states; default all.
        pooled: `"replace"` or `"keep"` the pooled vector (SDXL, Stable Diffusion 3, FLUX), a second way for the text;
            `"only"` replaces it and leaves the tokens alone.
    """

    side: Literal["kv", "k", "v"] = "kv"
    layers: tuple[str, ...] | None = None
    pooled: Literal["replace", "keep", "only"] = "replace"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("side", ("kv", "k", "v"))
        self.one_of("pooled", ("replace", "keep", "only"))
        self.as_tuple("layers")
        if self.pooled == "only" and not (self.side == "kv" and self.layers is None):
            raise InterpError(f"{self!r}: pooled='only' leaves the tokens alone, so it has no side and no layers")

    def one_of(self, field: str, words: Sequence[str]) -> None:
        """Refuse a field's value that is none of these."""
        value = getattr(self, field)
        if value not in words:
            raise InterpError(f"{self!r}: {field} is {sentence_list(words, 9)}{nearest(str(value), words)}")

    def as_tuple(self, field: str) -> None:
        """Let a field that holds several take one alone."""
        value = getattr(self, field)
        if isinstance(value, (str, int)):
            object.__setattr__(self, field, (value,))

    def exchange(self, family: Family, batch: Batch) -> Exchange:
        """Return where the new states come from, for a batch."""
        raise NotImplementedError

    def tokens_claimed(self) -> frozenset[str]:
        """Name the tokens whose states are exchanged."""
        raise NotImplementedError

    def claims(self) -> frozenset[str]:
        """The tokens, and the pooled vector."""
        pooled = frozenset() if self.pooled == "keep" else frozenset({"pooled"})
        if self.pooled == "only":
            return pooled
        side = "" if self.side == "kv" else f"/{self.side}"
        return pooled | {claim + side for claim in self.tokens_claimed()}

    def check_model(self, family: Family, prompts: Prompts, arguments: Arguments) -> None:
        """The layers must exist, and the pooled vector if it alone is to be exchanged."""
        apart = [name for name in ("prompt_2", "prompt_3") if arguments.get(name) is not None]
        if apart:
            raise InterpError(
                f"{self!r}: the run's options give {apart[0]!r}, so its text encoders read different prompts, and positions "
                "of one are not those of the other; leave it out"
            )
        if self.side != "kv" or self.layers is not None:
            self._sites(family)
        if self.pooled == "only" and dry_text(family, arguments).pooled is None:
            raise InterpError(f"{self!r}: {type(family.pipe).__name__} gives its denoiser no pooled vector of the text")

    def _sites(self, family: Family) -> list[str]:
        """The cross-attention sites that read the new states."""
        every = attention_sites(family)
        cross = [s for s in every if s.kind == "cross"]
        if not cross:
            raise InterpError(
                f"{self!r}: in {type(family.pipe).__name__} the text is a stream that every block changes, so there are no "
                "keys or values of the prompt by layer; leave out side and layers"
            )
        chosen = [s for s in cross if any(fnmatchcase(s.name, p) for p in self.layers or ("*",))]
        if not chosen:
            raise InterpError(
                f"{self!r} matches no cross-attention layer; there are {sentence_list([s.name for s in cross], 2)}"
            )
        if any(getattr(s.module, "fused_projections", False) for s in chosen):
            raise InterpError(f"{self!r} needs separate key and value projections; call pipe.unfuse_qkv_projections()")
        return [s.name for s in chosen]

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Prepare the other states once, then exchange in each denoiser call of the window."""
        steps = self.steps(batch.timeline)
        if not steps:
            return
        family, exchange = hooks.family, self.exchange(hooks.family, batch)
        layered = None
        if self.side != "kv" or self.layers is not None:
            layered = _Layers(hooks, self._sites(family), self.side, exchange.source)

        def edit(call: DenoiserCall) -> None:
            if layered is not None:
                layered.end()
            if call.step not in steps or "cond" not in call.branches:
                return
            text = family.widened(family.text_inputs(call.kwargs), exchange.source.shape[1])
            rows = _Rows(call.branches)
            own = EncodedPrompt(
                rows.cond(text.embeddings),
                None if text.pooled is None else rows.cond(text.pooled),
                None if text.mask is None else rows.cond(text.mask),
            )
            length = own.embeddings.shape[1]
            other = family.widened(exchange.other(own), length)
            source = F.pad(exchange.source, (0, length - exchange.source.shape[1]), value=-1)
            pooled = text.pooled
            if pooled is not None and other.pooled is not None and self.pooled != "keep":
                pooled = rows.put(pooled, other.pooled.to(pooled))
            new = EncodedPrompt(text.embeddings, pooled, text.mask)
            if self.pooled != "only":
                states = rows.put(text.embeddings, taken(own.embeddings, other.embeddings, source))
                mask = text.mask
                if mask is not None and own.mask is not None and other.mask is not None:
                    mask = rows.put(mask, taken(own.mask, other.mask, source))
                if layered is None:
                    new = EncodedPrompt(states, pooled, mask)
                else:
                    layered.begin(call, EncodedPrompt(states, mask=mask), masked=mask is not text.mask)
            call.kwargs = family.with_text(call.kwargs, new)

        hooks.on_call(edit)


class _Rows:
    """The cond branch's rows of a denoiser call."""

    def __init__(self, branches: tuple[str, ...]) -> None:
        self.branches = branches

    def cond(self, tensor: torch.Tensor) -> torch.Tensor:
        return split_rows(tensor, self.branches)["cond"]

    def put(self, tensor: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return torch.cat(list({**split_rows(tensor, self.branches), "cond": cond}.values()))


class _Layers:
    """Some cross-attention layers that read other states, as keys, values or both."""

    def __init__(self, hooks: HookRegistry, sites: Sequence[str], side: str, source: torch.Tensor) -> None:
        self._family, self._source = hooks.family, source
        self._call: DenoiserCall | None = None
        self._states: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        for site in sites:
            for one in side:
                hooks.write(f"{site}.to_{one}:in", self._exchange)
            if "k" in side:
                module = hooks.family_module(site)
                hooks.on_exit(module.register_forward_pre_hook(self._unmask, with_kwargs=True).remove)

    def begin(self, call: DenoiserCall, text: EncodedPrompt, masked: bool) -> None:
        """Note what the layers are to read in this call; all rows, so that the arithmetic is that of the call itself.

        masked: the mask is another one, too.
        """
        states, bias = self._family.layer_text(text)
        rows = _Rows(call.branches)
        self._call, self._states = call, rows.cond(states)
        self._bias = rows.cond(bias) if masked and bias is not None else None

    def end(self) -> None:
        """Read what the denoiser gives again."""
        self._call = self._states = self._bias = None

    def _exchange(self, states: torch.Tensor, at: At) -> torch.Tensor | None:
        if self._states is None or at.branch != "cond":
            return None
        return taken(states, self._states, self._source, at_source=False)

    def _unmask(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call, given = self._call, kwargs.get("attention_mask")
        if call is None or self._bias is None or given is None or "cond" not in call.branches:
            return None
        bias = _Rows(call.branches).put(given, self._bias.to(given).reshape(-1, *given.shape[1:]))
        return args, {**kwargs, "attention_mask": bias}


def taken(own: torch.Tensor, other: torch.Tensor, source: torch.Tensor, at_source: bool = True) -> torch.Tensor:
    """Return `own` (sample, token, …) with the tokens of `source` ≥ 0 taken from `other`: from there, or in place."""
    source = source.to(own.device)
    other = other.to(own)
    if at_source:
        other = other[torch.arange(len(source), device=own.device)[:, None], source.clamp(min=0)]
    keep = (source < 0).reshape(*source.shape, *[1] * (own.ndim - 2))
    return torch.where(keep, own, other)


def dry_text(family: Family, arguments: Arguments) -> EncodedPrompt:
    """Text inputs of a denoiser call without data: which of them there are, and how wide."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return family.text_inputs(family.dry_inputs(arguments).kwargs)


def positions(family: Family, arguments: Arguments, length: int) -> dict[str, range]:
    """Encoder → the positions of its tokens in a text of this length."""
    return {name: range(length)[where] for name, where in family.text_segments(arguments).items()}


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
        for mine, row in prompts:
            other = family.tokenize(fill(self.prompt, row), arguments)
            if len(other.ids) != len(mine.ids) and not family.ragged:
                raise InterpError(
                    f"{self!r}: the other prompt has {len(other.ids)} text positions and this one {len(mine.ids)}; with "
                    f"{type(family.pipe).__name__} both must have the same number of tokens"
                )

    def exchange(self, family: Family, batch: Batch) -> Exchange:
        """Encode the other prompts, once for the batch."""
        prompts = [fill(self.prompt, row) for row in batch.rows]
        others = [family.tokenize(p, batch.arguments) for p in prompts]
        tokens = batch.tokens
        if family.ragged:  # behind each prompt there is room for the other's end
            room = max(len(t.ids) for t in tokens) + max(len(t.ids) for t in others)
            tokens, others = ([t.lengthened(room) for t in some] for some in (tokens, others))
        encoded = family.widened(family.encode(prompts, batch.arguments), len(tokens[0].ids))
        found = []
        for mine, other in zip(tokens, others, strict=True):
            source = [-1] * len(mine.ids)
            for where in positions(family, batch.arguments, len(mine.ids)).values():
                part = slice(where.start, where.stop)
                for p, q in self.take(mine.part(part), other.part(part)).items():
                    source[where[p]] = where[q]
            found.append(source)
        return Exchange(torch.tensor(found), lambda own: encoded)

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
    ReplaceEOS(prompt='{target}', side='v', count=5)
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
        super().check_model(family, prompts, arguments)
        tokens = prompts[0][0]
        if self.pooled != "only" and "eos" not in tokens.role:
            raise InterpError(
                f"{self!r}: the text of {type(family.pipe).__name__} has no end-of-text token; its tokens are "
                f"{sentence_list(dict.fromkeys(tokens.role))}"
            )

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


def check_text(one: Intervention, prompt: Any) -> None:
    """Refuse a prompt that is no text, as YAML makes of `{target}`."""
    if not isinstance(prompt, str):
        raise InterpError(
            f"{one!r}: prompt is a text; in YAML a column's name in braces needs quotes: '\"{{target}}\"'"
        )


def check_count(one: Intervention, skip: int, count: int | None) -> None:
    """Refuse numbers of positions that are none."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (skip, 0 if count is None else count))
    if not whole or skip < 0 or (count is not None and count < 1):
        raise InterpError(f"{one!r}: skip is a whole number from 0, count one from 1, or None for all")
