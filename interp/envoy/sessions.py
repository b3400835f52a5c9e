"""Edits that nnsight stores, as interventions: workers that live in some steps of the pipeline's own calls."""

import ast
import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from nnsight.intervention.interleaver import Mediator, dangling_unwind

from interp.envoy.model import NNsightPipeline
from interp.envoy.probabilities import probabilities
from interp.errors import InterpError
from interp.hooks import DenoiserCall, HookRegistry
from interp.overriding import override_call

_SESSIONS: WeakKeyDictionary[HookRegistry, "_Session"] = WeakKeyDictionary()


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
            with probabilities(pipe), interleaver:
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
