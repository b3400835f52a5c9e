"""One pipeline under test: how it is made and called, and what a plain, unwatched call of it gives."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention

from interp.families import Family, find_family

_HOOKS = [name for name in torch.nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name]


@dataclass(frozen=True)
class StepSeen:
    """What `scheduler.step` was called with, and gave."""

    timestep: float
    model_output: torch.Tensor
    sample: torch.Tensor


@dataclass
class FamilyCase:
    """A pipeline and the calls that are made of it.

    make: builds the pipeline, small and with random weights. guided, unguided: arguments of its call that switch
    guidance on and off; `guided=None` for a pipeline that has none. options: further arguments of every call. size:
    (height, width) in pixels, not square.
    """

    make: Callable[[], Any]
    guided: Mapping[str, Any] | None
    unguided: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (32, 48)
    steps: int = 3
    prompts: tuple[str, str] = ("a red circle", "a dog on the blue square background")
    negative: str = "a green cat"
    tolerance: float = 1e-5

    @cached_property
    def pipe(self) -> Any:
        """The pipeline, in float32; called once, since transformers puts hooks of its own at a model's first call."""
        pipe = self.make()
        self.call(pipe, guided=False)
        return pipe

    @cached_property
    def family(self) -> Family:
        """Its family, found as for any user."""
        return find_family(self.pipe)

    def settings(self, guided: bool = True) -> dict[str, Any]:
        """Arguments that switch guidance on, with negative prompts, or off."""
        if guided and self.guided is not None:
            return {**self.negatives(2), **self.options, **self.guided}
        return {**self.options, **self.unguided}

    def negatives(self, count: int) -> dict[str, Any]:
        """The argument that gives so many negative prompts, if there is guidance, and the pipeline takes them."""
        takes = self.guided is not None and self.family.takes_negative
        return {"negative_prompt": [self.negative] * count} if takes else {}

    def call(self, pipe: Any | None = None, *, guided: bool = True, **more: Any) -> torch.Tensor:
        """Call the pipeline as a user does; return what it gives for `output_type="latent"`."""
        given = {
            "prompt": list(self.prompts), "num_inference_steps": self.steps, "height": self.size[0],
            "width": self.size[1], "output_type": "latent", **self.settings(guided), **more,
        }  # fmt: skip
        given = {k: list(v) if isinstance(v, list) else v for k, v in given.items()}  # Z-Image writes into the prompts
        count = len(given["prompt"]) * int(given.get("num_images_per_prompt", 1))
        given.setdefault("generator", [torch.Generator().manual_seed(i) for i in range(count)])
        out = (pipe or self.pipe)(**given)
        return out[0] if isinstance(out, tuple) else out.images

    def arguments(self, guided: bool = True) -> dict[str, Any]:
        """The arguments of that call, defaults filled in."""
        given = {"num_inference_steps": self.steps, "height": self.size[0], "width": self.size[1]}
        return self.family.arguments({**given, **self.settings(guided)})

    @contextmanager
    def spied(self, pipe: Any | None = None) -> Iterator[list[StepSeen]]:
        """Note every `scheduler.step` by a scheduler of a subclass, without anything of this package."""
        pipe = pipe or self.pipe
        own, seen = pipe.scheduler, []

        class Spy(type(own)):  # type: ignore[misc]
            def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append(StepSeen(float(timestep), model_output.clone(), sample.clone()))
                return super().step(model_output, timestep, sample, *args, **kwargs)

        Spy.step.__signature__ = inspect.signature(type(own).step)  # type: ignore[attr-defined]
        Spy.__name__ = type(own).__name__
        pipe.scheduler = Spy.from_config(own.config)
        try:
            yield seen
        finally:
            pipe.scheduler = own

    def scheduled(self, scheduler: Any) -> AbstractContextManager[None]:
        """Lend the pipeline another scheduler."""
        return scheduled(self.pipe, scheduler)


@contextmanager
def scheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Lend a pipeline another scheduler."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = own


def fingerprint(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline and the process that watching it could have left changed, by identity."""
    scheduler = type(pipe.scheduler)
    facts: dict[str, Any] = {
        "scaled_dot_product_attention": F.scaled_dot_product_attention,
        "get_attention_scores": Attention.get_attention_scores,
        "attention backends": dict(_AttentionBackendRegistry._backends),
        "pipeline class": type(pipe),
        "scheduler": (pipe.scheduler, scheduler.step, scheduler.set_timesteps),
    }
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                own = {k: v for k, v in vars(module).items() if k == "forward" or not k.startswith("_")}
                facts[f"{name}.{path}"] = (
                    type(module), sorted(own), own.get("forward"), getattr(module, "processor", None),
                    {h: list(getattr(module, h, ())) for h in _HOOKS},
                )  # fmt: skip
    return facts


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


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float, message: str) -> None:
    """Compare relative to the largest value."""
    assert got.shape == want.shape, f"{message}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    off = float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1))
    assert off <= tolerance, f"{message}: off by {off:.2g} relative"
