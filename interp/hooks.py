"""The hook registry: one place that knows site, step and branch, for reading and for writing.

`read` and `write` take a site (`unet.mid_block.attentions.0.transformer_blocks.0.attn2:probs`, or a glob) and a
function of (tensor, at). Functions are called once per branch, with that branch's rows alone: (sample, …).
Recording and every intervention are built on it; so can be whatever a user needs.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from interp.branches import Held, row_numbers, split_held, stack_rows, stand_ins, take_rows
from interp.calls import At, DenoiserCall, Prediction
from interp.catalog import attention_sites, match_sites, split_site
from interp.clock import Clock, StepEnd, StepStart
from interp.compiling import plain, run_eagerly
from interp.errors import InterpError
from interp.evaluation import Evaluation
from interp.families import Arguments, AttentionSite, DenoiserInputs, Family, Pass, Spans, find_family
from interp.families.glance import GLANCING
from interp.kernels import AttentionCall
from interp.observing import KernelObserver, Watch
from interp.overriding import override_call, watch_context
from interp.standing import StandIn, StandIns, Steps

__all__ = ["At", "DenoiserCall", "HookRegistry", "Prediction"]

# Calls in progress by denoiser, outermost registry first: what one of them drops, all of them must know.
_RUNNING: ContextVar["dict[int, tuple[DenoiserCall, ...]] | None"] = ContextVar("running calls", default=None)


SiteFunction = Callable[[torch.Tensor, At], torch.Tensor | None]


@dataclass(frozen=True)
class _Listener:
    """A reader or writer, and the steps in which it is called."""

    fn: SiteFunction
    steps: Collection[int] | None

    def at(self, step: int) -> bool:
        return self.steps is None or step in self.steps


class HookRegistry:
    """Read and write tensors of a running pipeline; a context manager that undoes everything, also after an exception.

    >>> import interp, torch
    >>> pipe = interp.load("scenes")
    >>> norms = []
    >>> with interp.HookRegistry(pipe) as hooks:
    ...     _ = hooks.read("unet.mid_block:out", lambda x, at: norms.append((at.step, at.branch, x.norm().item())))
    ...     _ = pipe("a red circle", num_inference_steps=2, guidance_scale=5.0)
    >>> [(step, branch) for step, branch, _ in norms]
    [(0, 'uncond'), (0, 'cond'), (1, 'uncond'), (1, 'cond')]

    Raises:
        InterpError: no family describes the pipeline, or a site matches nothing (the nearest are named).
    """

    def __init__(self, pipe: Any, family: Family | None = None) -> None:
        self.pipe = pipe
        self.family = family or find_family(pipe)
        self._readers: dict[str, list[_Listener]] = {}
        self._writers: dict[str, list[_Listener]] = {}
        self._attention: dict[str, list[Callable[[AttentionCall, DenoiserCall], None]]] = {}
        self._call_edits: list[Callable[[DenoiserCall], None]] = []
        self._predictions: list[Callable[[Prediction], None]] = []
        self._step_starts: list[Callable[[StepStart], None]] = []
        self._step_ends: list[Callable[[StepEnd], None]] = []
        self._undo: list[Callable[[], None]] = []
        self._hooked: set[str] = set()
        self._observer = KernelObserver()
        self._clock: Clock | None = None
        self._call: DenoiserCall | None = None
        self._evaluation = Evaluation()
        self._stand_ins = StandIns()
        self._passes = 0  # denoiser calls since the last scheduler.step
        self._context: str | None = None
        self.arguments: Arguments | None = None
        """Arguments of the pipeline's call in progress, defaults filled in; None between calls."""

    # What to watch

    def read(self, site: str, fn: SiteFunction, steps: Collection[int] | None = None) -> list[str]:
        """Call `fn(tensor, at)` with each tensor that passes at `site`; return the sites that matched.

        Args:
            site: A site `path:quantity`, a glob, or `re:` and a regular expression for the path.
            fn: Gets one branch's tensor, (sample, …).
            steps: The sampling steps in which it is called; None for all. Probabilities are formed in these alone.
        """
        return self._register(site, fn, self._readers, steps)

    def write(self, site: str, fn: SiteFunction, steps: Collection[int] | None = None) -> list[str]:
        """Replace the tensor at `site` by what `fn(tensor, at)` returns, unless None; return the sites that matched.

        Writers run in the order in which they were added, before all readers: a reader sees what was really used. The
        arguments are those of `read`.
        """
        return self._register(site, fn, self._writers, steps)

    def on_call(self, fn: Callable[[DenoiserCall], None]) -> None:
        """Call `fn` with every denoiser call before it runs; it may change `kwargs`, `keep`, `leave` and `scale`."""
        self._call_edits.append(fn)

    def on_prediction(self, fn: Callable[[Prediction], None]) -> None:
        """Call `fn` with what the denoiser evaluated, branch by branch."""
        self._predictions.append(fn)

    def before_step(self, fn: Callable[[StepStart], None]) -> None:
        """Call `fn` before each `scheduler.step`, when all that the denoiser gave in the step is known."""
        self._step_starts.append(fn)

    def on_step(self, fn: Callable[[StepEnd], None]) -> None:
        """Call `fn` after each `scheduler.step`."""
        self._step_ends.append(fn)

    def on_exit(self, fn: Callable[[], None]) -> None:
        """Call `fn` when the context ends, also after an exception: what was put beside the registry goes with it."""
        self._undo.append(fn)

    def on_attention(self, site: AttentionSite, fn: Callable[[AttentionCall, DenoiserCall], None]) -> None:
        """Call `fn` with every kernel call of an attention site, all rows: the cheap way to keep query and key."""
        self._attention.setdefault(site.name, []).append(fn)
        if self._undo:
            self._hook_attention(site.name, site.module)

    def stand_in(self, path: str, fn: StandIn, steps: Steps = None) -> None:
        """Where `fn(call)` gives a tensor, the module at `path` does not run: the tensor is its output, all rows.

        Args:
            path: A module, e.g. `unet.mid_block.attentions.0.transformer_blocks.0.attn2`.
            fn: Gets the denoiser call; None lets the module run.
            steps: The sampling steps in which it is asked; None for all. Several functions share a module in turn.

        Raises:
            InterpError: something is to be written in the module, in the same steps.
        """
        new = path not in self._stand_ins.paths
        self._stand_ins.add(path, fn, steps)
        for site, listeners in self._writers.items():
            for one in listeners:
                self._stand_ins.refuse_writer(site, one.steps)
        if self._undo and new:
            self._hook_stand_in(path)

    def stood_in(self, site: str) -> bool:
        """Tell whether something stood in for the module of a site, or one around it, in this step."""
        return self._stand_ins.stood_in(split_site(site)[0] if ":" in site else site)

    def _register(
        self, site: str, fn: SiteFunction, where: dict[str, list["_Listener"]], steps: Collection[int] | None
    ) -> list[str]:
        if not callable(fn):
            raise InterpError(f"{fn!r} cannot be called: give a function fn(tensor, at)")
        found = match_sites(self.family, site)
        for name in found:
            if where is self._writers:
                self._stand_ins.refuse_writer(name, steps)
            where.setdefault(name, []).append(_Listener(fn, steps))
            if self._undo:
                self._hook_site(name)
        return found

    # Being active

    def __enter__(self) -> "HookRegistry":
        if self._undo:
            raise InterpError("this HookRegistry is active already; make a new one for a nested context")
        self._clock = Clock(
            self.pipe.scheduler,
            self._start_step,
            self._end_step,
            lambda out: self.family.next_latents(out, self._known()),
        )
        self._undo.append(self._clock.close)
        self._undo.append(self._observer.close)
        self._undo.append(override_call(self.pipe, self._run_pipeline))
        # what the pipeline calls may be a compiled wrapper of the module
        called = [getattr(self.pipe, name, module) for name, module in self.family.denoisers.items()]
        self._undo.append(run_eagerly(called))
        self._undo += [override_call(module, self._denoise) for module in called]
        if self.family.sequential:
            self._undo.append(watch_context(self.family.denoiser, self._name_context))
        for path in self._stand_ins.paths:
            self._hook_stand_in(path)
        for one in self._sites.values():
            self._observer.offer(one.name, one.module, self._watch(one.name))
        for site in {**self._readers, **self._writers}:
            self._hook_site(site)
        for site in self._attention:
            self._hook_attention(site, self.family_module(site))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._hooked.clear()
        self._call = None
        self._evaluation, self._passes, self._context = Evaluation(), 0, None

    def family_module(self, path: str) -> torch.nn.Module:
        """Return the module at a site's path, e.g. `unet.mid_block`."""
        root, _, rest = path.partition(".")
        return plain(getattr(self.pipe, root)).get_submodule(rest)

    # The pipeline

    def _run_pipeline(self, pipe: Any, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        with self.pipeline_call(run, args, kwargs):
            return run(*args, **kwargs)

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

    def _known(self) -> Arguments:
        return self.arguments if self.arguments is not None else self.family.arguments()

    def _name_context(self, name: str | None) -> None:
        self._context = name

    # The denoiser

    def _denoise(self, module: torch.nn.Module, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        clock = self._clock
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
        for edit in self._call_edits:
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
        outer, self._call = self._call, call
        try:
            out = run(*call.args, **call.kwargs) if kept else None
        finally:
            _RUNNING.reset(token)
            self._call = outer
        self._stand_ins.note(call.stood_in)
        if is_denoiser:
            # the outermost registry alone combines: those inside show it what was predicted
            scale = None if around else call.scale
            return self._predicted(call, held, kept, out, scale, lambda: self.family.blank_output(args, kwargs))
        return out if kept == held else stack_rows(out, sum(map(len, kept.values())), stand_ins(held, kept))

    def _begin(self, args: tuple, kwargs: dict, known: DenoiserCall | tuple[str, ...]) -> DenoiserCall:
        """Describe a call; `known` is that of the registry around this one, or its branches."""
        clock, family = self._clock, self.family
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
        outer, self._call = self._call, DenoiserCall(args, kwargs, {}, -1, lambda: float("nan"), 0, 0)
        try:
            return run(*args, **kwargs)
        finally:
            self._call = outer

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
        family, arguments = self.family, self._known()
        if out is not None and call.held and self._predictions:
            sample = family.prediction(out, arguments)
            index = dict(zip(call.held, _within(kept, call.held), strict=True))
            outputs = {b: take_rows(part, index[b]) for b, part in split_held(sample, kept).items() if b in index}
            for fn in self._predictions:
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
        self._call = call or DenoiserCall(inputs.args, inputs.kwargs, {"cond": (0,)}, 0, lambda: 0.0, 0, 1, ("cond",))
        token = _RUNNING.set({})
        try:
            return torch.nn.Module.__call__(self.family.denoiser, *inputs.args, **inputs.kwargs)
        finally:
            _RUNNING.reset(token)
            self._call = None

    def _start_step(self, start: StepStart) -> None:
        self._evaluation.end()
        self._passes = 0
        if self._step_starts:
            latents, output = (self.family.unpack(x, self._known()) for x in (start.latents, start.model_output))
            start = replace(start, latents=latents, model_output=output)
        for fn in self._step_starts:
            fn(start)

    def _end_step(self, end: StepEnd) -> None:
        if self._step_ends:
            latents, following, output = (
                self.family.unpack(x, self._known()) for x in (end.latents, end.next_latents, end.model_output)
            )
            end = replace(end, latents=latents, next_latents=following, model_output=output)
        for fn in self._step_ends:
            fn(end)
        self._stand_ins.end_step()

    def spans(self, kernel: AttentionCall, call: DenoiserCall) -> Spans:
        """Return where image and text lie in a kernel call."""
        return self.family.spans(self._sites[kernel.site], *kernel.size, call.kwargs)

    def spans_at(self, at: At, probs: torch.Tensor) -> Spans:
        """Return where image and text lie in probabilities (…, query, key) that a reader or writer was just given."""
        assert self._call is not None
        site = self._sites[at.site.removesuffix(":probs")]
        return self.family.spans(site, int(probs.shape[-2]), int(probs.shape[-1]), self._call.kwargs)

    @cached_property
    def _sites(self) -> dict[str, AttentionSite]:
        return {s.name: s for s in attention_sites(self.family)}

    # Sites

    def _hook_site(self, site: str) -> None:
        path, quantity = split_site(site)
        module = self.family_module(path)
        if quantity in ("q", "k", "v", "probs"):
            self._hook_attention(path, module)
            return
        if site in self._hooked:
            return
        self._hooked.add(site)
        if quantity == "in":
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs, site=site: self._pass_input(site, args, kwargs), with_kwargs=True
            )
        else:
            handle = module.register_forward_hook(lambda _, args, out, site=site: self._pass_output(site, out))
        self._undo.append(handle.remove)

    def _pass_input(self, site: str, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args and isinstance(args[0], torch.Tensor):
            changed = self._apply(site, args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        first = next((k for k, v in kwargs.items() if isinstance(v, torch.Tensor)), None)
        changed = None if first is None else self._apply(site, kwargs[first])
        return None if changed is None else (args, {**kwargs, first: changed})

    def _pass_output(self, site: str, out: Any) -> Any:
        if isinstance(out, torch.Tensor):
            return self._apply(site, out)
        if isinstance(out, tuple):
            i = self.family.output_index(split_site(site)[0])
            changed = self._apply(site, out[i])
            return None if changed is None else (*out[:i], changed, *out[i + 1 :])
        key = next(iter(out))  # diffusers' and transformers' outputs are ordered mappings, main tensor first
        changed = self._apply(site, out[key])
        if changed is not None:
            out[key] = changed
        return None

    def _apply(self, site: str, tensor: torch.Tensor, kernel_call: int = 0) -> torch.Tensor | None:
        """Let writers change and readers see the rows of each branch; None if nothing was changed."""
        call = self._call
        if GLANCING.get() or (call is not None and _RUNNING.get() is None):
            return None  # not the pipeline's own call: a module that an nnsight block runs by itself, beside it
        if call is None:  # outside the denoiser: the text encoder, which runs once per branch before the first step
            members = tuple(range(tensor.shape[0]))
            call = DenoiserCall((), {}, {"": members}, -1, lambda: float("nan"), 0, len(members))
        changed = self._write(site, tensor, call, kernel_call)
        self._show(site, tensor if changed is None else changed, call, kernel_call)
        return changed

    def _write(self, site: str, tensor: torch.Tensor, call: DenoiserCall, kernel_call: int) -> torch.Tensor | None:
        """Let writers change the rows of each branch; None if none did."""
        parts, changed = self._split(site, tensor, call), False
        for listener in self._writers.get(site, ()):
            for branch, part in parts.items() if listener.at(call.step) else ():
                new = listener.fn(part, call.at(site, branch, kernel_call))
                if new is not None:
                    if new.shape != part.shape:
                        raise InterpError(
                            f"the edit at {site!r} returned shape {tuple(new.shape)}, but {tuple(part.shape)} passes there"
                        )
                    parts[branch], changed = new.to(part), True
        return torch.cat(list(parts.values())) if changed else None

    def _show(self, site: str, tensor: torch.Tensor, call: DenoiserCall, kernel_call: int) -> None:
        for listener in self._readers.get(site, ()):
            for branch, part in self._split(site, tensor, call).items() if listener.at(call.step) else ():
                listener.fn(part, call.at(site, branch, kernel_call))

    @staticmethod
    def _split(site: str, tensor: torch.Tensor, call: DenoiserCall) -> dict[str, torch.Tensor]:
        if tensor.shape[:1] != (call.rows,):
            raise InterpError(
                f"a tensor of shape {tuple(tensor.shape)} passes at {site!r}, whose first dimension does not hold "
                f"{call}; read it with a plain torch hook"
            )
        return call.split(tensor)

    def _hook_stand_in(self, path: str) -> None:
        def around(module: torch.nn.Module, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            call = self._call
            out = None if call is None or not call.branches else self._stand_ins.output(path, call)
            if out is None:
                return run(*args, **kwargs)
            for calls in (_RUNNING.get() or {}).values():  # other registries must know, too
                for one in calls:
                    one.stood_in.add(path)
            return out

        self._undo.append(override_call(self.family_module(path), around))

    # Attention

    def _hook_attention(self, path: str, module: torch.nn.Module) -> None:
        if path in self._hooked:
            return
        if path not in self._sites:
            raise InterpError(f"{path!r} is no attention module, so it has no q, k, v or probs; it has in and out")
        self._hooked.add(path)
        self._observer.start(module)

    def _watch(self, path: str) -> Watch:
        return Watch(
            asked=lambda: path in self._hooked, wants=self._wants_probs, change=self._change_probs, see=self._see_kernel
        )

    def _calling(self, kernel: AttentionCall) -> DenoiserCall | None:
        """The denoiser call that a kernel call belongs to; None if it is not the pipeline's own, or of no interest."""
        call = self._call
        if call is None or not call.branches or _RUNNING.get() is None or kernel.site not in self._hooked:
            return None
        if GLANCING.get():
            return None
        if kernel.rows != call.rows:
            raise InterpError(
                f"attention at {kernel.site!r} ran for {kernel.rows} rows instead of {call}; a cache that leaves out a "
                "branch (FasterCache) must be turned off while attention is recorded"
            )
        return call

    def _wants_probs(self, kernel: AttentionCall) -> bool:
        call, site = self._calling(kernel), f"{kernel.site}:probs"
        known = (*self._writers.get(site, ()), *self._readers.get(site, ()))
        return call is not None and any(listener.at(call.step) for listener in known)

    def _change_probs(self, kernel: AttentionCall, probs: torch.Tensor) -> torch.Tensor | None:
        call = self._calling(kernel)
        return None if call is None else self._write(f"{kernel.site}:probs", probs, call, kernel.call)

    def _see_kernel(self, kernel: AttentionCall, probs: torch.Tensor | None) -> None:
        call = self._calling(kernel)
        if call is None:
            return
        for fn in self._attention.get(kernel.site, ()):
            fn(kernel, call)
        for quantity, tensor in (("q", kernel.query), ("k", kernel.key), ("v", kernel.value)):
            site = f"{kernel.site}:{quantity}"
            if site in self._writers:
                raise InterpError(f"{site!r} can be read but not written; write ':probs', ':in' or ':out' instead")
            if site in self._readers and tensor is not None:
                self._show(site, tensor, call, kernel.call)
        if probs is not None:
            self._show(f"{kernel.site}:probs", probs, call, kernel.call)


def _within(given: Held, left: Held) -> list[list[int]]:
    """Return, for each branch that is left, the numbers of its samples among those given."""
    return [[given[branch].index(sample) for sample in members] for branch, members in left.items()]
