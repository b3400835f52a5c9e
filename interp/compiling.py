"""Compiled models. Hooks that are added after compilation never fire, silently: a watched model runs eagerly."""

from collections.abc import Callable, Iterable

import torch

from interp.warning import warn as tell


def plain(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module itself, or the one that `torch.compile(module)` wraps."""
    while isinstance(inner := module._modules.get("_orig_mod"), torch.nn.Module):
        module = inner
    return module


def is_compiled(module: torch.nn.Module) -> bool:
    """Tell whether a module, or one within it, was compiled: `torch.compile(m)`, `m.compile()`, a block of it."""
    return any(
        "_orig_mod" in m._modules or getattr(m, "_compiled_call_impl", None) is not None for m in module.modules()
    )


def run_eagerly(modules: Iterable[torch.nn.Module], warn: bool = True) -> Callable[[], None]:
    """Let compiled modules run their own Python until the returned function is called; others are not affected.

    The eager run is exact by itself; it need not equal the compiled one bit for bit.
    """
    if not any(map(is_compiled, modules)):
        return lambda: None
    if warn:
        tell(
            "the model is compiled; while it is recorded or changed it runs eagerly, because hooks do not fire in compiled "
            "code: slower, and equal to the compiled run up to rounding"
        )
    stance = torch.compiler.set_stance("force_eager")
    stance.__enter__()
    return lambda: stance.__exit__(None, None, None)
