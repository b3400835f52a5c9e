"""A module without what others put on it: hooks, an offload's or nnsight's `forward`, compiled code, own kernels.

So it can be run on tensors without data, which tells shapes and sizes and computes nothing.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch._subclasses.fake_tensor import FakeTensorMode

from interp.observing import NAME, HookProbs
from interp.offloading import runs_on

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
T = TypeVar("T")


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
    known = [(m, set(vars(m))) for m in module.modules()]
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
        for m, names in known:  # such as a note that hooks are in place, which were put on inside and are gone again
            for name in vars(m).keys() - names:
                del vars(m)[name]
        for m, point in points:
            m._modules[NAME] = point


@contextmanager
def without_data(module: torch.nn.Module) -> Iterator[str]:
    """Tensors that are made inside have no data, and lie on the module's device, whose type is given.

    Weights that an offload has taken away lie nowhere, or on another device than they come to: there, all of them are stood
    in for, where they come to.
    """
    weights = [*module.parameters(), *module.buffers()]
    devices, runs = {str(t.device) for t in weights} or {"cpu"}, runs_on(module)
    offloaded = runs is not None or len(devices) > 1 or "meta" in devices
    device = str(runs or "cpu") if offloaded else devices.pop()
    weightless = stood_in(module) if offloaded else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.device(device), weightless:
        yield torch.device(device).type


def dry(module: torch.nn.Module, call: Callable[[], T], at_home: bool = False) -> T:
    """Make a call on tensors without data: on the meta device, which is quick; on the module's own where it fails there.

    Some models keep tensors beside their weights, or look at values. `at_home`: on the module's own device at once.
    """
    if not at_home:
        try:
            with on_meta(module):
                return call()
        except Exception:  # whatever it was, the other way tells whether it matters
            pass
    with without_data(module):
        return call()


@contextmanager
def on_meta(module: torch.nn.Module) -> Iterator[None]:
    """Tensors that are made inside, and all weights, lie on the meta device: quicker, where the device plays no part."""
    with torch.no_grad(), torch.device("meta"), stood_in(module):
        yield


@contextmanager
def stood_in(module: torch.nn.Module) -> Iterator[None]:
    """Put new tensors, on the device that is the default inside, in the place of all weights."""
    stores = [store for m in module.modules() for store in (m._parameters, m._buffers)]
    kept = [(store, name, tensor) for store in stores for name, tensor in store.items() if tensor is not None]
    try:
        for store, name, tensor in kept:
            store[name] = torch.empty(tensor.shape, dtype=tensor.dtype)  # type: ignore[assignment]
        yield
    finally:
        for store, name, tensor in kept:
            store[name] = tensor  # type: ignore[assignment]
