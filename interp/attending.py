"""Kernel calls of attention modules, on their way from where they are seen to a registry's readers, writers and functions."""

from collections.abc import Callable, Iterable
from functools import partial

import torch

from interp.calls import DenoiserCall
from interp.denoising import Denoising, running
from interp.errors import InterpError
from interp.families import AttentionSite
from interp.families.glance import GLANCING
from interp.kernels import AttentionCall
from interp.listening import Listeners
from interp.observing import KernelObserver, Watch

KernelFunction = Callable[[AttentionCall, DenoiserCall], None]


class Attending:
    """The attention modules that one registry watches.

    functions: called with every kernel call of a module, all rows, by its path.
    """

    def __init__(self, listeners: Listeners, denoising: Denoising) -> None:
        self.functions: dict[str, list[KernelFunction]] = {}
        self._listeners, self._denoising = listeners, denoising
        self._asked: set[str] = set()
        self._observer = KernelObserver()

    def offer(self, sites: Iterable[AttentionSite]) -> None:
        """Give attention modules their `hook_probs`; nothing is watched before `ask`, or a torch hook there."""
        for one in sites:
            watch = Watch(partial(self._is_asked, one.name), self._wants_probs, self._change_probs, self._see_kernel)
            self._observer.offer(one.name, one.module, watch)

    def ask(self, path: str, module: torch.nn.Module) -> None:
        """Watch the kernels of a module: one that cannot be seen is an error from now on."""
        if path not in self._asked:
            self._asked.add(path)
            self._observer.start(module)

    def close(self) -> None:
        """Undo everything."""
        self._observer.close()
        self._asked.clear()

    def _is_asked(self, path: str) -> bool:
        return path in self._asked

    def _calling(self, kernel: AttentionCall) -> DenoiserCall | None:
        """The denoiser call that a kernel call belongs to; None if it is not the pipeline's own, or of no interest."""
        call = self._denoising.call
        if call is None or not call.branches or running() is None or kernel.site not in self._asked:
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
        if not self._listeners.anywhere(kernel.site):
            return False
        call = self._calling(kernel)
        return call is not None and self._listeners.listens(f"{kernel.site}:probs", call.step)

    def _change_probs(self, kernel: AttentionCall, probs: torch.Tensor) -> torch.Tensor | None:
        call = self._calling(kernel)
        return None if call is None else self._listeners.write(f"{kernel.site}:probs", probs, call, kernel.call)

    def _see_kernel(self, kernel: AttentionCall, probs: torch.Tensor | None) -> None:
        call = self._calling(kernel)
        if call is None:
            return
        for fn in self.functions.get(kernel.site, ()):
            fn(kernel, call)
        if not self._listeners.anywhere(kernel.site):
            return
        for quantity, tensor in (("q", kernel.query), ("k", kernel.key), ("v", kernel.value)):
            site = f"{kernel.site}:{quantity}"
            if self._listeners.writes(site):
                raise InterpError(f"{site!r} can be read but not written; write ':probs', ':in' or ':out' instead")
            if self._listeners.reads(site) and tensor is not None:
                self._listeners.show(site, tensor, call, kernel.call)
        if probs is not None:
            self._listeners.show(f"{kernel.site}:probs", probs, call, kernel.call)
