"""A module without what others put on it: hooks, an offload's or nnsight's `forward`, compiled code."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@contextmanager
def undressed(module: torch.nn.Module) -> Iterator[None]:
    """Put aside all that others put on a module and those within it: none of it is to meet tensors without data."""
    worn = [
        (m, name, vars(m)[name])
        for m in module.modules()
        for name in (*_HOOKS, "forward", "_compiled_call_impl")
        if name in vars(m)
    ]
    try:
        for m, name, _ in worn:
            if name in _HOOKS:
                vars(m)[name] = OrderedDict()
            else:
                del vars(m)[name]
        yield
    finally:
        for m, name, own in worn:
            vars(m)[name] = own
