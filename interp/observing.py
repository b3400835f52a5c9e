"""`hook_probs`: where the probabilities of an attention module pass, and who listens there.

While a registry is active, or nnsight runs, each attention module carries a child without parameters, `hook_probs`. The
probabilities (rows, head, query, key) pass through it, in float32 and normalised over all keys, wherever somebody
listens: a torch forward hook on the child, an nnsight block that reads or writes its output, a reader or writer of the
site `…:probs`. Nowhere else are they formed. Whoever changes them there changes what the module computes.

An attention module that ran while none of its kernels could be seen, and that somebody asked for, is an error that
names the processor: never a silent gap.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

import torch

from interp.errors import InterpError
from interp.kernels import AttentionCall, Frame, enter_frame, leave_frame, watch_kernels

NAME = "hook_probs"
_LOCK = Lock()
_STARTED: list["HookProbs"] = []  # modules whose kernel calls are watched
_UNDO: list[Callable[[], None]] = []  # of the wrapped kernels, while there is any


@dataclass(frozen=True, eq=False)
class Watch:
    """One party that is interested in an attention module.

    asked: a kernel that cannot be seen is an error. wants: it reads or changes the probabilities of this call. change:
    its edit of them (rows, head, query, key), or None. see: told of the call as it was really used, and the
    probabilities if they were formed. missed: told that they were not.
    """

    asked: Callable[[], bool] = lambda: False
    wants: Callable[[AttentionCall], bool] = lambda call: False
    change: Callable[[AttentionCall, torch.Tensor], torch.Tensor | None] = lambda call, probs: None
    see: Callable[[AttentionCall, torch.Tensor | None], None] = lambda call, probs: None
    missed: Callable[[], None] = lambda: None


class HookProbs(torch.nn.Module):
    """The identity through which an attention module's probabilities (rows, head, query, key) pass.

    It has no parameters and changes nothing by itself; a forward hook on it may return other probabilities.
    """

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.kept = False  # nnsight's tree of modules holds it, so it stays
        self.watches: list[Watch] = []
        self.handles: list[Any] = []
        self.starter: Callable[[], None] | None = None  # watches the kernels; while somebody could be interested
        self.on_call = partial(_passed, self)

    def forward(self, probs: torch.Tensor) -> torch.Tensor:
        """Return the probabilities."""
        return probs

    def start(self) -> None:
        """Watch the module's kernels, if a registry is active or nnsight runs."""
        if self.starter is not None:
            self.starter()

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Add a hook, as on any module; added within a registry's context, it goes when the context ends."""
        return self._hooked(super().register_forward_hook(*args, **kwargs))

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Add a hook, as `register_forward_hook` does."""
        return self._hooked(super().register_forward_pre_hook(*args, **kwargs))

    def _hooked(self, handle: Any) -> Any:
        self.start()
        if self.watches:
            self.handles.append(handle)
        return handle

    @property
    def hooked(self) -> bool:
        """Whether it has hooks of torch."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in self.__dict__.items() if name != "on_call"}
        return {**own, "watches": [], "handles": [], "starter": None}  # a copy of the model is not watched

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.on_call = partial(_passed, self)


class KernelObserver:
    """Watch the kernels of attention modules, until `close`."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def offer(self, site: str, module: torch.nn.Module, watch: Watch) -> None:
        """Give an attention module its `hook_probs`; nothing is watched before `start`, or a torch hook there."""
        point = place(site, module)
        if not point.watches:
            point.starter = partial(_start, point, module)
        point.watches.append(watch)
        self._undo.append(partial(_withdraw, point, module, watch))
        if point.hooked:
            point.start()

    def start(self, module: torch.nn.Module) -> None:
        """Send every kernel call made inside `module` to those who watch it."""
        module.get_submodule(NAME).start()  # type: ignore[operator]

    def close(self) -> None:
        """Undo everything."""
        while self._undo:
            self._undo.pop()()


def place(site: str, module: torch.nn.Module) -> HookProbs:
    """Return an attention module's `hook_probs`, put there if it has none."""
    point = module._modules.get(NAME)
    if not isinstance(point, HookProbs):
        point = HookProbs(site)
        module.add_module(NAME, point)
    return point


def _withdraw(point: HookProbs, module: torch.nn.Module, watch: Watch) -> None:
    point.watches.remove(watch)
    if point.watches:
        return
    point.starter = None
    with _LOCK:
        while point.handles:
            point.handles.pop().remove()
        if point in _STARTED:
            _STARTED.remove(point)
        if not _STARTED and _UNDO:
            _UNDO.pop()()
    if not point.kept and module._modules.get(NAME) is point:
        del module._modules[NAME]


def _start(point: HookProbs, module: torch.nn.Module) -> None:
    with _LOCK:
        if point in _STARTED:
            return
        if not _STARTED:
            _UNDO.append(watch_kernels())
        _STARTED.append(point)
        point.handles += [
            module.register_forward_pre_hook(partial(_enter, point), with_kwargs=True),
            module.register_forward_hook(partial(_leave, point), always_call=True),
        ]


def _enter(point: HookProbs, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    hidden = args[0] if args else None
    if not isinstance(hidden, torch.Tensor):
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    enter_frame(Frame(point.site, module, point.on_call, rows=hidden.shape[0]))


def _leave(point: HookProbs, module: torch.nn.Module, args: tuple, output: Any) -> None:
    frame = leave_frame(module)
    if frame is None or output is None or frame.calls:
        return
    if point.hooked or any(watch.asked() for watch in point.watches):
        raise InterpError(_unseen(point.site, module))


def _passed(point: HookProbs, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Let the probabilities pass where somebody listens; return them before and after, or None if they are the same."""
    watches, before, after = list(point.watches), None, None
    if point.hooked or any(watch.wants(call) for watch in watches):
        before, after = _changed(point, watches, call)
        if after is not before:
            call = replace(call, probs=after)
    else:
        for watch in watches:
            watch.missed()
    for watch in watches:
        watch.see(call, after)
    return None if before is None or after is None or after is before else (before, after)


def _changed(point: HookProbs, watches: list[Watch], call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Form the probabilities and let everybody change them; the same tensor twice if nobody did."""
    before = call.probabilities()
    if call.probs is not None:  # the processor's own, which an edit in place must not touch
        before = before.clone()
    version = None if before.is_inference() else before._version
    after = point(before)
    for watch in watches:
        new = watch.change(call, after)
        after = after if new is None else new
    if not isinstance(after, torch.Tensor) or after.shape != before.shape:
        found = tuple(after.shape) if isinstance(after, torch.Tensor) else f"a {type(after).__name__}"
        raise InterpError(
            f"the probabilities at {point.site!r} were changed to {found}, but {tuple(before.shape)} (rows, head, query, "
            "key) passes there"
        )
    if version is not None and before._version == version:  # not changed in place
        return before, after
    return call.probabilities(), after


def _unseen(site: str, module: torch.nn.Module) -> str:
    cached = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    if cached:  # PAB and FasterCache replay an earlier output instead of running the module
        return (
            f"attention at {site!r} did not run: the hook {', '.join(map(repr, cached))} gave an earlier step's output; a "
            "cache must be turned off while attention is recorded, e.g. pipe.transformer.disable_cache()"
        )
    processor = type(getattr(module, "processor", None)).__name__
    return (
        f"attention at {site!r} ran, but its kernel could not be observed: processor {processor} calls neither "
        "scaled_dot_product_attention nor get_attention_scores nor diffusers' attention dispatcher (xformers processors do "
        "so); choose a standard processor, e.g. pipe.unet.set_default_attn_processor(), or leave this site out of the capture"
    )
