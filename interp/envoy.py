"""nnsight over a live pipeline: the one module that knows nnsight, and fences what its version does unexpectedly.

Written for nnsight 0.8; each point below has a contract test in `tests/interp/test_envoy.py`:
- A ready pipeline is no model to nnsight. `_Components` is a module whose parts are the pipeline's own: no copy.
- `DiffusionModel` traces one sampling step unless told otherwise. Ours runs what the pipeline itself would run.
- Its `seed` draws on the model's device; ours on the CPU, the same noise everywhere, as in `interp.trace`.
- Outputs are copied as dicts, which diffusers' outputs do not survive (several invokes, a cache of all modules).
- With several invokes under guidance each reads a copy: an edit in place would be lost, so it is refused.
- Wrapping puts a controller into each module's `forward`. Whoever exchanges modules or `forward` later (LoRA, CPU
  offload) disables it silently: every run first follows the modules as they are now.
- A loop over open-ended steps ends by running out, with a warning: expected of an edit, and not shown.
- A compiled model would run without controllers or recompile without end: it runs eagerly within a trace.
- Whether a block waits for a module's value can be seen: probabilities pass `hook_probs` only where one does. A visit
  that is left out is counted all the same, because `tracer.iter` counts visits; a cache of all modules leaves them out.
"""

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from diffusers.utils import BaseOutput
from nnsight.intervention.interleaver import Mediator, dangling_unwind, getcurrent
from nnsight.intervention.source import STATE, Controller
from nnsight.modeling.diffusion import DiffusionBatcher, DiffusionModel

from interp.compiling import run_eagerly
from interp.errors import InterpError
from interp.families import AttentionSite, find_family
from interp.hooks import DenoiserCall, HookRegistry
from interp.kernels import AttentionCall
from interp.observing import HookProbs, KernelObserver, Watch, place
from interp.overriding import override_call

_MODELS: WeakKeyDictionary[Any, ref] = WeakKeyDictionary()
_SESSIONS: WeakKeyDictionary[HookRegistry, "_Session"] = WeakKeyDictionary()


def nnsight(pipe: Any) -> "NNsightPipeline":
    """Return an nnsight model over a pipeline's own modules: no second copy of the weights.

    Calls and traces of the model are calls of the pipeline, so that `interp.record` records them, and hooks, edits and
    interventions meet in the same run. Edits that nnsight stores (`with model.edit() as (tracer, edited): …`) run
    within `interp.trace` as `interp.NNsightEdit(edited)`.

    Args:
        pipe: A diffusers pipeline, or what `interp.load` accepts.

    Returns:
        The model, the same one each time; `model.pipeline` is the pipeline, `model.unet` and so on its parts.

    Raises:
        InterpError: `pipe` is no pipeline, and nothing of its name can be loaded.

    >>> import interp
    >>> pipe = interp.load("scenes")
    >>> interp.nnsight(pipe).unet._module is pipe.unet
    True
    """
    from interp.loading import load

    pipe = load(pipe)
    model = _MODELS[pipe]() if pipe in _MODELS else None
    if model is None:
        model = NNsightPipeline(pipe)
        _MODELS[pipe] = ref(model)
    return model


class _Components(torch.nn.Module):
    """A module whose children are a pipeline's parts and whose call is the pipeline's call."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.pipeline = pipe
        self.follow()

    def follow(self) -> None:
        """Hold the parts that the pipeline has now."""
        parts = {n: part for n, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}
        for name in {*self._modules, *parts}:
            if self._modules.get(name) is not parts.get(name):
                self._modules.pop(name, None)
        for name, part in parts.items():
            self.add_module(name, part)
        for site in _attention_sites(self.pipeline):
            place(site.name, site.module).kept = True

    def forward(self, *args: Any, seed: int | None = None, **kwargs: Any) -> Any:
        """Call the pipeline; `seed` means one CPU generator a picture: seed, seed + 1, …"""
        if seed is not None and kwargs.get("generator") is None:
            given = args[0] if args else kwargs.get("prompt")
            count = len(given) if isinstance(given, (list, tuple)) else 1
            count *= int(kwargs.get("num_images_per_prompt") or 1)
            kwargs["generator"] = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
        output = self.pipeline(*args, **kwargs)
        if isinstance(output, BaseOutput):  # nnsight copies a dict by `.copy()`
            object.__setattr__(output, "copy", lambda: copy.copy(output))
        return output


def _attention_sites(pipe: Any) -> list[AttentionSite]:
    """The attention modules of a pipeline; none of one that no family describes."""
    try:
        return find_family(pipe).attention_sites()
    except InterpError:
        return []


@contextmanager
def _probabilities(pipe: Any) -> Iterator[None]:
    """Let probabilities pass `hook_probs` inside the context, where a block waits for them."""
    observer = KernelObserver()
    try:
        for site in _attention_sites(pipe):
            point = place(site.name, site.module)
            wants, missed = partial(_awaited, point), partial(_count_visit, point)
            observer.offer(site.name, site.module, Watch(wants=wants, missed=missed))
            point.start()
        yield
    finally:
        observer.close()


def _run_at(point: HookProbs) -> tuple[Any, tuple[str, ...]]:
    """The nnsight run that visits a module now, and the names of what it hands over there; None beside a run."""
    state = vars(point).get(STATE)
    if state is None or hasattr(getcurrent(), "mediator"):  # a block that runs a module by itself
        return None, ()
    interleaver, _, locations = state.active()
    return interleaver, locations


def _awaited(point: HookProbs, _: AttentionCall) -> bool:
    """Whether a block waits for this visit, or a cache was told to keep this module."""
    run, locations = _run_at(point)
    return run is not None and any(
        run._ready(name) or any(cache.targets is not None for _, cache, _ in run.observers.get(name, ()))
        for name in locations
    )


def _count_visit(point: HookProbs) -> None:
    run, locations = _run_at(point)
    for name in locations:
        run.counts[name] = run.counts.get(name, 0) + 1


class _Batcher(DiffusionBatcher):
    """Rows of several invokes; refuses the edit in place that would be lost."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lent: list[tuple[int, torch.Tensor, int]] = []

    def _narrow_tensor(self, tensor: torch.Tensor, group: list) -> torch.Tensor:
        part = super()._narrow_tensor(tensor, group)
        if part is not tensor and part._base is None:  # a copy: rows of both branches, which do not lie together
            self._lent.append((group[0], part, part._version))
        return part

    def _widen_tensor(self, full: torch.Tensor, group: list, edited: torch.Tensor) -> torch.Tensor:
        self._lent = [one for one in self._lent if one[0] != group[0]]
        return super()._widen_tensor(full, group, edited)

    def assemble_skip(self, running: Any) -> Any:
        """The end of a visit: nothing that was lent may have been changed and not given back."""
        lent, self._lent = self._lent, []
        if any(part._version != version for _, part, version in lent):
            raise InterpError(
                "an edit in place within one of several invokes is lost under guidance, because nnsight lends it a copy "
                "of its rows; assign instead: write model.unet.output = (changed,), not model.unet.output[0][:] = changed"
            )
        return super().assemble_skip(running)


class NNsightPipeline(DiffusionModel):
    """The nnsight model of a pipeline, made by `interp.nnsight`; see nnsight's documentation for traces and edits."""

    _batcher_class = _Batcher

    def __init__(self, pipe: Any) -> None:
        super().__init__(_Components(pipe))
        self.pipeline = pipe
        self._original = self  # an edited copy keeps the original, and so the tree, alive
        self._seen: tuple[int, ...] = ()
        self.follow()

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        """Open a trace of the whole pipeline: as many steps as the pipeline itself would take."""
        return super(DiffusionModel, self).trace(*inputs, **kwargs)

    def follow(self) -> None:
        """Route the modules as they are now: parts, layers or their `forward` may have been exchanged since."""
        self._module.follow()
        modules = list(self._module.modules())
        for module in modules:
            own = vars(module)
            if STATE in own and not isinstance(own.get("forward"), Controller) and "_hf_hook" not in own:
                del own[STATE]  # whoever put another `forward` there took the controller away
                self._original._seen = ()
        now = tuple(map(id, modules))
        if self._original._seen != now:
            self._update(self._module)
            self._original._seen = now

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `fn` together with the blocks of a trace; nnsight calls it."""
        self.follow()
        undo = run_eagerly([self._module], warn=False)
        try:
            with _probabilities(self.pipeline):
                return super().interleave(fn, *args, **kwargs)
        finally:
            undo()


# Edits as interventions


def edits(model: Any) -> list[Mediator]:
    """Return the blocks that `model.edit()` stored.

    Raises:
        InterpError: it is no model of ours, or holds none.
    """
    if not isinstance(model, NNsightPipeline):
        raise InterpError(
            f"NNsightEdit needs the edited model of interp.nnsight(pipe).edit(), and got a {type(model).__name__}"
        )
    if not model._edits:
        raise InterpError(
            "this nnsight model holds no edits; write: with interp.nnsight(pipe).edit() as (tracer, edited): …, and give "
            "NNsightEdit(edited)"
        )
    return list(model._edits)


def source(edit: Mediator) -> str:
    """Return an edit's block as it was written."""
    return "\n".join(ast.unparse(statement) for statement in getattr(edit.node, "body", []))


def run_edits(hooks: HookRegistry, model: NNsightPipeline, steps: frozenset[int], whole: bool) -> None:
    """Let stored edits live in some steps of the pipeline's calls within a registry's context.

    A block begins at its window's first step, and ends with its last: `tracer.iter[0]` is the window's first step.
    `whole`: the window is the whole call, text encoders and decoder too.
    """
    if model.pipeline is not hooks.pipe:
        raise InterpError("this nnsight edit belongs to another pipeline; make it with interp.nnsight(pipe).edit()")
    session = _SESSIONS.get(hooks)
    if session is None:
        session = _SESSIONS[hooks] = _Session(hooks, model)
    session.add(edits(model), steps, whole)


class _Session:
    """Stored edits and the run of one pipeline call: workers that begin and end with their windows."""

    def __init__(self, hooks: HookRegistry, model: NNsightPipeline) -> None:
        self._model = model._original
        self._edits: list[tuple[Mediator, frozenset[int], bool]] = []
        self._running = False
        hooks.on_call(self._at_call)
        hooks.on_exit(override_call(hooks.pipe, self._run))

    def add(self, blocks: list[Mediator], steps: frozenset[int], whole: bool) -> None:
        """Let some blocks live in these steps; they are applied in the order of addition."""
        taken = {id(m) for m, _, _ in self._edits}
        # the same edits in two windows are two workers
        self._edits += [(copy.copy(m) if id(m) in taken else m, steps, whole) for m in blocks]

    def _run(self, pipe: Any, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        interleaver = self._model.interleaver
        if interleaver.interleaving:
            raise InterpError("an NNsightEdit cannot run within an nnsight trace; call the pipeline, not the model")
        self._model.follow()
        for mediator, _, _ in self._edits:
            mediator.worker = None
        interleaver.mediators = [mediator for mediator, _, whole in self._edits if whole]
        finished = False
        try:
            with _probabilities(pipe), interleaver:
                output = run(*args, **kwargs)
                interleaver.handle("result", output)
                for mediator in list(interleaver.mediators):
                    self._end(mediator)
                finished = True
        finally:
            interleaver.cancel()
        if not finished:
            raise InterpError("an nnsight edit stopped the run (tracer.stop()); stop a trace of your own instead")
        return output

    def _at_call(self, call: DenoiserCall) -> None:
        """Start the workers whose window begins with this call, end those whose window is over."""
        interleaver = self._model.interleaver
        if not interleaver.interleaving:
            return
        living = []
        for mediator, steps, whole in self._edits:
            if whole or call.step in steps:
                if mediator.worker is None:
                    mediator.start(interleaver)
                living.append(mediator)
            elif mediator.worker is not None and call.step > max(steps, default=-1):
                self._end(mediator)
        if living != interleaver.mediators:
            interleaver.mediators = living
            interleaver.reindex()

    @staticmethod
    def _end(mediator: Mediator) -> None:
        """End a worker; one that still waits for something that never came is a mistake, unless it loops over steps."""
        if not mediator.alive:
            return
        asked = str(mediator.pending.provider).removeprefix("model.")
        error, expected = dangling_unwind(mediator)
        try:
            mediator.worker.throw(error)
        except BaseException as thrown:
            if thrown is not error:
                raise
            if expected is None:
                raise InterpError(
                    f"the nnsight edit waits for {asked!r}, which did not run any more after what it read before; a block "
                    "reads in the order in which the model runs, and within the edit's window"
                ) from error
