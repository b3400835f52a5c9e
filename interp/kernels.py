"""Attention kernels, observed and never replaced.

A fused kernel does not form the probabilities, and whoever swaps the kernel changes the image. So the kernel's
*call* is watched: hooks on each attention module push and pop the current site on a thread-local stack, and three
things are wrapped while a registry is active: `torch.nn.functional.scaled_dot_product_attention`,
`Attention.get_attention_scores` (sliced and explicit processors), and the backends of diffusers' attention dispatcher,
for those that do not end in the first (flex, flash, sage, xformers). There the exact query, key, mask and scale pass
by, after norm, rotary embedding, LoRA and adapters; the model's own kernel computes the output.

An attention module that ran while none of them was called is an error that names the processor: never a silent gap.
"""

import inspect
import math
import threading
from collections.abc import Callable, Mapping
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
            hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
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
            return out if edited is None else _weighted(edited, value)

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
        backends = dict(_AttentionBackendRegistry._backends)
        for name, backend in backends.items():
            _AttentionBackendRegistry._backends[name] = self._observed_backend(str(name.value), backend)

        def restore() -> None:
            F.scaled_dot_product_attention = sdpa
            Attention.get_attention_scores = scores
            _AttentionBackendRegistry._backends.update(backends)

        self._undo.append(restore)

    def _observed_backend(self, name: str, backend: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a backend of diffusers' dispatcher, whose tensors are (rows, position, head, feature)."""

        @wraps(backend)
        def observed(*args: Any, **kwargs: Any) -> Any:
            stack = self._stack()
            before = stack[-1].calls if stack else 0
            out = backend(*args, **kwargs)
            if not stack or stack[-1].calls > before:  # it ended in scaled_dot_product_attention, seen there
                return out
            frame, given = stack[-1], inspect.signature(backend).bind(*args, **kwargs)
            call = _dispatched(frame, name, given.arguments)
            frame.calls += 1
            edited = frame.on_call(call)
            if edited is None:
                return out
            assert call.value is not None
            changed = _weighted(edited, call.value).transpose(1, 2)
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        return observed


def _weighted(probs: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return probs @ value, both (rows, head, …); grouped heads share a value."""
    if value.shape[1] != probs.shape[1]:
        value = value.repeat_interleave(probs.shape[1] // value.shape[1], dim=1)
    return torch.matmul(probs.to(value.dtype), value)


def _dispatched(frame: _Frame, name: str, given: Mapping[str, Any]) -> AttentionCall:
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


def _coverage_message(site: str, module: torch.nn.Module) -> str:
    cached = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    if cached:  # PAB and FasterCache replay an earlier output instead of running the module
        return (
            f"attention at {site!r} did not run: the hook {', '.join(map(repr, cached))} gave an earlier step's output; a "
            "cache must be turned off while attention is recorded, e.g. pipe.transformer.disable_cache()"
        )
    processor = type(getattr(module, "processor", None)).__name__
    return (
        f"attention at {site!r} ran, but its kernel could not be observed: processor {processor} calls neither "
        "scaled_dot_product_attention nor get_attention_scores nor diffusers' attention dispatcher (xformers processors do "
        "so); choose a standard processor, e.g. pipe.unet.set_default_attn_processor(), or leave this site out of the capture"
    )
