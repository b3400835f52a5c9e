"""One pipeline under test: how it is made and called, and what a plain, unwatched call of it gives."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from interp.capture import Capture
from interp.families import Family, find_family
from interp.overriding import own_class
from interp.recording import record
from interp.stores import Run

EVERYTHING = Capture(
    attention="all", heads="all", tokens="all", branches=("cond", "uncond"), text=True, image=False, dtype="float32"
)
BARE = Capture(attention=None, image=False)
ATTENTION_NODES = ("attention", "self_attention", "text_attention", "within_text_attention")


@dataclass(frozen=True)
class StepSeen:
    """What `scheduler.step` was called with, and gave."""

    timestep: float
    model_output: torch.Tensor
    sample: torch.Tensor


@dataclass(frozen=True)
class Recorded:
    """A recorded call: the latents that it returned, its run, and the steps that a spy at the scheduler saw."""

    latents: torch.Tensor
    run: Run
    steps: list[StepSeen]


@dataclass
class FamilyCase:
    """A pipeline and the calls that are made of it.

    make: builds the pipeline, small and with random weights. guided, unguided: arguments of its call that switch
    guidance on and off; `guided=None` for a pipeline that has none. options: further arguments of every call;
    for_each: those of which each of the two prompts has one. size: (height, width) in pixels, not square.
    """

    make: Callable[[], Any]
    guided: Mapping[str, Any] | None
    unguided: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    for_each: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    size: tuple[int, int] = (32, 48)
    steps: int = 3
    prompts: tuple[str, str] = ("a red circle", "a dog on the blue square background")
    negative: str = "a green cat"
    tolerance: float = 1e-5
    _plain: dict[bool, torch.Tensor] = field(default_factory=dict)
    _recorded: dict[bool, Recorded] = field(default_factory=dict)

    @cached_property
    def pipe(self) -> Any:
        """The pipeline, in float32; called once, since transformers puts hooks of its own at a model's first call."""
        pipe = self.make()
        self.call(pipe, guided=False, num_inference_steps=2)
        return pipe

    @cached_property
    def family(self) -> Family:
        """Its family, found as for any user."""
        return find_family(self.pipe)

    @property
    def modes(self) -> list[bool]:
        """With guidance and without, as far as there is any."""
        return [False] if self.guided is None else [True, False]

    @property
    def everything(self) -> Capture:
        """All that the family can give."""
        knows = bool(self.family.attention_sites()), bool(self.family.text_segments(self.arguments()))
        return EVERYTHING.changed(attention="all" if knows[0] else None, text=knows[1])

    # Calls

    def takes(self, argument: str) -> bool:
        """Whether the pipeline's call has an argument."""
        return argument in inspect.signature(own_class(self.pipe).__call__).parameters

    def settings(self, guided: bool = True) -> dict[str, Any]:
        """Arguments that switch guidance on, with negative prompts, or off."""
        if guided and self.guided is not None:
            return {**self.negatives(2), **self.options, **self.guided}
        return {**self.options, **self.unguided}

    def negatives(self, count: int) -> dict[str, Any]:
        """The argument that gives so many negative prompts, if there is guidance, and the pipeline takes them."""
        takes = self.guided is not None and self.family.takes_negative
        return {"negative_prompt": [self.negative] * count} if takes else {}

    def samples(self, *which: int, guided: bool = True) -> dict[str, Any]:
        """Arguments of a call for these of the two prompts, each with what belongs to it; a prompt may come again."""
        given = {name: [values[i] for i in which] for name, values in self.for_each.items()}
        return {"prompt": [self.prompts[i] for i in which], **given, **(self.negatives(len(which)) if guided else {})}

    def call(self, pipe: Any | None = None, *, guided: bool = True, **more: Any) -> torch.Tensor:
        """Call the pipeline as a user does; return what it gives for `output_type="latent"`."""
        given = {
            **self.samples(0, 1, guided=False), "num_inference_steps": self.steps, "height": self.size[0],
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
        return self.family.arguments({**given, **self.samples(0, 1, guided=False), **self.settings(guided)})

    def plain(self, guided: bool = True) -> torch.Tensor:
        """What an unwatched call gives; called once."""
        if guided not in self._plain:
            self._plain[guided] = self.call(guided=guided)
        return self._plain[guided]

    def recorded(self, guided: bool = True) -> Recorded:
        """The same call, recorded with everything that can be; called once, by the first check that asks."""
        if guided not in self._recorded:
            with self.spied() as seen, record(self.pipe, capture=self.everything) as recording:
                latents = self.call(guided=guided)
            self._recorded[guided] = Recorded(latents, recording.run, seen)
        return self._recorded[guided]

    # What is lent to the pipeline

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
    def copied(self) -> Iterator[torch.nn.Module]:
        """Lend the pipeline a copy of its denoiser, which may be changed; what the plain one gives is known before."""
        self.plain(self.modes[0])
        root = self.family.root
        own = getattr(self.pipe, root)
        setattr(self.pipe, root, deepcopy(own))
        try:
            yield getattr(self.pipe, root)
        finally:
            setattr(self.pipe, root, own)


@contextmanager
def scheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Lend a pipeline another scheduler."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = own


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float, message: str) -> None:
    """Compare two arrays: the largest difference, as a part of the largest magnitude in the array that is expected."""
    assert got.shape == want.shape, f"{message}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want = got.float(), want.float()
    off = float((got - want).abs().max() / want.abs().max().clamp(min=torch.finfo(want.dtype).tiny))
    assert off <= tolerance, f"{message}: off by {off:.2g} relative"


def alike(one: Run, other: Run, tolerance: float) -> None:
    """Compare two runs array by array, as `close` does: latents, predictions, and every grid's attention; gaps are equal."""
    for name in ("latents", "noise_pred", "final_latents"):
        _same(getattr(one, name).values, getattr(other, name).values, tolerance, name)
    for group in ATTENTION_NODES:
        for grid in one.tree[group].children if group in one.tree.children else ():
            a, b = (run.tree[f"{group}/{grid}"].to_dataset() for run in (one, other))
            _same(a["probs"].values, b["probs"].values, tolerance, f"{group} {grid}")
            if "token_text" in a:
                assert np.array_equal(a["token_text"].values, b["token_text"].values), f"{group} {grid}: other tokens"


def _same(one: Any, other: Any, tolerance: float, name: str) -> None:
    a, b = torch.from_numpy(one), torch.from_numpy(other)
    assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)} instead of {tuple(b.shape)}"
    assert torch.equal(a.isnan(), b.isnan()), f"{name}: gaps"
    close(a.nan_to_num(), b.nan_to_num(), tolerance, f"{name} differ")
