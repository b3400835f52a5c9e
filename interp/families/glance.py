"""A glance at a pipeline's call: what it does until its denoiser is called first, and nothing after that."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch

from interp.compiling import plain
from interp.errors import InterpError
from interp.overriding import own_class

GLANCING: ContextVar[bool] = ContextVar("a glance is on: nothing that passes is part of a run", default=False)
_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[str, "Glance"]] = WeakKeyDictionary()
_REPLACED = {"generator", "latents", "prompt", "negative_prompt", "num_images_per_prompt", "output_type", "return_dict"}


@dataclass(frozen=True)
class Glance:
    """What was seen: arguments of the first denoiser call, and of `scheduler.set_timesteps` beside steps and device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    schedule: dict[str, Any]


class _Seen(BaseException):
    """Ends the pipeline's call; no handler of an ordinary exception is to catch it."""


def glance(pipe: Any, denoiser: torch.nn.Module, arguments: Mapping[str, Any]) -> Glance:
    """Call the pipeline with these arguments and one prompt, up to its first denoiser call; known ones are not repeated.

    Text is encoded, noise is drawn from a generator of its own, and no hook of others takes part.

    Raises:
        InterpError: the call failed, or ended without calling the denoiser.
    """
    given = _call(pipe, arguments)
    key = repr((sorted((n, repr(v)) for n, v in given.items()), sorted(map(str, pipe.scheduler.config.items()))))
    known = _KNOWN.setdefault(denoiser, {})
    if key not in known:
        if len(known) > 8:
            known.clear()
        known[key] = _glance(pipe, denoiser, given)
    return known[key]


def _call(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as a call for one picture."""
    parameters = inspect.signature(own_class(pipe).__call__).parameters
    given = {
        name: value
        for name, value in arguments.items()
        if name in parameters
        and name not in _REPLACED
        and "callback" not in name
        and value is not parameters[name].default
    }
    one = {"prompt": ["a"], "output_type": "latent"}
    if arguments.get("negative_prompt") is not None:
        one["negative_prompt"] = ["a"]
    return {**given, **{name: value for name, value in one.items() if name in parameters}}


def _glance(pipe: Any, denoiser: torch.nn.Module, given: Mapping[str, Any]) -> Glance:
    seen: dict[str, Any] = {}
    scheduler, spy = pipe.scheduler, deepcopy(pipe.scheduler)
    set_timesteps = spy.set_timesteps

    @wraps(set_timesteps)  # pipelines look at its signature
    def note(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(set_timesteps).bind(*args, **kwargs).arguments
        inner = bound.pop("kwargs", {})
        seen["schedule"] = {n: v for n, v in {**bound, **inner}.items() if n not in ("num_inference_steps", "device")}
        return set_timesteps(*args, **kwargs)

    spy.set_timesteps = note
    more = {"generator": torch.Generator().manual_seed(0)}
    accepted = inspect.signature(own_class(pipe).__call__).parameters
    with _alone(pipe, denoiser, seen), torch.no_grad(), torch.random.fork_rng():
        pipe.scheduler = spy
        try:
            pipe(**given, **{n: v for n, v in more.items() if n in accepted})
        except _Seen:
            pass
        except InterpError:
            raise
        except Exception as error:
            raise InterpError(
                f"{type(pipe).__name__} could not be called as it is asked for: {type(error).__name__}: {error}"
            ) from error
        finally:
            pipe.scheduler = scheduler
    if "args" not in seen:
        raise InterpError(
            f"{type(pipe).__name__} ended without calling its transformer, so nothing of it can be recorded"
        )
    return Glance(seen["args"], seen["kwargs"], seen.get("schedule", {}))


@contextmanager
def _alone(pipe: Any, denoiser: torch.nn.Module, seen: dict[str, Any]) -> Iterator[None]:
    """Let the pipeline's own class be called, and the denoiser end the call."""
    # what the pipeline calls may be a compiled wrapper of the module
    parts = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    called = [denoiser, *(m for m in parts if m is not denoiser and plain(m) is denoiser)]
    worn = pipe.__class__, [m.__class__ for m in called]

    def end(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(args=args, kwargs=kwargs)
        raise _Seen

    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    token = GLANCING.set(True)
    pipe.__class__ = own_class(pipe)
    for module in called:
        bare = own_class(module)
        module.__class__ = type(bare.__name__, (bare,), {"__call__": end, "__module__": bare.__module__})
    pipe.set_progress_bar_config(**{**quiet, "disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = quiet
        pipe.__class__ = worn[0]
        for module, own in zip(called, worn[1], strict=True):
            module.__class__ = own
        GLANCING.reset(token)
        if getattr(pipe, "_all_hooks", None):  # an offload waits for the call's end
            pipe.maybe_free_model_hooks()
