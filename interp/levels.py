"""A scheduler that visits chosen noise levels of given pictures, whatever the model predicts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from interp.errors import InterpError


class _Levels:
    """What a scheduler becomes for a while: its steps lead from one noise level of given pictures to the next."""

    order = 1
    init_noise_sigma = 1.0
    state_in_first_order = True
    pair: tuple[torch.Tensor, torch.Tensor]
    timeline: Any
    levels: tuple[float, ...]
    whole: bool
    sigma_of: Any

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, timesteps: Any = None, **_: Any
    ) -> None:
        """Visit the chosen levels, whatever was asked for (pipelines look whether they may ask for `sigmas`)."""
        dtype = torch.int64 if self.whole else torch.float32
        self.num_inference_steps = len(self.levels)
        self.timesteps = torch.tensor(self.levels, dtype=torch.float64).to(dtype=dtype, device=device)
        self.sigmas = torch.tensor([*(self.sigma_of(t) for t in self.levels), 0.0], dtype=torch.float64)
        self._at = 0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Latents are kept as the model reads them."""
        return sample

    def noised(self, level: int) -> torch.Tensor:
        """The pictures at one level; after the last one as they are."""
        clean, noise = self.pair
        if level == len(self.levels):
            return clean
        return float(self.timeline.data_scale[level]) * clean + float(self.timeline.noise_scale[level]) * noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *_: Any,
        return_dict: bool = True,
        **__: Any,
    ) -> Any:
        """Go to the next level, whatever was predicted."""
        self._at += 1
        following = self.noised(self._at).to(sample)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)


@contextmanager
def noise_levels(pipe: Any, timestep: float | Sequence[float]) -> Iterator[tuple[float, ...]]:
    """Lend the pipeline a scheduler that visits these timesteps."""
    own = pipe.scheduler
    levels = _checked_levels(own, timestep)
    cls = type(own)
    lent_class: Any = type(cls.__name__, (_Levels, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    lent = lent_class.from_config(own.config)
    lent.levels = levels
    lent.whole = all(t == int(t) for t in levels) and not own.timesteps.is_floating_point()
    lent.sigma_of = _sigma_of(own)
    lent.set_timesteps()
    pipe.scheduler = lent
    try:
        yield levels
    finally:
        pipe.scheduler = own


def _checked_levels(scheduler: Any, timestep: Any) -> tuple[float, ...]:
    given = np.atleast_1d(np.asarray(timestep, "float64"))
    last = int(scheduler.config.get("num_train_timesteps", 1000))
    wrong = [float(t) for t in given if not 0 <= t <= last - (getattr(scheduler, "alphas_cumprod", None) is not None)]
    if wrong or not given.size:
        raise InterpError(
            f"timestep={timestep!r}: give one or more timesteps of the schedule, which reach from 0 (clean) to {last} (noise)"
        )
    return tuple(sorted({float(t) for t in given}, reverse=True))


def _sigma_of(scheduler: Any) -> Any:
    """Return timestep → σ: of flow its share of noise, else √((1−ᾱ)/ᾱ)."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or "flow" in str(scheduler.config.get("prediction_type", "")):
        last = float(scheduler.config.get("num_train_timesteps", 1000))
        return lambda t: t / last
    alphas = table.detach().cpu().double().numpy()

    def sigma(t: float) -> float:
        alpha = float(np.interp(t, np.arange(len(alphas)), alphas))
        return float(np.sqrt((1 - alpha) / alpha))

    return sigma
