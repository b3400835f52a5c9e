"""Exchanging what the denoiser reads: the text states of the branch with text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch

from interp.branches import split_rows
from interp.catalog import attention_sites
from interp.errors import InterpError, nearest, sentence_list
from interp.families import EncodedPrompt
from interp.hooks import DenoiserCall, HookRegistry
from interp.interventions.base import Batch, Intervention
from interp.prompts import fill
from interp.tokens import Tokens


@dataclass(frozen=True, repr=False)
class _ReplaceText(Intervention):
    """Replace text states of the cond branch by states made from another prompt.

    Args:
        prompt: The other prompt; `"{target}"` takes it from a column of the prompt table.
        side: `"kv"` both keys and values read the new states, `"k"` or `"v"` only these.
        layers: Globs over cross-attention sites that read the new states; default all.
        pooled: `"replace"` or `"keep"` the pooled vector (SDXL), which is made from the encoder's EOS state.
    """

    prompt: str
    side: Literal["kv", "k", "v"] = "kv"
    layers: tuple[str, ...] | None = None
    pooled: Literal["replace", "keep"] = "replace"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, words in (("side", ("kv", "k", "v")), ("pooled", ("replace", "keep"))):
            value = getattr(self, field)
            if value not in words:
                raise InterpError(f"{self!r}: {field} is {sentence_list(words)}{nearest(str(value), words)}")
        if isinstance(self.layers, str):
            object.__setattr__(self, "layers", (self.layers,))

    def check(self, table: Mapping[str, Sequence[Any]], guided: bool) -> None:
        """A column that the prompt names must exist."""
        fill(self.prompt, {name: values[0] for name, values in table.items()})

    def mix(self, old: torch.Tensor, new: torch.Tensor, mine: Tokens, other: Tokens) -> torch.Tensor:
        """Return one sample's states (token, feature) from the prompt's own (`old`) and the other prompt's (`new`)."""
        raise NotImplementedError

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Encode the other prompts once, then exchange states in each denoiser call of the window."""
        family, steps = hooks.family, self.steps(batch.timeline)
        if not steps:
            return
        prompts = [fill(self.prompt, row) for row in batch.rows]
        others = [family.tokenize(p, batch.arguments) for p in prompts]
        encoded = family.encode(prompts, batch.arguments)
        segments = list(family.text_segments(batch.arguments).values())

        def changed(states: torch.Tensor, fresh: torch.Tensor | None = None) -> torch.Tensor:
            fresh = (encoded.embeddings if fresh is None else fresh).to(states)
            if fresh.shape != states.shape:
                raise InterpError(
                    f"{self!r}: the other prompt has {fresh.shape[1]} text positions and this one {states.shape[1]}; with "
                    f"{type(hooks.pipe).__name__} both must have the same number of tokens"
                )
            return torch.stack([
                torch.cat([self.mix(old[s], new[s], mine.part(s), other.part(s)) for s in segments])
                for old, new, mine, other in zip(states, fresh, batch.tokens, others, strict=True)
            ])  # fmt: skip

        whole = self.side == "kv" and self.layers is None

        def edit(call: DenoiserCall) -> None:
            if call.step not in steps or "cond" not in call.keep or "cond" not in call.branches:
                return
            text = family.text_inputs(call.kwargs)
            parts = split_rows(text.embeddings, call.branches)
            if whole:
                parts["cond"] = changed(parts["cond"])
            mask = text.mask
            if whole and mask is not None and encoded.mask is not None:
                masks = split_rows(mask, call.branches)
                masks["cond"] = changed(masks["cond"][..., None], encoded.mask[..., None])[..., 0]
                mask = torch.cat(list(masks.values()))
            pooled = text.pooled
            if pooled is not None and encoded.pooled is not None and self.pooled == "replace":
                pools = split_rows(pooled, call.branches)
                pools["cond"] = encoded.pooled.to(pooled)
                pooled = torch.cat(list(pools.values()))
            call.kwargs = family.with_text(call.kwargs, EncodedPrompt(torch.cat(list(parts.values())), pooled, mask))

        hooks.on_call(edit)
        if not whole:
            self._attach_layers(hooks, steps, changed)

    def _attach_layers(
        self, hooks: HookRegistry, steps: frozenset[int], changed: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Exchange the input of the chosen layers' key or value projections."""
        cross = [s.name for s in attention_sites(hooks.family) if s.kind == "cross"]
        chosen = [n for n in cross if any(fnmatchcase(n, p) for p in self.layers or ("*",))]
        if not chosen:
            raise InterpError(
                f"{self!r} matches no cross-attention layer; there are {sentence_list(cross, 2) or 'none in this model'}"
            )
        for site in chosen:
            module = hooks.family_module(site)
            if getattr(module, "fused_projections", False):
                raise InterpError(
                    f"{self!r} needs separate key and value projections; call pipe.unfuse_qkv_projections()"
                )
            for side in self.side:
                hooks.write(
                    f"{site}.to_{side}:in",
                    lambda states, at: changed(states) if at.branch == "cond" and at.step in steps else None,
                )


@dataclass(frozen=True, repr=False)
class ReplaceEOS(_ReplaceText):
    """Let the prompt's [EOS] come from another prompt: `[BOS] + A + [EOS]_B` of Yi et al. (2405.15330), §5.1.

    Their "[EOS]" is the first end-of-text token and all padding after it (Stable Diffusion 1 pads with it).

    Args:
        prompt: B; `"{target}"` takes it from a column of the prompt table.
        align: The paper does not say what happens when A and B differ in length. `"first_eos"`: B's run of EOS is
            shifted to begin after A's last word, and cut or extended (by its last state) to fill the context.
            `"position"`: states are copied at the positions that are EOS in both.

    >>> ReplaceEOS("{target}", side="v")
    ReplaceEOS(prompt='{target}', side='v')
    """

    align: Literal["first_eos", "position"] = "first_eos"

    name: ClassVar[str] = "replace_eos"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align not in ("first_eos", "position"):
            raise InterpError(
                f"{self!r}: align is 'first_eos' or 'position'{nearest(self.align, ['first_eos', 'position'])}"
            )

    def claims(self) -> frozenset[str]:
        """The states at and after the first EOS."""
        return frozenset({"text:eos"})

    def mix(self, old: torch.Tensor, new: torch.Tensor, mine: Tokens, other: Tokens) -> torch.Tensor:
        """A's states up to its last word, then B's run of EOS."""
        length = len(old)
        if self.align == "position":
            start = max(mine.eos, other.eos)
            return torch.cat([old[:start], new[start:]])
        source = (other.eos + torch.arange(length - mine.eos, device=new.device)).clamp(max=length - 1)
        return torch.cat([old[: mine.eos], new[source]])


@dataclass(frozen=True, repr=False)
class ReplacePrompt(_ReplaceText):
    """Let the denoiser read another prompt within the window, in all layers or in some (LocoGen, 2405.01008).

    >>> ReplacePrompt("{target}", start=0.5)
    ReplacePrompt(start=0.5, prompt='{target}')
    """

    name: ClassVar[str] = "replace_prompt"

    def claims(self) -> frozenset[str]:
        """All text states."""
        return frozenset({"text"})

    def mix(self, old: torch.Tensor, new: torch.Tensor, mine: Tokens, other: Tokens) -> torch.Tensor:
        """The other prompt's states, all of them."""
        return new
