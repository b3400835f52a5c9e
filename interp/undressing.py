"""A module without what others put on it: hooks, an offload's or nnsight's `forward`, compiled code, own kernels."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from interp.observing import NAME, HookProbs

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@contextmanager
def undressed(module: torch.nn.Module) -> Iterator[None]:
    """Put aside all that others put on a module and those within it: none of it is to meet tensors without data.

    Nor is a kernel that diffusers' dispatcher was told to use: many cannot take such tensors; the native one stands in.
    """
    backends = _AttentionBackendRegistry._backends
    kernels = dict(backends)
    worn = [
        (m, name, vars(m)[name])
        for m in module.modules()
        for name in (*_HOOKS, "forward", "_compiled_call_impl")
        if name in vars(m)
    ]
    points = [(m, p) for m in module.modules() if isinstance(p := m._modules.get(NAME), HookProbs)]
    try:
        for m, _ in points:
            del m._modules[NAME]  # who rehearses inside watches for itself
        for m, name, _ in worn:
            if name in _HOOKS:
                vars(m)[name] = OrderedDict()
            else:
                del vars(m)[name]
        backends.update(dict.fromkeys(kernels, kernels[AttentionBackendName.NATIVE]))
        yield
    finally:
        backends.update(kernels)
        for m, name, own in worn:
            vars(m)[name] = own
        for m, point in points:
            m._modules[NAME] = point
