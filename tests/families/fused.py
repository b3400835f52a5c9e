"""Attention probabilities of a module as a black box, where the value projection is part of a fused one."""

from collections.abc import Mapping
from typing import Any

import torch

from interp.testing import black_box_attention


def fused_attention(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], heads: int) -> dict:
    """As `black_box_attention`; the one-stream blocks of FLUX.2 project queries, keys, values and their MLP in one."""
    if not hasattr(module, "to_qkv_mlp_proj"):
        return black_box_attention(module, args, kwargs, heads)
    width = module.inner_dim
    length, feature = (args[0] if args else kwargs["hidden_states"]).shape[1], width // heads
    block: range = range(0)
    outputs: list[torch.Tensor] = []

    def one_hot(_: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        values = torch.zeros_like(out[..., :width]).unflatten(-1, (heads, feature))
        for i, key in enumerate(block):
            values[:, key, :, i] = 1
        return torch.cat([out[..., : 2 * width], values.flatten(-2), out[..., 3 * width :]], -1)

    def keep(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        outputs.append(given[0][..., :width].unflatten(-1, (heads, feature)).transpose(1, 2))

    handles = [module.to_qkv_mlp_proj.register_forward_hook(one_hot), module.to_out.register_forward_pre_hook(keep)]
    try:
        for start in range(0, length, feature):
            block = range(start, min(start + feature, length))
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {("own", "own"): torch.cat(outputs, -1)[..., :length].float()}
