"""Attention kernels, observed and never replaced.

A fused kernel does not form the probabilities, and whoever swaps the kernel changes the image. So the kernel's
*call* is watched: hooks on each attention module push and pop a frame on a stack, and three things are wrapped while
anybody watches: `torch.nn.functional.scaled_dot_product_attention`, `Attention.get_attention_scores` (sliced and
explicit processors), and the backends of diffusers' attention dispatcher, for those that do not end in the first (flex,
flash, sage, xformers). There the exact query, key, mask and scale pass by, after norm, rotary embedding, LoRA and
adapters; the model's own kernel computes the output.

Where probabilities were changed, `probs @ value` takes the place of the kernel's output, query by query: what nobody
changed stays the kernel's own, bit for bit.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention

from interp.errors import InterpError


@dataclass
class AttentionCall:
    """One kernel call: what the softmax of an attention site was computed from.

    `query` (rows, head, query, feature), `key` and `value` (rows, head, key, feature); `mask` broadcastable to
    (rows, head, query, key), additive or boolean (True = attend); `probs` (rows, head, query, key) where the
    processor formed them itself, or somebody changed them. `call` counts the kernel calls within one run of the module
    (IP-Adapter makes two).
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

    @property
    def rows(self) -> int:
        """Number of rows: samples of all branches."""
        some = self.query if self.probs is None else self.probs
        assert some is not None
        return int(some.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        if self.probs is not None:
            return int(self.probs.shape[-2]), int(self.probs.shape[-1])
        assert self.query is not None and self.key is not None
        return int(self.query.shape[-2]), int(self.key.shape[-2])

    def without_value(self) -> "AttentionCall":
        """The same without `value`; made by hand, since it is asked for at every call of a kernel."""
        return AttentionCall(
            self.site, self.query, self.key, None, self.mask, self.scale, self.causal, self.probs, self.call
        )

    def probabilities(self, rows: slice = slice(None), queries: slice = slice(None)) -> torch.Tensor:
        """Softmax over all keys in float32, for the wanted rows and queries: (rows, head, query, key)."""
        if self.probs is not None:
            return self.probs[rows][:, :, queries].float()
        assert self.query is not None and self.key is not None
        query, key = self.query[rows][:, :, queries].float(), self.key[rows].float()
        if key.shape[1] != query.shape[1]:  # grouped-query attention
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = torch.matmul(query * self.scale, key.transpose(-1, -2))
        if self.mask is not None:
            mask = self.mask if self.mask.shape[0] == 1 or self.mask.ndim < 4 else self.mask[rows]
            if mask.ndim > 1 and mask.shape[-2] != 1:
                mask = mask[..., queries, :]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
        if self.causal:
            keep = torch.ones(self.size, dtype=torch.bool, device=scores.device).tril()[queries]
            scores = scores.masked_fill(~keep, -math.inf)
        return scores.softmax(-1)


@dataclass
class Frame:
    """One attention module at work. `on_call` returns the probabilities before and after they were changed, or None."""

    site: str
    module: Any
    on_call: Callable[[AttentionCall], tuple[torch.Tensor, torch.Tensor] | None]
    calls: int = 0
    rows: int = 0  # rows of the module's input: sliced processors deliver probabilities in pieces
    pieces: list[torch.Tensor] = field(default_factory=list)


# Modules at work, the innermost last. A context variable: other threads, and nnsight's blocks, which run beside the
# model, have their own.
_FRAMES: ContextVar[tuple[Frame, ...]] = ContextVar("attention modules at work", default=())


def enter_frame(frame: Frame) -> None:
    """Send kernel calls to this frame until it is left."""
    _FRAMES.set((*_FRAMES.get(), frame))


def leave_frame(module: torch.nn.Module) -> Frame | None:
    """End a module's frame, if it is the innermost, and return it."""
    stack = _FRAMES.get()
    if not stack or stack[-1].module is not module:
        return None
    _FRAMES.set(stack[:-1])
    return stack[-1]


def watch_kernels() -> Callable[[], None]:
    """Wrap the three kinds of kernels; return the undo."""
    sdpa, scores = F.scaled_dot_product_attention, Attention.get_attention_scores
    backends = dict(_AttentionBackendRegistry._backends)
    F.scaled_dot_product_attention = _observed_sdpa(sdpa)
    Attention.get_attention_scores = _observed_scores(scores)
    for name, backend in backends.items():
        _AttentionBackendRegistry._backends[name] = _observed_backend(str(name.value), backend)

    def restore() -> None:
        F.scaled_dot_product_attention = sdpa
        Attention.get_attention_scores = scores
        _AttentionBackendRegistry._backends.update(backends)

    return restore


_REST = ("attn_mask", "dropout_p", "is_causal", "scale")


def _observed_sdpa(sdpa: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def observed(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        out = sdpa(query, key, value, *args, **kwargs)
        stack = _FRAMES.get()
        if not stack:
            return out
        frame = stack[-1]
        given = {**dict(zip(_REST, args, strict=False)), **kwargs} if args else kwargs
        scale = given.get("scale")
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        causal = given.get("is_causal", False)
        call = AttentionCall(frame.site, query, key, value, given.get("attn_mask"), scale, causal, call=frame.calls)
        frame.calls += 1
        changed = frame.on_call(call)
        return out if changed is None else _merged(out, value, *changed)

    return observed


def _observed_scores(scores: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def observed(attn: Any, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        probs = scores(attn, query, key, mask)
        stack = _FRAMES.get()
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
        changed = frame.on_call(AttentionCall(frame.site, None, None, probs=whole))
        if changed is None:
            return probs
        if sliced:
            raise InterpError(
                f"the probabilities of {frame.site!r} cannot be edited while attention slicing is on; "
                "call pipe.disable_attention_slicing()"
            )
        return changed[1].flatten(0, 1).to(probs.dtype)

    return observed


def _observed_backend(name: str, backend: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a backend of diffusers' dispatcher, whose tensors are (rows, position, head, feature)."""

    @wraps(backend)
    def observed(*args: Any, **kwargs: Any) -> Any:
        stack = _FRAMES.get()
        before = stack[-1].calls if stack else 0
        out = backend(*args, **kwargs)
        if not stack or stack[-1].calls > before:  # it ended in scaled_dot_product_attention, seen there
            return out
        frame, given = stack[-1], inspect.signature(backend).bind(*args, **kwargs)
        call = _dispatched(frame, name, given.arguments)
        frame.calls += 1
        changed = frame.on_call(call)
        if changed is None:
            return out
        first = out[0] if isinstance(out, tuple) else out
        assert call.value is not None
        merged = _merged(first.transpose(1, 2), call.value, *changed).transpose(1, 2)
        return (merged, *out[1:]) if isinstance(out, tuple) else merged

    return observed


def _merged(out: torch.Tensor, value: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return after @ value for the queries whose probabilities were changed, and the kernel's own output for the rest."""
    if value.shape[1] != after.shape[1]:  # grouped heads share a value
        value = value.repeat_interleave(after.shape[1] // value.shape[1], dim=1)
    changed = (after != before).any(-1, keepdim=True)
    return torch.where(changed, torch.matmul(after.to(value.dtype), value).to(out.dtype), out)


def _dispatched(frame: Frame, name: str, given: Mapping[str, Any]) -> AttentionCall:
    """Describe a dispatched kernel call in the words of scaled_dot_product_attention."""
    query, key, value = (given[n].transpose(1, 2) for n in ("query", "key", "value"))
    mask = given.get("attn_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or (name == "flex" and mask.ndim == 2)):
        raise InterpError(
            f"attention at {frame.site!r} has a {type(mask).__name__} as mask in the backend {name!r}, which is unknown "
            "here; use the backend 'native', e.g. pipe.transformer.set_attention_backend('native')"
        )
    if mask is not None and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[-2]):
        mask = mask[:, None, None, :]
    scale = given.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    causal = bool(given.get("is_causal", False))
    return AttentionCall(frame.site, query, key, value, mask, scale, causal, call=frame.calls)
