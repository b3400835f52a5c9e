"""Which family describes a pipeline: ours and everybody's are plugins of one entry-point group."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from interp.errors import InterpError, sentence_list
from interp.families.base import Family
from interp.warning import warn


def families() -> dict[str, type[Family]]:
    """Return every installed family by name; one that cannot be used is a warning, and left out."""
    from interp.probes.discovery import load_plugins

    return load_plugins("interp.families", Family)


_TRIED: ContextVar[tuple[type[Family], ...]] = ContextVar("families on trial", default=())


@contextmanager
def trying(*classes: type[Family]) -> Iterator[None]:
    """Let families that are not installed (yet) be found inside the context, before all others."""
    token = _TRIED.set((*classes, *_TRIED.get()))
    try:
        yield
    finally:
        _TRIED.reset(token)


def _matches(cls: type[Family], pipe: Any) -> bool:
    """Whether a family describes the pipeline; one of somebody else's that cannot tell is a warning."""
    try:
        return cls.matches(pipe)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        warn(
            f"family {cls.__name__} of {cls.__module__} failed to tell whether it describes {type(pipe).__name__} ({text})"
        )
        return False


def find_family(pipe: Any) -> Family:
    """Return the family of a pipeline.

    Raises:
        InterpError: no installed family describes it.
    """
    known = families()
    # a family that somebody added for a pipeline of their own goes before ours, which also match subclasses
    installed = sorted(known.values(), key=lambda c: (c.fallback, c.__module__.startswith("interp.")))
    for cls in (*_TRIED.get(), *installed):
        if _matches(cls, pipe):
            return cls(pipe)
    raise InterpError(
        f"no model family describes a {type(pipe).__name__}; installed families: {sentence_list(known, len(known))}; "
        "a family for it can be added through the entry-point group 'interp.families'"
    )
