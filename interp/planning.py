"""The plan of a run: everything that is decided before the first denoiser call, and what it will cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Real
from typing import Any, Literal, cast

from interp.budget import check_budget, size
from interp.capture import AttentionPart, Capture, default_capture
from interp.captured import ReduceCapture, SiteCapture, captured_attention, captured_reductions, captured_sites
from interp.clock import Timeline, timeline
from interp.costs import planned_bytes
from interp.errors import InterpError
from interp.families import Arguments, Family, find_family
from interp.forecast import memory_around, peak_memory
from interp.interventions import Batch, Intervention, check_all, evaluated_branches
from interp.layouts import run_attrs, run_groups
from interp.plan_arguments import (
    Conditions,
    check_options,
    default_guidance,
    named_conditions,
    ordered_samples,
    picture_size,
    read_seeds,
    samples_together,
)
from interp.prompts import PromptTable, prompt_table
from interp.stores import Layout
from interp.token_choice import choose_tokens
from interp.token_columns import TokenSelection, select_tokens
from interp.token_list import TokenList, read_prompts


@dataclass(frozen=True)
class Plan:
    """What a run will do and cost, before it runs. `print(plan)` tells it in words.

    samples are ordered condition × prompt × seed; `batches` lists the sample numbers that run together. The partition
    is fixed here, recorded, and kept on retry and resume, because a sample's rounding depends on its batch.
    """

    layout: Layout
    batches: list[list[int]]
    capture: Capture
    conditions: dict[str, list[Intervention]]
    prompts: PromptTable
    timeline: Timeline
    steps: int
    guidance_scale: float
    height: int
    width: int
    attention: list[AttentionPart]
    sites: list[SiteCapture]
    reductions: list[ReduceCapture]
    tokens: TokenList
    negatives: TokenList
    selection: TokenSelection
    forward_passes: int
    options: dict[str, Any]
    arguments: dict[str, Any]
    """Arguments of the pipeline's call that all samples share, defaults filled in."""
    texts: tuple[list[str], list[str]]
    """Prompts and negative prompts, one a sample."""
    family: Family = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.layout)

    @cached_property
    def bytes_by_array(self) -> dict[str, int]:
        """Bytes of each array's files, before compression; metadata under `""`."""
        kept = self.capture.chosen_steps(len(self.timeline))
        reductions = [one.name for one in self.reductions if "step" not in one.over]
        return planned_bytes(
            self.layout, self.sites, reductions, self.conditions, self.timeline, kept, self.capture.branches,
            self.family.guided(self.arguments),
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """Bytes of the store's files, all samples, before compression: attention alone is compressed, to 0.5–0.9."""
        return sum(self.bytes_by_array.values())

    @cached_property
    def memory(self) -> int:
        """Bytes of device memory at the peak of the largest batch: weights, the pipeline's own tensors, and the recording's.

        Found by running one step on tensors without data, which takes a second or so with a large model; see
        `interp.forecast` for what it leaves out. `memory_untraced` is the same without recording.
        """
        return peak_memory(self.family, self)

    @cached_property
    def memory_untraced(self) -> int:
        """Bytes of device memory at the peak of the same calls when nothing is recorded."""
        return peak_memory(self.family, self, recorded=False)

    @cached_property
    def memory_around(self) -> int:
        """Bytes of device memory at the peak of reading the text and of decoding the pictures, recorded or not."""
        return memory_around(self.family, self)

    def _memory_told(self) -> str:
        try:
            return f"{size(self.memory)} of device memory at the peak"
        except Exception as error:  # a kernel that takes no tensors without data
            return f"device memory unknown ({type(error).__name__} in a run without data)"

    def rows(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """Return the samples' rows of the prompt table."""
        return self.prompts.rows([self.layout.samples["prompt_id"][i] for i in samples])

    def batch(self, samples: Sequence[int]) -> Batch:
        """Return what interventions may know of some samples that run together."""
        columns = self.layout.samples
        return Batch(
            self.rows(samples), [self.tokens[i] for i in samples], self.timeline, self.guidance_scale, self.arguments,
            [columns["seed"][i] for i in samples], [columns["prompt_id"][i] for i in samples],
        )  # fmt: skip

    def __str__(self) -> str:
        total = self.bytes
        per = total / max(1, len(self))
        seeds = len(self) // (len(self.prompts) * len(self.conditions))
        most = "at most " if any(c.skips_more for changes in self.conditions.values() for c in changes) else ""
        return "\n".join(
            [
                f"{len(self)} samples = {len(self.conditions)} conditions × {len(self.prompts)} prompts × {seeds} seeds, "
                f"in {len(self.batches)} batches of up to {max(map(len, self.batches))}",
                f"{self.width}×{self.height} pixels, {self.steps} steps, guidance {self.guidance_scale:g}: "
                f"{most}{self.forward_passes:,} forward passes (one sample, one branch each)",
                f"{size(total)} before compression ({size(per)} a sample); {self._memory_told()}",
                *(f"  {name}: {' × '.join(f'{d} {n}' for d, n in zip(a.dims, a.shape, strict=True))} {a.dtype}"
                  for name, a in self.layout.arrays.items()),
            ]
        )  # fmt: skip

    __repr__ = __str__


def plan(
    pipe: Any,
    prompts: Any,
    *,
    seeds: Sequence[int] | int = 0,
    steps: int = 50,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str = "",
    capture: Capture | None = None,
    interventions: Sequence[Intervention] | None = None,
    conditions: Conditions | None = None,
    batch_size: int | Literal["auto"] = "auto",
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Say what a run would do and cost; nothing is computed. The arguments are those of `interp.trace`.

    Raises:
        InterpError: whatever `interp.trace` would refuse, in the same words.

    >>> import interp
    >>> print(str(interp.plan(interp.load("scenes"), "a red circle", seeds=[0, 1], steps=20)).splitlines()[0])
    2 samples = 1 conditions × 1 prompts × 2 seeds, in 1 batches of up to 2
    """
    from interp.loading import load

    pipe = load(pipe) if isinstance(pipe, str) else pipe
    if not isinstance(capture, Capture | None):
        raise InterpError(f"capture={capture!r}: give a Capture, e.g. interp.Capture(heads='all')")
    family, capture, table = find_family(pipe), capture or default_capture(pipe), prompt_table(prompts, negative_prompt)
    if family.needs_picture:
        raise InterpError(
            f"a {type(pipe).__name__} starts from a picture, or is controlled by one, which a run of prompts does not have; "
            "call it yourself within interp.record(pipe, …), or change it with interp.HookRegistry(pipe)"
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InterpError(f"steps={steps!r}: give the number of sampling steps, at least 1")
    if not isinstance(guidance_scale, Real | None) or (
        guidance_scale is not None and not math.isfinite(guidance_scale)
    ):
        raise InterpError(f"guidance_scale={guidance_scale!r}: give a number, or None for the model's own")
    guidance = default_guidance(pipe) if guidance_scale is None else float(guidance_scale)
    high, wide = picture_size(family, height, width)
    named = named_conditions(interventions, conditions)
    seed_list = read_seeds(seeds)
    check_options(pipe, family, options or {})
    arguments = run_call(family, steps, guidance, high, wide, table.columns["negative_prompt"], options or {})
    times = timeline(pipe.scheduler, steps, schedule=family.schedule(arguments))
    for changes in named.values():
        check_all(changes, times, table.columns, family.guided(arguments), family)
    if any(named.values()):
        family.check_changes(arguments)
    read = read_prompts(table.columns["prompt"], partial(family.tokenize, arguments=arguments))
    if any(named.values()):
        rows = list(zip(read, table.rows(range(len(table))), strict=True))
        for change in (c for changes in named.values() for c in changes):
            change.check_model(family, rows, arguments)
    samples, batches = ordered_samples(table, named, seed_list, samples_together(pipe, batch_size))
    made = assemble(
        pipe, capture=capture, table=table, samples=samples, batches=batches, conditions=named, steps=steps,
        guidance=guidance, height=high, width=wide, arguments=arguments, options=options, read=read,
    )  # fmt: skip
    for batch in batches:
        for change in named[samples["condition"][batch[0]]]:
            change.check_batch(family, made.batch(batch))
    return made


def run_call(
    family: Family, steps: int, guidance: float, height: int, width: int, negatives: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of the pipeline's call that all samples of a run share, defaults filled in."""
    asked = family.run_arguments(guidance, negatives, options, any(negatives))
    return family.arguments({**asked, "num_inference_steps": steps, "height": height, "width": width})


def assemble(
    pipe: Any, *, capture: Capture, table: PromptTable, samples: dict[str, list], batches: list[list[int]],
    conditions: dict[str, list[Intervention]], steps: int, guidance: float, height: int, width: int,
    arguments: Arguments, options: Mapping[str, Any] | None = None, columns: int = 0, read: TokenList | None = None,
) -> Plan:  # fmt: skip
    """Make the plan of samples that are known one by one; `plan` and `interp.record` end here.

    `arguments` are those of the pipeline's call. `columns` is the least number of token columns: a run that
    will be appended to may meet longer prompts. `read`: tokens of prompts that are known already.
    """
    family = find_family(pipe)
    family.check_call(arguments)
    times = timeline(pipe.scheduler, steps, schedule=family.schedule(arguments)).after(family.skipped_steps(arguments))
    tokens = TokenList(samples["prompt"], partial(family.tokenize, arguments=arguments), read)
    without = family.negative_arguments(arguments)
    others = TokenList(samples["negative_prompt"], partial(family.tokenize, arguments=without))
    named = not isinstance(capture.tokens, str) and any(isinstance(t, str) for t in capture.tokens)
    selection = (
        choose_tokens(capture.tokens, tokens, others, table.rows(samples["prompt_id"]), columns)
        if named
        else select_tokens(tokens, others, cast("str | tuple[int, ...]", capture.tokens), columns)
    )
    every = select_tokens(tokens, others, "all").table
    attention = captured_attention(family, capture, arguments)
    sites = captured_sites(family, capture, arguments)
    reductions = captured_reductions(family, capture, arguments, selection.width)
    layout = Layout(
        samples=samples,
        groups=run_groups(
            family,
            capture,
            times,
            selection.table,
            every,
            attention,
            sites,
            reductions,
            arguments,
            height,
            width,
            (samples["prompt"], samples["negative_prompt"]),
        ),
        attrs=run_attrs(
            pipe, family, capture, conditions, steps, guidance, height, width, dict(options or {}), arguments
        ),
    )
    guided = family.guided(arguments)
    passes = {name: _passes(changes, times, guided) for name, changes in conditions.items()}
    made = Plan(
        layout, batches, capture, conditions, table, times, steps, guidance, height, width, attention, sites, reductions,
        tokens, others, selection, sum(passes[name] for name in samples["condition"]), dict(options or {}), dict(arguments),
        (list(samples["prompt"]), list(samples["negative_prompt"])), family,
    )  # fmt: skip

    def again(other: Capture) -> Plan:
        return assemble(
            pipe, capture=other, table=table, samples=samples, batches=batches, conditions=conditions, steps=steps,
            guidance=guidance, height=height, width=width, arguments=arguments, options=options, columns=columns,
            read=tokens,
        )  # fmt: skip

    check_budget(made, again)
    return made


def _passes(changes: Sequence[Intervention], times: Timeline, guided: bool) -> int:
    """Forward passes of one sample, all evaluations of each step: what the branch policies leave, at most."""
    return sum(times.count(i) * len(kept) for i, kept in enumerate(evaluated_branches(changes, times, guided)))
