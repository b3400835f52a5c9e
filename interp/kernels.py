"""Attention kernels, observed and never replaced.

A fused kernel does not form the probabilities, and whoever swaps the kernel changes the image. So the kernel's
*call* is watched: hooks on each attention module push and pop the current site on a thread-local stack, and two
functions are wrapped while a registry is active: `torch.nn.functional.scaled_dot_product_attention`, and
`Attention.get_attention_scores` (sliced and explicit processors). There the exact query, key, mask and scale pass by,
after norm, LoRA and adapters; the model's own kernel computes the output.

An attention module that ran while none of the two was called is an error that names the processor: never a silent gap.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from interp.errors import InterpError


@dataclass
class AttentionCall:
    """One kernel call: what the softmax of an attention site was computed from.

    `query` (rows, head, query, feature), `key` and `value` (rows, head, key, feature); `mask` broadcastable to
    (rows, head, query, key), additive or boolean (True = attend); `probs` (rows, head, query, key) where the
    processor formed them itself. `call` counts the kernel calls within one run of the module (IP-Adapter makes two).
    """

    site: str
    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    scale: float = 1.0
    causal: bool = False
    probs: torch.Tensor | None = None
    call: int = 0

    def probabilities(self, rows: slice = slice(None)) -> torch.Tensor:
        """Softmax over all keys in float32, for the wanted rows: (rows, head, query, key)."""
        if self.probs is not None:
            return self.probs[rows].float()
        assert self.query is not None and self.key is not None
        query, key = self.query[rows].float(), self.key[rows].float()
        if key.shape[1] != query.shape[1]:  # grouped-query attention
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = torch.matmul(query * self.scale, key.transpose(-1, -2))
        if self.mask is not None:
            mask = self.mask if self.mask.shape[0] == 1 or self.mask.ndim < 4 else self.mask[rows]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
        if self.causal:
            keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~keep, -math.inf)
        return scores.softmax(-1)


@dataclass
class _Frame:
    """One attention module at work."""

    site: str
    module: Any
    on_call: Callable[[AttentionCall], torch.Tensor | None]
    calls: int = 0
    rows: int = 0  # rows of the module's input: sliced processors deliver probabilities in pieces
    pieces: list[torch.Tensor] = field(default_factory=list)


class KernelObserver:
    """Watch the kernels of chosen attention modules while active; thread-local, so that other threads pass through.

    `on_call(AttentionCall)` may return edited probabilities (rows, head, query, key): only then the output becomes
    `probs @ value`; on None the model's own kernel output is used untouched.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._undo: list[Callable[[], None]] = []

    def _stack(self) -> list[_Frame]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def watch(
        self, site: str, module: torch.nn.Module, on_call: Callable[[AttentionCall], torch.Tensor | None]
    ) -> None:
        """Send every kernel call made inside `module` to `on_call`."""
        if not self._undo:
            self._install()

        def enter(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._stack().append(_Frame(site, module, on_call, rows=hidden.shape[0]))

        def leave(_: torch.nn.Module, args: tuple, output: Any) -> None:
            stack = self._stack()
            frame = stack.pop() if stack and stack[-1].module is module else None
            if frame is not None and output is not None and not frame.calls:
                raise InterpError(_coverage_message(site, module))

        handles = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]
        self._undo.extend(h.remove for h in handles)

    def close(self) -> None:
        """Undo everything."""
        while self._undo:
            self._undo.pop()()
        self._local = threading.local()

    def _install(self) -> None:
        """Wrap the two functions; nested observers wrap each other and unwrap in reverse order."""
        sdpa, scores = F.scaled_dot_product_attention, Attention.get_attention_scores

        def observed_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
            stack = self._stack()
            if not stack:
                return sdpa(query, key, value, *args, **kwargs)
            frame = stack[-1]
            options = {
                **dict(zip(("attn_mask", "dropout_p", "is_causal", "scale"), args, strict=False)),
                **kwargs,
            }
            scale = options.get("scale")
            call = AttentionCall(
                frame.site,
                query,
                key,
                value,
                options.get("attn_mask"),
                1 / math.sqrt(query.shape[-1]) if scale is None else scale,
                options.get("is_causal", False),
                call=frame.calls,
            )
            frame.calls += 1
            out = sdpa(query, key, value, *args, **kwargs)
            edited = frame.on_call(call)
            return out if edited is None else torch.matmul(edited.to(value.dtype), value)

        def observed_scores(
            attn: Any, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            probs = scores(attn, query, key, mask)
            stack = self._stack()
            if not stack or stack[-1].module is not attn:
                return probs
            frame = stack[-1]
            # (rows·head, query, key), whole or, with attention slicing, some of it at a time
            frame.pieces.append(probs)
            frame.calls += 1
            if sum(len(p) for p in frame.pieces) < frame.rows * attn.heads:
                return probs
            whole = torch.cat(frame.pieces).unflatten(0, (frame.rows, attn.heads))
            sliced, frame.pieces = len(frame.pieces) > 1, []
            edited = frame.on_call(AttentionCall(frame.site, None, None, probs=whole))
            if edited is None:
                return probs
            if sliced:
                raise InterpError(
                    f"the probabilities of {frame.site!r} cannot be edited while attention slicing is on; "
                    "call pipe.disable_attention_slicing()"
                )
            return edited.flatten(0, 1).to(probs.dtype)

        F.scaled_dot_product_attention = observed_sdpa
        Attention.get_attention_scores = observed_scores

        def restore() -> None:
            F.scaled_dot_product_attention = sdpa
            Attention.get_attention_scores = scores

        self._undo.append(restore)


def _coverage_message(site: str, module: torch.nn.Module) -> str:
    processor = type(getattr(module, "processor", None)).__name__
    return (
        f"attention at {site!r} ran, but its kernel could not be observed: processor {processor} calls neither "
        "scaled_dot_product_attention nor get_attention_scores (xformers, sage and flex kernels do so); "
        "choose a standard processor, e.g. pipe.unet.set_default_attn_processor(), or leave this site out of the capture"
    )
