"""What a pipeline and the process look like before and after: nothing may be left behind."""

from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.models.attention_processor import Attention

_HOOKS = [name for name in torch.nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name]
_GLOBALS = {"sdpa": F.scaled_dot_product_attention, "get_attention_scores": Attention.get_attention_scores}


def _schedulers(cls: type = SchedulerMixin) -> list[type]:
    return [cls, *(s for sub in cls.__subclasses__() for s in _schedulers(sub))]


def fingerprint(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline and the process that recording could have left changed, by identity."""
    facts: dict[str, Any] = {
        "sdpa": F.scaled_dot_product_attention,
        "get_attention_scores": Attention.get_attention_scores,
        "pipe class": type(pipe),
        "pipe call": type(pipe).__call__,
        "scheduler": pipe.scheduler,
        "progress": dict(getattr(pipe, "_progress_bar_config", {})),
    }
    for cls in _schedulers():
        facts[f"class {cls.__name__} {id(cls)} step"] = (cls.__dict__.get("step"), cls.__dict__.get("set_timesteps"))
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                own = module.__dict__
                facts[f"{name}.{path} class"] = type(module)
                facts[f"{name}.{path} own"] = sorted(k for k in own if not k.startswith("_"))
                facts[f"{name}.{path} forward"] = own.get("forward")
                facts[f"{name}.{path} processor"] = own.get("processor", own["_modules"].get("processor"))
                facts[f"{name}.{path} hooks"] = {h: list(there) for h in _HOOKS if (there := own.get(h))}
    return facts


@contextmanager
def untouched(pipe: Any):
    """Check that the block leaves the pipeline and the process as they were, also when it raises."""
    assert F.scaled_dot_product_attention is _GLOBALS["sdpa"]
    pipe("a", num_inference_steps=1, output_type="latent")  # transformers adds hooks of its own at the first call
    before = fingerprint(pipe)
    try:
        yield
    finally:
        after = fingerprint(pipe)
        # a scheduler's subclass that came or went meanwhile leaves the others alone
        keys = [k for k in {**before, **after} if (k in before and k in after) or not k.startswith("class ")]
        changed = [k for k in keys if before.get(k) != after.get(k)]
        assert not changed, f"left behind: {changed[:5]}"
        assert F.scaled_dot_product_attention is _GLOBALS["sdpa"]
        assert Attention.get_attention_scores is _GLOBALS["get_attention_scores"]
