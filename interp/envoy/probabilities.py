"""Attention probabilities pass `hook_probs` where a block of nnsight waits for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from nnsight.intervention.interleaver import getcurrent
from nnsight.intervention.source import STATE

from interp.errors import InterpError
from interp.families import AttentionSite, find_family
from interp.kernels import AttentionCall
from interp.observing import HookProbs, KernelObserver, Watch, place


def attention_sites(pipe: Any) -> list[AttentionSite]:
    """The attention modules of a pipeline; none of one that no family describes."""
    try:
        return find_family(pipe).attention_sites()
    except InterpError:
        return []


@contextmanager
def probabilities(pipe: Any) -> Iterator[None]:
    """Let probabilities pass `hook_probs` inside the context, where a block waits for them."""
    observer = KernelObserver()
    try:
        for site in attention_sites(pipe):
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
