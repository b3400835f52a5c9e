"""The hook registry: one place that knows site, step and branch, for reading and for writing.

`read` and `write` take a site (`unet.mid_block.attentions.0.transformer_blocks.0.attn2:probs`, or a glob) and a
function of (tensor, at). Functions are called once per branch, with that branch's rows alone: (sample, …).
Recording and every intervention are built on it; so can be whatever a user needs.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from interp.attending import Attending, KernelFunction
from interp.calls import At, DenoiserCall, Prediction
from interp.catalog import attention_sites, match_sites, split_site
from interp.clock import Clock, StepEnd, StepStart
from interp.compiling import plain, run_eagerly
from interp.denoising import Denoising, running
from interp.errors import InterpError
from interp.families import Arguments, AttentionSite, DenoiserInputs, Family, Spans, find_family
from interp.families.glance import GLANCING
from interp.kernels import AttentionCall
from interp.listening import Listeners, SiteFunction, changed_input, changed_output
from interp.overriding import override_call, watch_context
from interp.standing import StandIn, StandIns, Steps

__all__ = ["At", "DenoiserCall", "HookRegistry", "Prediction", "SiteFunction"]


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
        self._listeners = Listeners()
        self._step_starts: list[Callable[[StepStart], None]] = []
        self._step_ends: list[Callable[[StepEnd], None]] = []
        self._undo: list[Callable[[], None]] = []
        self._hooked: set[str] = set()
        self._stand_ins = StandIns()
        self._denoising = Denoising(pipe, self.family, self._stand_ins.note)
        self._attending = Attending(self._listeners, self._denoising)

    @property
    def arguments(self) -> Arguments | None:
        """Arguments of the pipeline's call in progress, defaults filled in; None between calls."""
        return self._denoising.arguments

    # What to watch

    def read(self, site: str, fn: SiteFunction, steps: Collection[int] | None = None) -> list[str]:
        """Call `fn(tensor, at)` with each tensor that passes at `site`; return the sites that matched.

        Args:
            site: A site `path:quantity`, a glob, or `re:` and a regular expression for the path.
            fn: Gets one branch's tensor, (sample, …).
            steps: The sampling steps in which it is called; None for all. Probabilities are formed in these alone.
        """
        return self._register(site, fn, steps, writes=False)

    def write(self, site: str, fn: SiteFunction, steps: Collection[int] | None = None) -> list[str]:
        """Replace the tensor at `site` by what `fn(tensor, at)` returns, unless None; return the sites that matched.

        Writers run in the order in which they were added, before all readers: a reader sees what was really used. The
        arguments are those of `read`.
        """
        return self._register(site, fn, steps, writes=True)

    def on_call(self, fn: Callable[[DenoiserCall], None]) -> None:
        """Call `fn` with every denoiser call before it runs; it may change `kwargs`, `keep`, `leave` and `scale`."""
        self._denoising.edits.append(fn)

    def on_prediction(self, fn: Callable[[Prediction], None]) -> None:
        """Call `fn` with what the denoiser evaluated, branch by branch."""
        self._denoising.listeners.append(fn)

    def before_step(self, fn: Callable[[StepStart], None]) -> None:
        """Call `fn` before each `scheduler.step`, when all that the denoiser gave in the step is known."""
        self._step_starts.append(fn)

    def on_step(self, fn: Callable[[StepEnd], None]) -> None:
        """Call `fn` after each `scheduler.step`."""
        self._step_ends.append(fn)

    def on_exit(self, fn: Callable[[], None]) -> None:
        """Call `fn` when the context ends, also after an exception: what was put beside the registry goes with it."""
        self._undo.append(fn)

    def on_attention(self, site: AttentionSite, fn: KernelFunction) -> None:
        """Call `fn` with every kernel call of an attention site, all rows: the cheap way to keep query and key."""
        self._attending.functions.setdefault(site.name, []).append(fn)
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
        for site, written in self._listeners.writers():
            self._stand_ins.refuse_writer(site, written)
        if self._undo and new:
            self._hook_stand_in(path)

    def stood_in(self, site: str) -> bool:
        """Tell whether something stood in for the module of a site, or one around it, in this step."""
        return self._stand_ins.stood_in(split_site(site)[0] if ":" in site else site)

    def _register(self, site: str, fn: SiteFunction, steps: Collection[int] | None, *, writes: bool) -> list[str]:
        if not callable(fn):
            raise InterpError(f"{fn!r} cannot be called: give a function fn(tensor, at)")
        found = match_sites(self.family, site)
        for name in found:
            if writes:
                self._stand_ins.refuse_writer(name, steps)
            self._listeners.add(name, fn, steps, writes=writes)
            if self._undo:
                self._hook_site(name)
        return found

    # Being active

    def __enter__(self) -> "HookRegistry":
        if self._undo:
            raise InterpError("this HookRegistry is active already; make a new one for a nested context")
        denoising = self._denoising
        denoising.clock = Clock(
            self.pipe.scheduler,
            self._start_step,
            self._end_step,
            lambda out: self.family.next_latents(out, denoising.known()),
        )
        self._undo.append(denoising.clock.close)
        self._undo.append(self._attending.close)
        self._undo.append(override_call(self.pipe, self._run_pipeline))
        # what the pipeline calls may be a compiled wrapper of the module
        called = [getattr(self.pipe, name, module) for name, module in self.family.denoisers.items()]
        self._undo.append(run_eagerly(called))
        self._undo += [override_call(module, denoising.run) for module in called]
        if self.family.sequential:
            self._undo.append(watch_context(self.family.denoiser, denoising.name_context))
        for path in self._stand_ins.paths:
            self._hook_stand_in(path)
        self._attending.offer(self._sites.values())
        for site in self._listeners.sites:
            self._hook_site(site)
        for site in self._attending.functions:
            self._hook_attention(site, self.family_module(site))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._hooked.clear()
        self._denoising.reset()

    def family_module(self, path: str) -> torch.nn.Module:
        """Return the module at a site's path, e.g. `unet.mid_block`."""
        root, _, rest = path.partition(".")
        return plain(getattr(self.pipe, root)).get_submodule(rest)

    # The pipeline

    def _run_pipeline(self, pipe: Any, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        with self.pipeline_call(run, args, kwargs):
            return run(*args, **kwargs)

    def pipeline_call(self, run: Callable[..., Any], args: tuple, kwargs: dict) -> AbstractContextManager[None]:
        """Know the arguments of the pipeline's call that runs inside the context."""
        return self._denoising.pipeline_call(run, args, kwargs)

    def rehearse(self, inputs: DenoiserInputs, call: DenoiserCall | None = None) -> Any:
        """Call the denoiser outside a sampling run, by default as for one sample of the branch with text; return its output."""
        return self._denoising.rehearse(inputs, call)

    def _start_step(self, start: StepStart) -> None:
        self._denoising.end_step()
        if self._step_starts:
            arguments = self._denoising.known()
            latents, output = (self.family.unpack(x, arguments) for x in (start.latents, start.model_output))
            start = replace(start, latents=latents, model_output=output)
        for fn in self._step_starts:
            fn(start)

    def _end_step(self, end: StepEnd) -> None:
        if self._step_ends:
            arguments = self._denoising.known()
            latents, following, output = (
                self.family.unpack(x, arguments) for x in (end.latents, end.next_latents, end.model_output)
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
        call, site = self._denoising.call, self._sites[at.site.removesuffix(":probs")]
        assert call is not None
        return self.family.spans(site, int(probs.shape[-2]), int(probs.shape[-1]), call.kwargs)

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
                lambda _, args, kwargs: changed_input(args, kwargs, partial(self._apply, site)), with_kwargs=True
            )
        else:
            index = self.family.output_index(path)
            handle = module.register_forward_hook(
                lambda _, args, out: changed_output(out, index, partial(self._apply, site))
            )
        self._undo.append(handle.remove)

    def _apply(self, site: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Let writers change and readers see the rows of each branch; None if nothing was changed."""
        call = self._denoising.call
        if GLANCING.get() or (call is not None and running() is None):
            return None  # not the pipeline's own call: a module that an nnsight block runs by itself, beside it
        if call is None:  # outside the denoiser: the text encoder, which runs once per branch before the first step
            members = tuple(range(tensor.shape[0]))
            call = DenoiserCall((), {}, {"": members}, -1, lambda: float("nan"), 0, len(members))
        return self._listeners.apply(site, tensor, call)

    def _hook_stand_in(self, path: str) -> None:
        def around(module: torch.nn.Module, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            call = self._denoising.call
            out = None if call is None or not call.branches else self._stand_ins.output(path, call)
            if out is None:
                return run(*args, **kwargs)
            for calls in (running() or {}).values():  # other registries must know, too
                for one in calls:
                    one.stood_in.add(path)
            return out

        self._undo.append(override_call(self.family_module(path), around))

    # Attention

    def _hook_attention(self, path: str, module: torch.nn.Module) -> None:
        if path not in self._sites:
            raise InterpError(f"{path!r} is no attention module, so it has no q, k, v or probs; it has in and out")
        self._attending.ask(path, module)
