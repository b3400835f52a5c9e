"""The step clock: which sampling step is being computed, at which noise level.

Denoiser calls are not steps (Heun evaluates twice, sequential guidance too), so the scheduler's `step` is what
counts. It is wrapped on the scheduler's *class* with an identity check, because a copied scheduler would call an
instance patch's closure on the original; `set_timesteps` restarts the clock, because one context may see several
pipeline calls.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch

from interp.errors import InterpError


@dataclass(frozen=True)
class Timeline:
    """The noise levels of a run, one entry a step: `x_t = data_scale·x_0 + noise_scale·ε` in stored units."""

    timestep: np.ndarray
    sigma: np.ndarray
    alpha_bar: np.ndarray
    data_scale: np.ndarray
    noise_scale: np.ndarray
    evaluations: np.ndarray | None = None
    """How often each step evaluates the model; None is once (Heun and the like take two, but for the last step)."""

    def __len__(self) -> int:
        return len(self.timestep)

    def after(self, steps: int) -> "Timeline":
        """Return the noise levels without the first `steps`."""
        levels = (self.timestep, self.sigma, self.alpha_bar, self.data_scale, self.noise_scale)
        timestep, sigma, alpha_bar, data_scale, noise_scale = (level[steps:] for level in levels)
        counts = None if self.evaluations is None else self.evaluations[steps:]
        return Timeline(timestep, sigma, alpha_bar, data_scale, noise_scale, counts)

    def count(self, step: int) -> int:
        """Return how often a step evaluates the model."""
        return 1 if self.evaluations is None else int(self.evaluations[step])


@dataclass(frozen=True, kw_only=True)
class StepStart:
    """What `scheduler.step` is about to read: latents (rows, channel, y, x) and the guided model output."""

    step: int
    time: torch.Tensor | float
    """The timestep as the pipeline gives it, on any device."""
    latents: torch.Tensor
    model_output: torch.Tensor
    evaluation: int

    @property
    def timestep(self) -> float:
        """The timestep as a number, for which a GPU has to be waited for."""
        return float(self.time)


@dataclass(frozen=True, kw_only=True)
class StepEnd(StepStart):
    """What `scheduler.step` has read, and the latents (rows, channel, y, x) that it gave."""

    next_latents: torch.Tensor


def is_first_evaluation(scheduler: Any) -> bool:
    """Tell whether the scheduler's next `step` opens a sampling step (second-order ones take two calls a step)."""
    return bool(getattr(scheduler, "state_in_first_order", True))


def is_flow(scheduler: Any) -> bool:
    """Tell whether the model predicts a flow, x_t = (1 − t)·x_0 + t·ε."""
    return "flow" in str(scheduler.config.get("prediction_type", "")) or "FlowMatch" in type(scheduler).__name__


def timeline(scheduler: Any, steps: int, device: Any = "cpu", schedule: Mapping[str, Any] | None = None) -> Timeline:
    """Return the noise levels that `steps` sampling steps would visit; the scheduler itself is not touched.

    A step is what the scheduler counts as one: PNDM, which calls the model more often than asked, has that many.
    `schedule` is what the pipeline passes to `set_timesteps` beside the number of steps (`Family.schedule`).

    Raises:
        InterpError: the scheduler cannot make so many steps, or its noise levels are unknown.
    """
    copy = deepcopy(scheduler)
    try:
        if schedule and schedule.keys() & {
            "sigmas",
            "timesteps",
        }:  # then the number of steps is their number, and not given
            copy.set_timesteps(device=device, **schedule)
        else:
            copy.set_timesteps(steps, device=device, **(schedule or {}))
    except ValueError as error:
        raise InterpError(
            f"{type(scheduler).__name__} cannot make {steps} steps: {' '.join(str(error).split())}"
        ) from error
    flow = is_flow(copy)
    if getattr(copy, "alphas_cumprod", None) is None and not flow:
        raise InterpError(
            f"the noise levels of {type(copy).__name__} are unknown here; use DDIM, Euler, DPM-Solver++ or Heun"
        )
    times = copy.timesteps.detach().cpu().double().numpy()
    order, counts = getattr(copy, "order", 1), None
    if order > 1:  # t0 t1 t1 t2 t2 …: the first evaluations are at 0, 2, 4 …
        total, times = len(times), times[::order]
        counts = np.minimum(order, total - order * np.arange(len(times)))
    sigmas = getattr(copy, "sigmas", None)
    if flow:
        assert sigmas is not None
        sigma = np.asarray(sigmas.detach().cpu().double())[:-1][:: max(order, 1)][: len(times)]
        return Timeline(times, sigma, (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2), 1 - sigma, sigma, counts)
    table = copy.alphas_cumprod.detach().cpu().double().numpy()
    alpha_bar = np.interp(times, np.arange(len(table)), table)
    sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
    if getattr(copy, "sigmas", None) is not None:  # exact, where timesteps may be rounded
        sigma = np.asarray(copy.sigmas.detach().cpu().double())[:-1][:: max(order, 1)][: len(times)]
        alpha_bar = 1 / (1 + sigma**2)
        if _variance_exploding(copy):
            return Timeline(times, sigma, alpha_bar, np.ones_like(sigma), sigma, counts)
    return Timeline(times, sigma, alpha_bar, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), counts)


def _variance_exploding(scheduler: Any) -> bool:
    """Euler-like schedulers keep latents as x_0 + σ·ε and scale the model's input; others keep √ᾱ·x_0 + √(1−ᾱ)·ε."""
    probe = torch.ones(1, 1, 1, 1)
    scheduler.is_scale_input_called = False
    scaled = scheduler.scale_model_input(probe, scheduler.timesteps[0].cpu())
    return bool((scaled - 1).abs().max() > 1e-6)


class Clock:
    """Follow one pipeline's scheduler while active.

    `step` counts from 0 = first (noisiest); `evaluation` is 0 at the first denoiser evaluation of a step.
    """

    def __init__(
        self,
        scheduler: Any,
        before_step: Callable[[StepStart], None],
        on_step: Callable[[StepEnd], None],
        next_latents: Callable[[Any], torch.Tensor],
    ) -> None:
        self.before_step, self.on_step, self.next_latents = before_step, on_step, next_latents
        self.step = self.evaluation = self._calls = 0
        self._times: list[float] = []
        self._undo: list[Callable[[], None]] = []
        self.attach(scheduler)

    def attach(self, scheduler: Any) -> None:
        """Follow this scheduler from now on (a user may swap `pipe.scheduler` within the context)."""
        self.close()
        self.restart()
        self.scheduler = scheduler
        cls = type(scheduler)
        step, set_timesteps = cls.step, cls.set_timesteps

        @wraps(step)  # pipelines look at its signature: does it take a generator, or eta?
        def observed_step(this: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not scheduler:
                return step(this, model_output, timestep, sample, *args, **kwargs)
            start = StepStart(
                step=self.step,
                time=timestep,
                latents=sample.clone(),  # some schedulers work in place
                model_output=model_output,
                evaluation=self.evaluation,
            )
            self.before_step(start)  # first: many schedulers wait for the device, and work given before that is hidden
            out = step(this, model_output, timestep, sample, *args, **kwargs)
            self._calls += 1
            self.on_step(StepEnd(**vars(start), next_latents=self.next_latents(out)))
            if is_first_evaluation(this):
                self.step, self.evaluation = self.step + 1, 0
            else:
                self.evaluation += 1
            return out

        @wraps(set_timesteps)
        def observed_set(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is scheduler:
                self.restart()
            return set_timesteps(this, *args, **kwargs)

        own = {name: cls.__dict__.get(name) for name in ("step", "set_timesteps")}
        cls.step, cls.set_timesteps = observed_step, observed_set

        def restore() -> None:
            for name, function in own.items():
                if function is None:  # inherited: ours shadowed it
                    delattr(cls, name)
                else:
                    setattr(cls, name, function)

        self._undo.append(restore)

    def restart(self) -> None:
        """Begin a new run at step 0."""
        self.step = self.evaluation = self._calls = 0
        self._times = []

    @property
    def timestep(self) -> float:
        """The scheduler's timestep of the evaluation in progress, for models that are given a changed one."""
        self._times = self._times or [float(t) for t in self.scheduler.timesteps.detach().cpu()]
        at = (getattr(self.scheduler, "begin_index", None) or 0) + self._calls
        return self._times[at] if at < len(self._times) else float("nan")

    def close(self) -> None:
        """Undo everything."""
        while self._undo:
            self._undo.pop()()
