"""The loop that every phase of training shares: schedule, averaged weights, checkpoints without pickle, time box."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Plan:
    """How one phase runs. `seconds` ends this call early, with a checkpoint from which the next one goes on."""

    name: str
    out: Path
    steps: int
    batch: int
    rate: float
    decay: float = 0.01
    cooldown: float = 0.3  # the share of the steps, at the end, over which the rate falls to nothing
    average: float = 0.999  # of the averaged weights; 0 keeps none
    seconds: float = float("inf")
    budget: float = float("inf")  # of seconds in all calls together: the schedule ends here if the steps do not
    seed: int = 0
    workers: int = 0
    plain: float = 0.5  # the share of captions that are short and plain
    negatives: bool = True  # whether CLIP also sees captions that are wrong in one thing
    device: str = "cpu"
    compiled: bool = False

    @property
    def checkpoint(self) -> Path:
        """The file from which this phase resumes."""
        return self.out / f"{self.name}.checkpoint.safetensors"


def rate(step: int, spent: float, plan: Plan) -> float:
    """Return the learning rate: a short warm-up, level, then down to nothing over the cooldown.

    >>> p = Plan("x", Path(), steps=100, batch=1, rate=1.0, cooldown=0.5)
    >>> [round(rate(s, 0.0, p), 2) for s in (0, 40, 75, 99)]
    [0.5, 1.0, 0.5, 0.02]
    """
    warm = min(1.0, (step + 1) / max(1, min(200, 0.02 * plan.steps)))
    return plan.rate * warm * min(1.0, (1 - progress(step, spent, plan)) / plan.cooldown)


def progress(step: int, spent: float, plan: Plan) -> float:
    """Return how much of the plan is done, from 0 to 1: by steps, or by seconds where they run out first."""
    return min(1.0, max(step / plan.steps, spent / plan.budget))


class Course:
    """One phase: a model on its way from `step` to the plan's end, resumable at any checkpoint."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.step, self.spent = 0, 0.0
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averaged = {name: p.detach().clone() for name, p in self.weights.items()} if plan.average else {}
        self.optimizer = torch.optim.AdamW(
            list(self.weights.values()),
            lr=plan.rate,
            weight_decay=plan.decay,
            betas=(0.9, 0.99),
            fused=plan.device == "cuda",
        )
        if plan.checkpoint.exists():
            self._restore()

    @property
    def finished(self) -> bool:
        """Whether the plan's last step is done."""
        return progress(self.step, self.spent, self.plan) >= 1

    def run(self, loss_of: Callable[[int], Tensor]) -> None:
        """Train until the plan's steps or seconds are spent, then leave a checkpoint."""
        plan, called, before = self.plan, time.monotonic(), self.spent
        started = None  # the clock of the schedule starts after the first step, which compiles
        shown = tqdm(
            initial=self.step, total=plan.steps, desc=plan.name, mininterval=0.5 if sys.stderr.isatty() else 20
        )
        while not self.finished and time.monotonic() - called < plan.seconds:
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.step, self.spent, plan)
            loss = loss_of(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            self.optimizer.step()
            self.step += 1
            self._average()
            started = started or time.monotonic()
            self.spent = before + time.monotonic() - started
            shown.update()
            if self.step % 50 == 0:
                shown.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm.item():.2f}", refresh=False)
        shown.close()
        self.save()

    def _average(self) -> None:
        if self.averaged:
            keep = min(self.plan.average, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.values()), list(self.weights.values()), 1 - keep)

    def average_into(self, model: nn.Module) -> None:
        """Give `model` the averaged weights (or the last ones, where none are kept)."""
        with torch.no_grad():
            for name, value in (self.averaged or self.weights).items():
                model.get_parameter(name).copy_(value)

    def save(self) -> None:
        """Write the checkpoint: weights, averages and the optimizer's moments as safetensors."""
        tensors = {f"weight/{name}": p.detach() for name, p in self.weights.items()}
        tensors |= {f"average/{name}": value for name, value in self.averaged.items()}
        for name, p in self.weights.items():
            state = self.optimizer.state.get(p, {})
            tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        about = {"step": str(self.step), "spent": json.dumps(self.spent)}
        self.plan.out.mkdir(parents=True, exist_ok=True)
        fresh = self.plan.checkpoint.with_suffix(".new")
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, fresh, metadata=about)
        fresh.replace(self.plan.checkpoint)

    def _restore(self) -> None:
        with safe_open(self.plan.checkpoint, "pt", device=self.plan.device) as file:
            about, names = file.metadata(), set(file.keys())
            self.step, self.spent = int(about["step"]), json.loads(about["spent"])
            with torch.no_grad():
                for name, p in self.weights.items():
                    p.copy_(file.get_tensor(f"weight/{name}"))
                    if self.averaged:
                        self.averaged[name].copy_(file.get_tensor(f"average/{name}"))
                    if f"exp_avg/{name}" in names:
                        state: dict[str, Tensor] = {"step": torch.tensor(float(self.step), device=p.device)}
                        for key in ("exp_avg", "exp_avg_sq"):
                            # The fused optimizer wants the weights' own memory layout.
                            state[key] = torch.empty_like(p).copy_(file.get_tensor(f"{key}/{name}"))
                        self.optimizer.state[p] = state


class Pool:
    """Latents and captions of many scenes, the oldest overwritten: each is trained on a few times, never stored."""

    def __init__(self, size: int) -> None:
        self.size, self.at, self.filled = size, 0, 0
        self.kept: dict[str, Tensor] = {}

    def add(self, **items: Tensor) -> None:
        """Put a batch in, in the place of the oldest."""
        n = len(next(iter(items.values())))
        if not self.kept:
            self.kept = {
                k: torch.empty(self.size, *v.shape[1:], dtype=v.dtype, device=v.device) for k, v in items.items()
            }
        for name, value in items.items():
            self.kept[name][self.at : self.at + n] = value
        self.at, self.filled = (self.at + n) % self.size, max(self.filled, self.at + n)

    def draw(self, n: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Return `n` random entries of each kind, in the order in which the kinds were given."""
        device = next(iter(self.kept.values())).device
        index = torch.randint(self.filled, (n,), generator=generator, device=device)
        return (value[index] for value in self.kept.values())
