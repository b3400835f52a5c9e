"""Who reads or writes which site, and how a branch's rows reach them."""

from collections.abc import Callable, Collection, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

from interp.calls import At, DenoiserCall
from interp.errors import InterpError

SiteFunction = Callable[[torch.Tensor, At], torch.Tensor | None]


@dataclass(frozen=True)
class _Listener:
    """A reader or writer, and the steps in which it is called."""

    fn: SiteFunction
    steps: Collection[int] | None

    def at(self, step: int) -> bool:
        return self.steps is None or step in self.steps


@dataclass
class Listeners:
    """Readers and writers by site; writers come first, in the order in which they were added."""

    _readers: dict[str, list[_Listener]] = field(default_factory=dict)
    _writers: dict[str, list[_Listener]] = field(default_factory=dict)
    _paths: set[str] = field(default_factory=set)

    def anywhere(self, path: str) -> bool:
        """Tell whether somebody reads or writes any quantity of a module."""
        return path in self._paths

    @property
    def sites(self) -> list[str]:
        """Every site that somebody reads or writes."""
        return [*{**self._readers, **self._writers}]

    def add(self, site: str, fn: SiteFunction, steps: Collection[int] | None, *, writes: bool) -> None:
        """Let `fn` read or write a site in these steps; None is all of them."""
        (self._writers if writes else self._readers).setdefault(site, []).append(_Listener(fn, steps))
        self._paths.add(site.rpartition(":")[0])

    def writers(self) -> list[tuple[str, Collection[int] | None]]:
        """Site and steps of each writer."""
        return [(site, one.steps) for site, found in self._writers.items() for one in found]

    def reads(self, site: str) -> bool:
        """Tell whether somebody reads it."""
        return site in self._readers

    def writes(self, site: str) -> bool:
        """Tell whether somebody writes it."""
        return site in self._writers

    def listens(self, site: str, step: int) -> bool:
        """Tell whether somebody reads or writes it in this step."""
        return any(one.at(step) for one in (*self._writers.get(site, ()), *self._readers.get(site, ())))

    def apply(self, site: str, tensor: torch.Tensor, call: DenoiserCall, kernel_call: int = 0) -> torch.Tensor | None:
        """Let writers change and readers see the rows of each branch; None if nothing was changed."""
        changed = self.write(site, tensor, call, kernel_call)
        self.show(site, tensor if changed is None else changed, call, kernel_call)
        return changed

    def write(self, site: str, tensor: torch.Tensor, call: DenoiserCall, kernel_call: int) -> torch.Tensor | None:
        """Let writers change the rows of each branch; None if none did."""
        parts, changed = _split(site, tensor, call), False
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

    def show(self, site: str, tensor: torch.Tensor, call: DenoiserCall, kernel_call: int) -> None:
        """Let readers see the rows of each branch."""
        for listener in self._readers.get(site, ()):
            for branch, part in _split(site, tensor, call).items() if listener.at(call.step) else ():
                listener.fn(part, call.at(site, branch, kernel_call))


def _split(site: str, tensor: torch.Tensor, call: DenoiserCall) -> dict[str, torch.Tensor]:
    if not isinstance(tensor, torch.Tensor):
        raise InterpError(
            f"a {type(tensor).__name__} passes at {site!r}, and no tensor; read it with a plain torch hook"
        )
    if tensor.shape[:1] != (call.rows,):
        raise InterpError(
            f"a tensor of shape {tuple(tensor.shape)} passes at {site!r}, whose first dimension does not hold "
            f"{call}; read it with a plain torch hook"
        )
    return call.split(tensor)


Change = Callable[[Any], torch.Tensor | None]
"""What is shown a module's tensor; anything else it refuses."""


def changed_input(args: tuple, kwargs: dict, change: Change) -> tuple[tuple, dict] | None:
    """Let `change` look at a module's first tensor; return the new arguments, or None if it is left as it is."""
    if args and isinstance(args[0], torch.Tensor):
        changed = change(args[0])
        return None if changed is None else ((changed, *args[1:]), kwargs)
    first = next((k for k, v in kwargs.items() if isinstance(v, torch.Tensor)), None)
    changed = None if first is None else change(kwargs[first])
    return None if changed is None else (args, {**kwargs, first: changed})


def changed_output(out: Any, index: int, change: Change) -> Any:
    """Let `change` look at a module's output, of a tuple the element `index`; None if it is left as it is."""
    if isinstance(out, tuple) and len(out) > index:
        changed = change(out[index])
        return None if changed is None else (*out[:index], changed, *out[index + 1 :])
    if not isinstance(out, MutableMapping) or not out:
        return change(out)
    key = next(iter(out))  # diffusers' and transformers' outputs are ordered mappings, main tensor first
    changed = change(out[key])
    if changed is not None:
        out[key] = changed
    return None
