"""Tensors on their way to the host: asynchronous copies through pinned memory, delivered by a thread, a few at a time."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

Deliver = Callable[[dict[str, np.ndarray]], None]


class Outbox:
    """Copy tensors to the host without stopping the device or the thread that feeds it; deliver them in order.

    At most `depth` parcels are under way: then `send` waits for the oldest, so that memory stays bounded. What a delivery
    raises is raised by a later `send`, or by `flush`.
    """

    def __init__(self, depth: int = 4) -> None:
        self.depth = depth
        self._under_way: deque[Future[None]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def send(self, tensors: dict[str, torch.Tensor], deliver: Deliver) -> None:
        """Copy and, once the copies have arrived, call `deliver` with arrays of the same names."""
        if not any(t.is_cuda for t in tensors.values()):
            self.flush()
            deliver({name: t.detach().cpu().numpy() for name, t in tensors.items()})
            return
        host, event = _copies(tensors)
        self._thread = self._thread or ThreadPoolExecutor(1, "interp-outbox")
        self._under_way.append(self._thread.submit(_arrive, event, host, deliver))
        while len(self._under_way) > self.depth:
            self._under_way.popleft().result()

    def flush(self) -> None:
        """Wait for everything under way."""
        while self._under_way:
            self._under_way.popleft().result()

    def close(self) -> None:
        """Drop what has not begun to be delivered, and end the thread: nothing is written after this."""
        self._under_way.clear()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None


def _copies(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.cuda.Event]:
    """Begin copies to pinned memory, and return them with the event after which they are there."""
    host = {}
    for name, tensor in tensors.items():
        host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host[name].copy_(tensor.detach(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _arrive(event: torch.cuda.Event, host: dict[str, torch.Tensor], deliver: Deliver) -> None:
    event.synchronize()
    deliver({name: t.numpy() for name, t in host.items()})
