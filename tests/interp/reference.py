"""Independent references: an explicit sampling loop, and attention probabilities by eager arithmetic in float64.

Nothing here uses the code under test.
"""

from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from einops import rearrange

from tests.families.pipelines import tiny

STEPS = 4
SCALE = 5.0


@contextmanager
def scheduler_of(pipe: Any, scheduler: Any):
    """Lend a pipeline another scheduler."""
    own = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield pipe
    finally:
        pipe.scheduler = own


@contextmanager
def in_dtype(pipe: Any, dtype: torch.dtype):
    """Lend a pipeline another dtype; float32 weights come back exactly."""
    kept = {n: deepcopy(p.state_dict()) for n, p in pipe.components.items() if isinstance(p, torch.nn.Module)}
    pipe.to(dtype=dtype)
    try:
        yield pipe
    finally:
        pipe.to(dtype=torch.float32)
        for name, state in kept.items():
            getattr(pipe, name).load_state_dict(state)


def noise(pipe: Any, seeds: list[int], height: int = 16, width: int = 16) -> torch.Tensor:
    """The noise of each seed, drawn one by one: (sample, channel, y, x)."""
    f = pipe.vae_scale_factor
    return torch.cat([
        torch.randn(1, 4, height // f, width // f, generator=torch.Generator().manual_seed(s)) for s in seeds
    ])  # fmt: skip


@torch.no_grad()
def states(pipe: Any, prompts: list[str]) -> torch.Tensor:
    """Text states of SD 1 and 2, straight from tokenizer and encoder: (sample, token, feature)."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return pipe.text_encoder(ids.input_ids)[0]


@dataclass
class Trajectory:
    """What an explicit sampling loop saw: latents (step, sample, …), eps branch → list, and the final latents."""

    latents: list[torch.Tensor]
    eps: dict[str, list[torch.Tensor]]
    final: torch.Tensor
    x0: list[torch.Tensor | None]


@torch.no_grad()
def sample(
    pipe: Any,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    seeds: list[int],
    steps: int = STEPS,
    scale: float = SCALE,
    keep: Callable[[int], tuple[str, ...]] = lambda i: ("uncond", "cond"),
    text: Callable[[int, torch.Tensor], torch.Tensor] = lambda i, c: c,
    added: dict[str, dict[str, torch.Tensor]] | None = None,
    size: tuple[int, int] = (16, 16),
) -> Trajectory:
    """Sample in plain torch. `keep(i)`: the branches evaluated at call i; `text(i, cond)`: the states read there."""
    scheduler = deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    f = pipe.vae_scale_factor
    x = torch.cat([torch.randn(1, 4, size[0] // f, size[1] // f, generator=g) for g in generators])
    x = x * scheduler.init_noise_sigma
    seen = Trajectory([], {"uncond": [], "cond": []}, x, [])
    takes = "generator" in scheduler.step.__code__.co_varnames
    for i, t in enumerate(scheduler.timesteps):
        kept = ("cond",) if uncond is None else keep(i)
        branch = {"uncond": uncond, "cond": text(i, cond)}
        rows = scheduler.scale_model_input(torch.cat([x] * len(kept)), t)
        more: dict[str, Any] = {}
        if added is not None:
            names = added["cond"]
            more["added_cond_kwargs"] = {n: torch.cat([added[b][n] for b in kept]) for n in names}
        out = pipe.unet(rows, t, encoder_hidden_states=torch.cat([branch[b] for b in kept]), **more).sample
        eps = dict(zip(kept, out.chunk(len(kept)), strict=True))
        seen.latents.append(x)
        for name in ("uncond", "cond"):
            seen.eps[name].append(eps.get(name, torch.full_like(x, torch.nan)))
        if len(kept) == 2:
            guided = eps["uncond"] + scale * (eps["cond"] - eps["uncond"])
        else:
            guided = eps[kept[0]]
        result = scheduler.step(guided, t, x, **({"generator": generators} if takes else {}))
        x = result.prev_sample
        seen.x0.append(getattr(result, "pred_original_sample", None))
    seen.final = x
    return seen


class Eager:
    """Attention probabilities of every attention module, from hooks on its projections: site → one array a call."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.probs: dict[str, list[np.ndarray]] = {}
        self._inputs: dict[str, torch.Tensor] = {}
        self._undo = []
        for name, module in unet.named_modules():
            if isinstance(module, Attention) and ".transformer_blocks." in name:
                site = f"unet.{name}"
                self._undo += [
                    module.to_q.register_forward_hook(self._keep(f"{site} q")),
                    module.to_k.register_forward_hook(self._keep(f"{site} k")),
                    module.register_forward_hook(self._form(site, module.heads)),
                ]

    def _keep(self, name: str):
        return lambda _, args, out: self._inputs.__setitem__(name, out.detach().double())

    def _form(self, site: str, heads: int):
        def form(*_: Any) -> None:
            q = rearrange(self._inputs[f"{site} q"], "b q (h d) -> b h q d", h=heads)
            k = rearrange(self._inputs[f"{site} k"], "b k (h d) -> b h k d", h=heads)
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
            p = torch.exp(scores - scores.amax(-1, keepdim=True))
            self.probs.setdefault(site, []).append((p / p.sum(-1, keepdim=True)).numpy())

        return form

    def __enter__(self) -> "Eager":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._undo:
            handle.remove()


__all__ = ["SCALE", "STEPS", "Eager", "Trajectory", "in_dtype", "noise", "sample", "scheduler_of", "states", "tiny"]
