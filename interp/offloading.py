"""Weights that lie elsewhere and come to the device for a module's call: accelerate's offloads, diffusers' group offload."""

from collections.abc import Iterator
from typing import Any

import torch


def runs_on(module: torch.nn.Module) -> torch.device | None:
    """The device to which a module's weights, or those within it, come; None where all of them stay where they are."""
    for m in module.modules():
        for group in _groups(m):
            return torch.device(group.onload_device)
        hook = _hook(m)
        if hook is not None:
            return torch.device(hook.execution_device)
    return None


def coming(module: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """Weights within a module that come for a call: path of the module that is called → what it brings, each once."""
    paths = {id(m): path for path, m in module.named_modules()}
    found: dict[str, list[torch.Tensor]] = {}
    brought: set[int] = set()

    def bring(path: str, tensors: list[torch.Tensor]) -> None:
        new = {id(t): t for t in tensors if id(t) not in brought}
        brought.update(new)
        found[path] = [*found.get(path, ()), *new.values()]

    for path, m in module.named_modules():
        for group in _groups(m):
            parts = [*group.parameters, *group.buffers, *(t for one in group.modules for t in _tensors(one))]
            bring(paths[id(group.onload_leader or m)], parts)
        hook = _hook(m)
        if hook is not None:
            whole = getattr(hook, "place_submodules", True)  # a whole part of the pipeline, or each module by itself
            bring(path, list(_tensors(m)) if whole else [*m.parameters(False), *m.buffers(False)])
    return found


def at_once(module: torch.nn.Module) -> int:
    """Bytes of such weights that are on the device at once while the module runs: the most that one module within it needs.

    While a module runs, what those around it have brought is there, too; and where a stream brings the next group
    meanwhile, that is.
    """
    sizes = {path: sum(t.numel() * t.element_size() for t in tensors) for path, tensors in coming(module).items()}
    there = {path: sum(size for other, size in sizes.items() if _within(path, other)) for path in sizes}
    streamed = any(group.stream is not None for m in module.modules() for group in _groups(m))
    ahead = max((size for path, size in sizes.items() if path), default=0) if streamed else 0
    return max(there.values(), default=0) + ahead


def in_files(module: torch.nn.Module) -> set[int]:
    """Parameters, by identity, whose values a group offload keeps in files: in between they hold anything."""
    groups = [g for m in module.modules() for g in _groups(m) if g.offload_to_disk_path is not None]
    return {id(t) for g in groups for t in g.tensor_to_key}


def _within(path: str, other: str) -> bool:
    return not other or path == other or path.startswith(f"{other}.")


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _groups(module: torch.nn.Module) -> list[Any]:
    """The group of weights of diffusers' group offload that a module's call brings, if any."""
    registry = vars(module).get("_diffusers_hook")  # not getattr: what is not there takes a module long to say
    found = [getattr(hook, "group", None) for hook in ([] if registry is None else registry.hooks.values())]
    return [group for group in found if hasattr(group, "onload_device")]


def _hook(module: torch.nn.Module) -> Any:
    """The hook of accelerate that brings a module's weights, if any."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])  # several in a row
    return next((h for h in hooks if getattr(h, "offload", type(h).__name__ == "CpuOffload")), None)
