"""What watching a pipeline could have left behind, in it and in the process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention

_HOOKS = [name for name in torch.nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name]


def fingerprint(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline and the process that watching it could have left changed, by identity."""
    scheduler = type(pipe.scheduler)
    facts: dict[str, Any] = {
        "scaled_dot_product_attention": F.scaled_dot_product_attention,
        "get_attention_scores": Attention.get_attention_scores,
        "attention backends": dict(_AttentionBackendRegistry._backends),
        "compiler's stance": _stance(),
        "pipeline class": type(pipe),
        "scheduler": (pipe.scheduler, scheduler.step, scheduler.set_timesteps),
    }
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                own = vars(module)  # not getattr: what is not there takes a module long to say
                facts[f"{name}.{path}"] = (
                    type(module), sorted(k for k in own if k[0] != "_"), own.get("forward"),
                    own.get("processor", own["_modules"].get("processor")),
                    {h: list(there) for h in _HOOKS if (there := own.get(h))},
                )  # fmt: skip
    return facts


def _stance() -> str:
    """What the compiler is told to do; nothing else, as long as nobody has asked for it."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return "default" if frames is None else str(frames._stance.stance)


@contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """Check that the block leaves the pipeline and the process as they were, also when it raises."""
    before = fingerprint(pipe)
    try:
        yield
    finally:
        after = fingerprint(pipe)
        changed = [k for k in {**before, **after} if before.get(k) != after.get(k)]
        assert not changed, f"left behind: {changed[:5]}"
