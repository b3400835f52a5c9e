"""Tensors on their way to the host: asynchronous copies through pinned memory, a bounded number at a time."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Deliver = Callable[[dict[str, np.ndarray]], None]


class Outbox:
    """Copy tensors to the host without stopping the device; deliver them in order.

    At most `depth` parcels are under way: then `send` waits for the oldest, so that memory stays bounded.
    """

    def __init__(self, depth: int = 4) -> None:
        self.depth = depth
        self._under_way: deque[tuple[Any, dict[str, torch.Tensor], Deliver]] = deque()

    def send(self, tensors: dict[str, torch.Tensor], deliver: Deliver) -> None:
        """Copy and, once the copies have arrived, call `deliver` with arrays of the same names."""
        if not any(t.is_cuda for t in tensors.values()):
            self.flush()
            deliver({name: t.detach().cpu().numpy() for name, t in tensors.items()})
            return
        host = {}
        for name, tensor in tensors.items():
            host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host[name].copy_(tensor.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._under_way.append((event, host, deliver))
        while len(self._under_way) > self.depth:
            self._deliver_oldest()

    def flush(self) -> None:
        """Wait for everything under way."""
        while self._under_way:
            self._deliver_oldest()

    def _deliver_oldest(self) -> None:
        event, host, deliver = self._under_way.popleft()
        event.synchronize()
        deliver({name: t.numpy() for name, t in host.items()})
