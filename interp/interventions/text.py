"""Exchanging what the denoiser reads: the text states of the branch with text, everywhere or in some layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from interp.errors import InterpError, nearest
from interp.families import Arguments, AttentionSite, EncodedPrompt, Family
from interp.hooks import At, DenoiserCall, HookRegistry
from interp.interventions.base import Batch, Intervention
from interp.interventions.claims import claim
from interp.interventions.layers import chosen_cross_layers
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
        self.as_tuples("layers")
        if self.pooled == "only" and self.layered:
            raise InterpError(f"{self!r}: pooled='only' leaves the tokens alone, so it has no side and no layers")

    def one_of(self, field: str, words: Sequence[str]) -> None:
        """Refuse a field's value that is none of these."""
        value = getattr(self, field)
        if value not in words:
            choice = f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"
            raise InterpError(f"{self!r}: {field} is {choice}{nearest(str(value), words)}")

    def exchange(self, family: Family, batch: Batch) -> Exchange:
        """Return where the new states come from, for a batch."""
        raise NotImplementedError

    def tokens_claimed(self) -> frozenset[str]:
        """Name the tokens whose states are exchanged."""
        raise NotImplementedError

    def claims(self) -> frozenset[str]:
        """The tokens, and the pooled vector."""
        return self._claimed(self.layers, has_pooled=True)

    def claims_in(self, family: Family) -> frozenset[str]:
        """The same, with the layers by name, and the pooled vector if there is one."""
        if family.fallback:  # of whose text nothing is known
            return self.claims()
        pooled = dry_text(family, family.arguments()).pooled is not None
        return self._claimed(None if self.layers is None else [s.name for s in self._sites(family)], pooled)

    def _claimed(self, layers: Sequence[str] | None, has_pooled: bool) -> frozenset[str]:
        side = None if self.side == "kv" else self.side
        tokens = frozenset() if self.pooled == "only" else self.tokens_claimed()
        pooled = frozenset({"pooled"} if has_pooled and self.pooled != "keep" else ())
        return pooled | {claim(one, side=side, layers=layers) for one in tokens}

    @property
    def layered(self) -> bool:
        """Whether keys or values, or some layers alone, read the new states."""
        return self.side != "kv" or self.layers is not None

    def writes(self, family: Family) -> list[str]:
        """What the keys and values of some layers are made of."""
        sites = self._sites(family) if self.layered else []
        return [f"{site.name}.to_{one}:in" for site in sites for one in self.side]

    def acts_on(self) -> tuple[str, ...]:
        """The branch with text."""
        return ("cond",)

    def check_model(self, family: Family, prompts: Prompts, arguments: Arguments) -> None:
        """The layers must exist, and the pooled vector if it alone is to be exchanged."""
        apart = [name for name in ("prompt_2", "prompt_3") if arguments.get(name) is not None]
        if apart:
            raise InterpError(
                f"{self!r}: the run's options give {apart[0]!r}, so its text encoders read different prompts, and positions "
                "of one are not those of the other; leave it out"
            )
        if self.layered:
            self._sites(family)
        if self.pooled == "only" and dry_text(family, arguments).pooled is None:
            raise InterpError(f"{self!r}: {type(family.pipe).__name__} gives its denoiser no pooled vector of the text")

    def _sites(self, family: Family) -> list[AttentionSite]:
        """The cross-attention layers that read the new states."""
        chosen = chosen_cross_layers(
            self, family, self.layers,
            f"in {type(family.pipe).__name__} the text is a stream that every block changes, so there are no keys or values of "
            "the prompt by layer; leave out side and layers",
        )  # fmt: skip
        if any(getattr(s.module, "fused_projections", False) for s in chosen):
            raise InterpError(f"{self!r} needs separate key and value projections; call pipe.unfuse_qkv_projections()")
        return chosen

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Prepare the other states once, then exchange in each denoiser call of the window."""
        steps = self.steps(batch.timeline)
        if not steps:
            return
        family, exchange = hooks.family, self.exchange(hooks.family, batch)
        layered = None
        if self.layered:
            sites = [s.name for s in self._sites(family)]
            layered = _Layers(hooks, sites, self.side, exchange.source, steps)

        def edit(call: DenoiserCall) -> None:
            if layered is not None:
                layered.end()
            if call.step not in steps or "cond" not in call.branches:
                return
            text = family.widened(family.text_inputs(call.kwargs), exchange.source.shape[1])
            rows = _Rows(call)
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

    def __init__(self, call: DenoiserCall) -> None:
        self._call = call

    def cond(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._call.split(tensor)["cond"]

    def put(self, tensor: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return torch.cat(list({**self._call.split(tensor), "cond": cond}.values()))


class _Layers:
    """Some cross-attention layers that read other states, as keys, values or both."""

    def __init__(
        self, hooks: HookRegistry, sites: Sequence[str], side: str, source: torch.Tensor, steps: frozenset[int]
    ) -> None:
        self._family, self._source = hooks.family, source
        self._call: DenoiserCall | None = None
        self._states: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        for site in sites:
            for one in side:
                hooks.write(f"{site}.to_{one}:in", self._exchange, steps)
            if "k" in side:
                module = hooks.family_module(site)
                hooks.on_exit(module.register_forward_pre_hook(self._unmask, with_kwargs=True).remove)

    def begin(self, call: DenoiserCall, text: EncodedPrompt, masked: bool) -> None:
        """Note what the layers are to read in this call; all rows, so that the arithmetic is that of the call itself.

        masked: the mask is another one, too.
        """
        states, bias = self._family.layer_text(text)
        rows = _Rows(call)
        self._call, self._states = call, rows.cond(states)
        self._bias = rows.cond(bias) if masked and bias is not None else None

    def end(self) -> None:
        """Read what the denoiser gives again."""
        self._call = self._states = self._bias = None

    def _exchange(self, states: torch.Tensor, at: At) -> torch.Tensor | None:
        if self._states is None or at.branch != "cond":
            return None
        here = list(at.members)  # samples may have left the call
        return taken(states, self._states[here], self._source[here], at_source=False)

    def _unmask(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call, given = self._call, kwargs.get("attention_mask")
        if call is None or self._bias is None or given is None or "cond" not in call.branches:
            return None
        bias = _Rows(call).put(given, self._bias.to(given).reshape(-1, *given.shape[1:]))
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
