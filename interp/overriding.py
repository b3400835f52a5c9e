"""Routing an object's call through a function for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any


def override_call(owner: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """Route `owner(...)` through `around(owner, run, args, kwargs)`, `run` being its own call; return the undo.

    A temporary subclass survives CPU offload, nnsight, diffusers' own hooks and compile; replacing `forward` does not.
    """
    original = owner.__class__

    @wraps(original.__call__)  # others look at its signature
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return around(self, partial(original.__call__, self), args, kwargs)

    owner.__class__ = type(original.__name__, (original,), {"__call__": __call__, "__module__": original.__module__})
    owner.__class__._overrides = original

    def undo() -> None:
        owner.__class__ = original

    return undo


def own_class(owner: Any) -> Any:
    """Return an object's class without what `override_call` put over it."""
    cls = owner.__class__
    while "_overrides" in vars(cls):
        cls = cls._overrides
    return cls


def watch_context(module: Any, tell: Callable[[str | None], None]) -> Callable[[], None]:
    """Tell the name of each `cache_context` that the pipeline opens around a denoiser call; return the undo."""
    own = getattr(module, "cache_context", None)
    if own is None:
        return lambda: None

    @contextmanager
    def named(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        tell(name)
        try:
            with own(name, *args, **kwargs):
                yield
        finally:
            tell(None)

    before = module.__dict__.get("cache_context")
    module.cache_context = named

    def undo() -> None:
        if before is None:
            del module.cache_context
        else:
            module.cache_context = before

    return undo
