"""Attention probabilities of a module as a black box: an independent reference for every family.

The output of attention is linear in the values: out = P·V, plus what other values add (an IP-Adapter's picture). So the
values are what is chosen here: one-hot rows put in at the value projections, and P is read off the output, before the
output projection. The module itself computes it, by its own kernel, with whatever norms, masks, rotary embedding and
grouping it has; nothing is known of queries and keys, nor watched at the kernel, which is how recording works.
What is needed is the names of the value projections (`to_v`, `add_v_proj`) and of the output projections (`to_out`,
`to_add_out`), and which of them are the image's.
"""

from collections.abc import Mapping
from typing import Any

import torch

from interp.errors import InterpError


def black_box_attention(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], heads: int
) -> dict[tuple[str, str], torch.Tensor]:
    """Return the probabilities of one call of an attention module: (queries, keys) → (rows, head, query, key).

    Queries and keys are `own` (the module's main stream; the image's if there are two) or `added` (the text's). In
    cross-attention the `own` keys are those of the text.

    Args:
        module: A diffusers attention module.
        args, kwargs: Of the call.
        heads: Number of query heads.

    Raises:
        InterpError: the module has no value projection of a known name.
    """
    known = {"own": "to_v", "added": "add_v_proj"}
    streams = {name: m for name, m in known.items() if isinstance(getattr(module, m, None), torch.nn.Module)}
    if "own" not in streams:
        raise InterpError(
            f"{type(module).__name__} has no value projection `to_v`, so its attention cannot be read off as a black box; give "
            "check_family a reference= of your own"
        )
    lengths = _lengths(module, streams, args, kwargs)
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    nothing = _run(module, streams, "", range(0), 1, args, kwargs)
    for keys, (length, width, grouped) in lengths.items():
        feature = width // grouped if grouped else width // heads
        for start in range(0, length, feature):
            outputs = _run(module, streams, keys, range(start, min(start + feature, length)), feature, args, kwargs)
            for queries, out in outputs.items():
                # (rows, query, head·feature) → (rows, head, query, key)
                block = (
                    (out - nothing[queries])
                    .unflatten(-1, (heads, -1))
                    .transpose(1, 2)[..., : min(feature, length - start)]
                )
                found.setdefault((queries, keys), []).append(block.float())
    return {pair: torch.cat(blocks, -1) for pair, blocks in found.items()}


def _lengths(
    module: Any, streams: Mapping[str, str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, tuple[int, int, int]]:
    """Stream → (keys, width of the values, number of value heads if it is known)."""
    seen: dict[str, tuple[int, int, int]] = {}
    handles = []
    for name, attribute in streams.items():

        def note(_: Any, given: Any, out: torch.Tensor, name: str = name) -> None:
            seen[name] = (int(out.shape[1]), int(out.shape[2]), int(getattr(module, "kv_heads", 0) or 0))

        handles.append(getattr(module, attribute).register_forward_hook(note))
    try:
        module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _run(
    module: Any, streams: Mapping[str, str], keys: str, block: range, feature: int, args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Run the module with one-hot values at a block of one stream's keys, and zeros elsewhere."""
    outputs: dict[str, torch.Tensor] = {}
    handles = []
    for name, attribute in streams.items():

        def replace(_: Any, given: Any, out: torch.Tensor, name: str = name) -> torch.Tensor:
            values = torch.zeros_like(out)
            if name == keys:
                rows = values.unflatten(-1, (-1, feature))
                for i, key in enumerate(block):
                    rows[:, key, :, i] = 1
            return values

        handles.append(getattr(module, attribute).register_forward_hook(replace))
    for name, attribute in (("own", "to_out"), ("added", "to_add_out")):
        projection = getattr(module, attribute, None)
        if projection is not None:
            first = projection[0] if isinstance(projection, (torch.nn.ModuleList, torch.nn.Sequential)) else projection

            def keep(_: Any, given: tuple[Any, ...], name: str = name) -> None:
                outputs[name] = given[0].clone()

            handles.append(first.register_forward_pre_hook(keep))
    try:
        out = module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs or {"own": out[0] if isinstance(out, tuple) else out}
