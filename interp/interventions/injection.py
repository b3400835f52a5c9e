"""Attention of another sample in place of one's own: Prompt-to-Prompt (Hertz et al., arXiv:2208.01626)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from interp.catalog import dry_run
from interp.errors import InterpError, nearest, sentence_list
from interp.families import AttentionSite, Family
from interp.hooks import At, HookRegistry
from interp.interventions.aligning import Alignment, align
from interp.interventions.attention import AttentionChange, normalised
from interp.interventions.base import Batch, Intervention, is_number
from interp.interventions.places import BRANCHES, present
from interp.interventions.sources import BATCH, Choice, Sourced, kept_source, opened
from interp.interventions.text import positions
from interp.stores import Run
from interp.token_choice import chosen_tokens

NODES = {"cross": "attention", "self": "self_attention"}


@dataclass(frozen=True, repr=False)
class InjectAttention(Sourced, AttentionChange):
    """Let the image attend as another sample's does: Prompt-to-Prompt (Hertz et al., arXiv:2208.01626).

    Args:
        source: `"batch"`: a live sample of the same batch, or a stored run or its path, whose capture holds the attention
            (`Capture(attention="cross", heads="all", tokens="all")`, for `part="self"` `attention="self"`).
        row: Row of the prompt table whose sample is taken; `"{column}"` names a column that holds it. Default is the
            sample's own row. The seed is always the sample's own. A sample that would take its own is left alone.
        part: `"cross"` (image → text) or `"self"` (image → image); joint attention has both.
        mode: How the tokens of the two prompts are paired in `cross`. `"replace"`: word by word, for prompts of equal
            numbers of words. `"refine"`: the words common to both, in order; the others keep the sample's own
            probabilities. `"auto"` (default): the first where it is possible.
        words, scale: Re-weight: the probabilities of these words of the sample's own prompt are multiplied by `scale`
            after the injection.
        renormalise: True: each query's probabilities are divided by their sum afterwards. Default False, as published.
        condition, sample: Of a stored run, see `Patch`.
        layers: Globs over attention layers, or `"re:…"`; default all that have the part.
        heads, branch: Which heads, and which branch (default `"cond"`).
        start, stop, unit: The window of steps.

    A source of the same batch must run in the same batch: `batch_size` at least the number of prompts, or the rows next to
    each other. Runs keep the first evaluation of a step, so with a stored source further ones (Heun) are left as they are.

    >>> InjectAttention("batch", row=0, stop=0.8)
    InjectAttention(stop=0.8, source='batch', row=0)
    """

    source: str | Run
    row: int | str | None = None
    part: Literal["cross", "self"] = "cross"
    mode: Literal["auto", "replace", "refine"] = "auto"
    words: tuple[str, ...] = ()
    scale: float = 1.0
    renormalise: bool = False
    condition: str | None = None
    sample: int | None = None
    layers: tuple[str, ...] | None = None

    name: ClassVar[str] = "inject_attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "source", kept_source(self.source, type(self).__name__))
        self.as_tuples("words")
        for field, known in (("part", ("cross", "self")), ("mode", ("auto", "replace", "refine"))):
            value = getattr(self, field)
            if value not in known:
                raise InterpError(f"{self!r}: {field} is {sentence_list(known)}{nearest(str(value), known)}")
        if not is_number(self.scale, least=0):
            raise InterpError(f"{self!r}: scale is a number from 0")
        if self.part == "self" and (self.words or self.scale != 1 or self.mode != "auto"):
            raise InterpError(f"{self!r}: words, scale and mode are about text, and part='self' has none")
        if self.scale != 1 and not self.words:
            raise InterpError(f"{self!r}: say which words are re-weighted, words=('red',)")
        if self.sample is not None and (self.row is not None or self.condition is not None):
            raise InterpError(f"{self!r}: a sample number says all; leave out row and condition")

    @property
    def changed_part(self) -> str:
        """The part that is taken."""
        return self.part

    def whats(self) -> frozenset[str]:
        """The part's probabilities."""
        return frozenset({f"{self.part}_attention:inject"})

    # Before the run

    def check_batch(self, family: Family, batch: Batch) -> None:
        """Every sample must have its source, prompts that can be paired, and the words."""
        steps = sorted(self.steps(batch.timeline))
        if not steps:
            return
        taken = self._taken(batch)
        if self.part == "cross":
            self._alignments(family, batch, taken)
            for i, (tokens, row) in enumerate(zip(batch.tokens, batch.rows, strict=True)):
                if self.source != BATCH or taken[i] != i:
                    chosen_tokens(self, tokens, row, words=self.words)
        if self.source != BATCH:
            for site in self.sites(family):
                self._stored(family, batch, site, steps)

    def _taken(self, batch: Batch) -> list[int]:
        """Positions, in the batch or in the stored run, of the samples that are taken."""
        choice = Choice(self.condition, self.row, self.sample)
        try:
            return choice.within(batch) if self.source == BATCH else choice.positions(opened(self.source), batch)
        except InterpError as error:
            raise InterpError(f"{self._named()}: {error}") from error

    def _alignments(self, family: Family, batch: Batch, taken: Sequence[int]) -> list[Alignment]:
        if self.source == BATCH:
            sources = [batch.tokens[i] for i in taken]
        else:
            prompts = opened(self.source).samples["prompt"].iloc[list(taken)]
            sources = [family.tokenize(str(p), batch.arguments) for p in prompts]
        found = []
        for source, target in zip(sources, batch.tokens, strict=True):
            length = max(len(source.ids), len(target.ids))
            try:
                found.append(align(source, target, self.mode, positions(family, batch.arguments, length).values()))
            except InterpError as error:
                raise InterpError(f"{self._named()}: {error}") from error
        return found

    def _stored(self, family: Family, batch: Batch, site: AttentionSite, steps: Sequence[int]) -> Any:
        """What the run holds of a layer: (sample, step, branch, head, …).

        Raises:
            InterpError: it lacks the layer, a step, a branch, a head or tokens.
        """
        run, needed = opened(self.source), f"attention={self.part!r}, heads='all'"
        needed += ", tokens='all'" if self.part == "cross" else ""
        advice = f"trace the source with Capture({needed}, dtype='float32') at the same size, steps and scheduler"
        height, width = dry_run(family, batch.arguments)[1][site.name]
        group = run.tree.children.get(NODES[self.part])
        node: Any = None if group is None else group.children.get(f"{height}x{width}")
        if node is None or site.name not in node["probs"]["layer"].values:
            raise InterpError(f"{self._named()} did not capture {site.name!r} at {height}×{width}; {advice}")
        probs: Any = node["probs"].sel(layer=site.name)
        have = [str(h) for h in probs["head"].values]
        lacking = [h for h in (range(site.heads) if self.heads is None else self.heads) if str(h) not in have]
        if lacking:
            raise InterpError(f"{self._named()} has the heads {sentence_list(have)} alone; {advice}")
        wanted = [b for b in BRANCHES[self.branch] if b not in probs["branch"].values]
        if wanted:
            raise InterpError(f"{self._named()} did not capture the branch {wanted[0]!r}; {advice}")
        held = probs["step"].values.tolist()
        missing = [s for s in steps if s not in held]
        if missing:
            raise InterpError(f"{self._named()} did not capture step {missing[0]}; it has the steps {held}; {advice}")
        there = np.asarray(probs["timestep"].sel(step=list(steps)).values, float)
        here = np.asarray(batch.timeline.timestep)[list(steps)]
        if (np.abs(there - here) > 1e-3 * np.maximum(1, np.abs(here))).any():
            raise InterpError(f"{self._named()} was sampled at other timesteps; {advice}")
        tokens = dict(run.attrs.get("capture") or {}).get("tokens")
        if self.part == "cross" and tokens != "all":
            raise InterpError(f"{self._named()} holds the tokens {tokens!r} alone; {advice}")
        if self.part == "self" and probs.shape[-4:] != (height, width, height, width):
            raise InterpError(f"{self._named()} captured a region of {site.name!r}; {advice}")
        return probs

    # In a run

    def change(self, hooks: HookRegistry, batch: Batch, site: AttentionSite) -> Any:
        """Put the source's block of probabilities in place of the sample's."""
        taken = self._taken(batch)
        alignments = self._alignments(hooks.family, batch, taken) if self.part == "cross" else []
        steps = sorted(self.steps(batch.timeline))
        stored = None if self.source == BATCH else self._stored(hooks.family, batch, site, steps)
        heads = range(site.heads) if self.heads is None else self.heads
        scaled = cache(lambda i: chosen_tokens(self, batch.tokens[i], batch.rows[i], words=self.words))

        def change(probs: torch.Tensor, at: At) -> torch.Tensor | None:
            if at.call or (stored is not None and at.evaluation):
                return None
            queries, keys = hooks.spans_at(at, probs).part(self.part)
            changed, here = probs.clone(), present(at)
            for k, i in enumerate(here):
                if stored is None and taken[i] == i:
                    continue
                if stored is None:
                    block = probs[self._alive(taken[i], here, at), :, queries, keys]
                else:
                    block = _read(stored, taken[i], at, heads, self.part).to(probs)
                own = probs[k, :, queries, keys]
                if self.part == "cross":
                    block = alignments[i].carry(block, own)
                    columns = [p for p in scaled(i) if p < block.shape[-1]] if self.scale != 1 else []
                    block[..., columns] *= self.scale
                changed[k, :, queries, keys] = block
                if self.renormalise:
                    changed[k, :, queries] = normalised(changed[k, :, queries])
            return changed

        return change

    def _alive(self, sample: int, here: list[int], at: At) -> int:
        if sample not in here:
            raise InterpError(
                f"{self!r}: sample {sample} of the batch is not evaluated in the branch {at.branch!r} of step {at.step}, so "
                "its attention cannot be taken alive"
            )
        return here.index(sample)


def _read(stored: Any, sample: int, at: At, heads: Sequence[int], part: str) -> torch.Tensor:
    """One sample's stored probabilities at a step and branch: (head, query, key)."""
    probs = stored.isel(sample=sample).sel(step=at.step, branch=at.branch, head=[str(h) for h in heads])
    data = torch.from_numpy(np.asarray(probs.values).astype("float32"))
    if data.isnan().all():
        raise InterpError(f"the source did not evaluate the branch {at.branch!r} at {at.site!r} in step {at.step}")
    if part == "cross":  # (head, token, y, x); a shorter prompt's unused columns are NaN
        return data.flatten(2).transpose(1, 2).nan_to_num(0)
    return data.flatten(3).flatten(1, 2)


def prompt_to_prompt(
    source: str | Run = "batch",
    row: int | str | None = 0,
    *,
    cross_replace: float = 0.8,
    self_replace: float = 0.4,
    mode: Literal["auto", "replace", "refine"] = "auto",
    words: str | tuple[str, ...] = (),
    scale: float = 1.0,
    **more: Any,
) -> list[Intervention]:
    """Return the interventions of a Prompt-to-Prompt edit: keep the source's layout, change the words.

    Args:
        source, row: Whose attention is taken; default is the first row of the prompt table, alive in the same batch.
        cross_replace: Share of the steps, from the first, in which cross-attention is injected.
        self_replace: Share of the steps in which self-attention is; 0 for none.
        mode, words, scale: How words are paired, and which are re-weighted, see `InjectAttention`.
        more: Further fields of both, e.g. `condition`, `branch`, `heads`.

    >>> prompt_to_prompt()
    [InjectAttention(stop=0.8, source='batch', row=0), InjectAttention(stop=0.4, source='batch', row=0, part='self')]
    """
    cross = InjectAttention(
        source, row, mode=mode, words=(words,) if isinstance(words, str) else words, scale=scale, stop=cross_replace, **more
    )  # fmt: skip
    return [cross, InjectAttention(source, row, part="self", stop=self_replace, **more)] if self_replace else [cross]
