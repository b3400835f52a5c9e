"""The denoiser's calls: which branches they hold, what is dropped of them, and what the pipeline gets instead."""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from interp.branches import Held, row_numbers, split_held, stack_rows, stand_ins, take_rows
from interp.calls import DenoiserCall, Prediction
from interp.clock import Clock
from interp.compiling import plain
from interp.errors import InterpError
from interp.evaluation import Evaluation
from interp.families import Arguments, DenoiserInputs, Family, Pass

# Calls in progress by denoiser, outermost registry first: what one of them drops, all of them must know.
_RUNNING: ContextVar["dict[int, tuple[DenoiserCall, ...]] | None"] = ContextVar("running calls", default=None)


def running() -> dict[int, tuple[DenoiserCall, ...]] | None:
    """Calls in progress by denoiser, of all registries; None outside of every one."""
    return _RUNNING.get()


class Denoising:
    """The calls that one registry meets, with a ControlNet's beside them.

    edits: called with every call before it runs. listeners: called with what was evaluated. stood_in: told which modules
    did not run. clock: counts the steps, while the registry is active.
    """

    def __init__(self, pipe: Any, family: Family, stood_in: Callable[[Collection[str]], None]) -> None:
        self.pipe, self.family, self.stood_in = pipe, family, stood_in
        self.edits: list[Callable[[DenoiserCall], None]] = []
        self.listeners: list[Callable[[Prediction], None]] = []
        self.clock: Clock | None = None
        self.call: DenoiserCall | None = None
        """The call in progress."""
        self.arguments: Arguments | None = None
        """Arguments of the pipeline's call in progress, defaults filled in; None between calls."""
        self._evaluation = Evaluation()
        self._passes = 0  # denoiser calls since the last scheduler.step
        self._context: str | None = None

    def reset(self) -> None:
        """Know nothing of the calls before."""
        self.call = None
        self._evaluation, self._passes, self._context = Evaluation(), 0, None

    def name_context(self, name: str | None) -> None:
        """Note the name that the pipeline gives its next calls."""
        self._context = name

    def end_step(self) -> None:
        """End the evaluation that `scheduler.step` has used."""
        self._evaluation.end()
        self._passes = 0

    def known(self) -> Arguments:
        """Arguments of the pipeline's call in progress, or its defaults."""
        return self.arguments if self.arguments is not None else self.family.arguments()

    @contextmanager
    def pipeline_call(self, run: Callable[..., Any], args: tuple, kwargs: dict) -> Iterator[None]:
        """Know the arguments of the pipeline's call that runs inside the context."""
        try:
            bound = inspect.signature(run).bind(*args, **kwargs)
        except TypeError:  # the call itself will say what is wrong with it
            yield
            return
        bound.apply_defaults()
        outer, self.arguments = self.arguments, dict(bound.arguments)
        try:
            yield
        finally:
            self.arguments = outer
            self._evaluation, self._passes = Evaluation(), 0

    def run(self, module: torch.nn.Module, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Run a call of the denoiser, or of what is beside it, with what others make of it; return the pipeline's."""
        clock = self.clock
        assert clock is not None
        if clock.scheduler is not self.pipe.scheduler:
            clock.attach(self.pipe.scheduler)
        args, kwargs = self.family.named(args, kwargs)
        running = _RUNNING.get() or {}
        around = running.get(id(module), ())
        own = Pass(self.arguments, args, kwargs, self._context, self._passes)
        if plain(module) is self.family.denoiser:
            self._passes += 1
        branches = around[-1].branches if around else self.family.branches(own)
        if not branches:  # of no branch, as skip-layer guidance: if branches were dropped, it must not bring them back
            return self._run_unnamed(run, args, kwargs)
        call = self._begin(args, kwargs, around[-1] if around else branches)
        for edit in self.edits:
            edit(call)
        held, kept = call.held, call.left()
        for one in (*around, call):
            one.held, one.scale = kept, one.scale if call.scale is None else call.scale
        is_denoiser = plain(module) is self.family.denoiser
        if not kept and not is_denoiser:
            return run(*args, **kwargs)  # a ControlNet in guess mode, whose only rows go with what is dropped
        if not kept and not self.family.sequential:
            raise InterpError("every branch was dropped from a denoiser call; keep at least one")
        if kept != held and kept:
            inputs = DenoiserInputs(call.args, call.kwargs)
            rows = sum(map(len, held.values()))
            inputs = self.family.keep_rows(inputs, rows, row_numbers(held, kept))
            call.args, call.kwargs = inputs.args, inputs.kwargs
        token = _RUNNING.set({**running, id(module): (*around, call)})
        outer, self.call = self.call, call
        try:
            out = run(*call.args, **call.kwargs) if kept else None
        finally:
            _RUNNING.reset(token)
            self.call = outer
        self.stood_in(call.stood_in)
        if is_denoiser:
            # the outermost registry alone combines: those inside show it what was predicted
            scale = None if around else call.scale
            return self._predicted(call, held, kept, out, scale, lambda: self.family.blank_output(args, kwargs))
        return out if kept == held else stack_rows(out, sum(map(len, kept.values())), stand_ins(held, kept))

    def _begin(self, args: tuple, kwargs: dict, known: DenoiserCall | tuple[str, ...]) -> DenoiserCall:
        """Describe a call; `known` is that of the registry around this one, or its branches."""
        clock, family = self.clock, self.family
        assert clock is not None
        if isinstance(known, DenoiserCall):
            held, samples = known.held, known.samples
        else:
            rows = family.rows(args, kwargs)
            if rows % len(known):
                raise InterpError(
                    f"{type(self.pipe).__name__} called its denoiser with {rows} rows, which cannot hold the branches "
                    f"{known}; guidance must be either on or off for the whole batch"
                )
            samples = rows // len(known)
            held = dict.fromkeys(known, tuple(range(samples)))

        def time() -> float:
            found = family.timestep(args, kwargs)
            return clock.timestep if found is None else found

        return DenoiserCall(args, dict(kwargs), held, clock.step, time, clock.evaluation, samples, tuple(held))

    def _run_unnamed(self, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if self._evaluation.scale is not None:
            raise InterpError(
                f"{type(self.pipe).__name__} combines a third prediction with that of the text (skip-layer guidance), which "
                "another guidance scale would change, too; leave out skip_guidance_layers, or the scale in these steps"
            )
        if self._evaluation.dropped:
            return self.family.with_rows(None, self._evaluation.first(), kwargs)
        outer, self.call = self.call, DenoiserCall(args, kwargs, {}, -1, lambda: float("nan"), 0, 0)
        try:
            return run(*args, **kwargs)
        finally:
            self.call = outer

    def _predicted(
        self,
        call: DenoiserCall,
        held: Held,
        kept: Held,
        out: Any,
        scale: float | None,
        blank: Callable[[], torch.Tensor],
    ) -> Any:
        """Tell what was evaluated, and return what the pipeline is to combine.

        An inner registry may have dropped more since: `call.held` tells what is left.
        """
        family, arguments = self.family, self.known()
        if out is not None and call.held and self.listeners:
            sample = family.prediction(out, arguments)
            index = dict(zip(call.held, _within(kept, call.held), strict=True))
            outputs = {b: take_rows(part, index[b]) for b, part in split_held(sample, kept).items() if b in index}
            for fn in self.listeners:
                fn(Prediction(outputs, call))
        evaluation = self._evaluation
        evaluation.scale = None if scale == family.applied_guidance(arguments) else scale

        def guide(uncond: torch.Tensor, cond: torch.Tensor, scale: float) -> torch.Tensor:
            return family.guide(uncond, cond, scale, arguments)

        evaluation.add(held, kept, None if out is None else family.output_rows(out))
        evaluation.settle(guide)
        if kept == held and evaluation.scale is None:
            return out
        given = evaluation.give(held, guide, blank)
        return family.with_rows(out, given, call.kwargs)

    def rehearse(self, inputs: DenoiserInputs, call: DenoiserCall | None = None) -> Any:
        """Call the denoiser outside a sampling run, by default as for one sample of the branch with text; return its output."""
        self.call = call or DenoiserCall(inputs.args, inputs.kwargs, {"cond": (0,)}, 0, lambda: 0.0, 0, 1, ("cond",))
        token = _RUNNING.set({})
        try:
            return torch.nn.Module.__call__(self.family.denoiser, *inputs.args, **inputs.kwargs)
        finally:
            _RUNNING.reset(token)
            self.call = None


def _within(given: Held, left: Held) -> list[list[int]]:
    """Return, for each branch that is left, the numbers of its samples among those given."""
    return [[given[branch].index(sample) for sample in members] for branch, members in left.items()]
