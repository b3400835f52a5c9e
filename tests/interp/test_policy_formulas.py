"""Branch policies on every layout of guidance, against the formula itself put between denoiser and scheduler.

The reference runs the pipeline as it is. A plain torch hook keeps what the denoiser gave, u and c, and `scheduler.step`
is handed what a formula makes of them, whatever the pipeline had combined. Where both branches are evaluated the
arithmetic is the same, and the difference is 0; where rows leave the batch the kernels see fewer rows, which rounds
otherwise: then it is at most 1e-5 of the largest value.
"""

from contextlib import contextmanager
from functools import wraps

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from einops import rearrange

import interp
from tests.interp.reference import SCALE, scheduler_of, tiny

STEPS, SEEDS = 4, [1, 2]
PROMPTS, NEGATIVES = ["a red circle", "a dog on the blue square"], ["a green cat", "a photo"]
BARE = interp.Capture(attention=None, image=False)
SHORT = {"max_sequence_length": 16}
OPTIONS = {
    "pixart_alpha": {"use_resolution_binning": False, **SHORT}, "sd3": SHORT, "flux": {**SHORT, "true_cfg_scale": SCALE},
}  # fmt: skip
HEUN = [0, 0, 1, 1, 2, 2, 3]
"""The step of each evaluation."""
CASES = {
    "sd1 DDIM": ("sd1", None, None),
    "sd1 Euler": ("sd1", EulerDiscreteScheduler, None),
    "sd1 DPM-Solver++": ("sd1", DPMSolverMultistepScheduler, None),
    "sd1 Heun": ("sd1", HeunDiscreteScheduler, HEUN),
    "sdxl Euler": ("sdxl", None, None),
    "pixart_alpha DPM-Solver++": ("pixart_alpha", None, None),
    "sd3 flow": ("sd3", None, None),
    "sd3 flow Heun": ("sd3", FlowMatchHeunDiscreteScheduler, HEUN),
    "flux flow": ("flux", None, None),
}
MORE = {
    "sdxl DDIM": ("sdxl", DDIMScheduler, None),
    "sdxl DPM-Solver++": ("sdxl", DPMSolverMultistepScheduler, None),
    "sdxl Heun": ("sdxl", HeunDiscreteScheduler, HEUN),
    "pixart_alpha DDIM": ("pixart_alpha", DDIMScheduler, None),
    "pixart_alpha Euler": ("pixart_alpha", EulerDiscreteScheduler, None),
    "pixart_alpha Heun": ("pixart_alpha", HeunDiscreteScheduler, HEUN),
}
"""The other pairs of model and scheduler; FLUX's pipeline gives noise levels, which flow-matching Heun does not take."""


def model(case):
    return (CASES | MORE)[case][0]


@contextmanager
def lent(case):
    """The pipeline of a case with its scheduler, and the step of each evaluation."""
    name, cls, steps = (CASES | MORE)[case]
    pipe = tiny(name)
    if cls is None:
        yield pipe, list(range(STEPS))
        return
    flow = {} if "Flow" in cls.__name__ else pipe.scheduler.config
    with scheduler_of(pipe, cls.from_config(flow)):
        yield pipe, steps or list(range(STEPS))


def traced(case, pipe, *changes):
    table = [{"prompt": p, "negative_prompt": n} for p, n in zip(PROMPTS, NEGATIVES, strict=True)]
    return interp.trace(
        pipe, table, seeds=[3], steps=STEPS, guidance_scale=SCALE, capture=BARE, batch_size=2, height=16, width=16,
        interventions=changes, progress=False, options=OPTIONS.get(model(case)),
    )  # fmt: skip


def reference(case, pipe, calls, formula):
    """Final latents if the scheduler gets formula(step, u, c, first): `first` at the first evaluation of a step."""
    denoiser, scheduler = getattr(pipe, "unet", None) or pipe.transformer, pipe.scheduler
    outputs, evaluation, own = [], iter(range(99)), scheduler.step

    def look(module, args, out):
        outputs.append((out[0] if isinstance(out, tuple) else out.sample).clone())

    @wraps(own)
    def step(model_output, *args, **kwargs):
        sequential = len(outputs) == 2  # FLUX.1 asks for the text first
        u, c = (outputs[1], outputs[0]) if sequential else outputs[0].chunk(2)
        outputs.clear()
        i = next(evaluation)
        width = model_output.shape[1]  # PixArt's denoiser gives a variance, too
        first = i == 0 or calls[i] != calls[i - 1]
        return own(formula(calls[i], u[:, :width], c[:, :width], first), *args, **kwargs)

    name = model(case)
    handle, scheduler.step = denoiser.register_forward_hook(look), step
    options = {"guidance_scale": SCALE, **OPTIONS.get(name, {})}
    try:
        latents = pipe(
            PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=STEPS, height=16, width=16, output_type="latent",
            generator=[torch.Generator().manual_seed(3) for _ in PROMPTS], **options,
        ).images  # fmt: skip
    finally:
        handle.remove()
        del scheduler.step
    if name == "flux":
        latents = rearrange(latents, "n (y x) (c p q) -> n c (y p) (x q)", y=4, p=2, q=2)
    return latents.numpy()


def close(run, want):
    return np.abs(run.final_latents.values - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("case", CASES)
def test_scales_are_the_formula(case):
    weight = {0: SCALE, 1: 2.0, 2: 3.0, 3: 4.0}
    with lent(case) as (pipe, calls):
        want = reference(case, pipe, calls, lambda i, u, c, first: u + weight[i] * (c - u))
        run = traced(case, pipe, interp.GuidanceScale((2.0, 4.0), start=1, unit="step"))
    assert np.array_equal(run.final_latents.values, want)
    assert run.trajectory.guidance_scale.values.tolist() == [list(weight.values())] * 2
    assert (run.nfe.values == len(calls)).all()


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_branches_removed_early_in_the_middle_and_late(case):
    """Text off in the first step, guidance off in the third, and another scale in between."""
    unit = {"unit": "step"}
    changes = [
        interp.RemoveText(stop=1, **unit), interp.GuidanceScale(3.0, start=1, stop=2, **unit),
        interp.RemoveGuidance(start=2, stop=3, **unit),
    ]  # fmt: skip
    formulas = [lambda u, c: u, lambda u, c: u + 3 * (c - u), lambda u, c: c, lambda u, c: u + SCALE * (c - u)]
    with lent(case) as (pipe, calls):
        want = reference(case, pipe, calls, lambda i, u, c, first: formulas[i](u, c))
        run = traced(case, pipe, *changes)
        plan = interp.plan(
            pipe, PROMPTS, steps=STEPS, guidance_scale=SCALE, capture=BARE, interventions=changes,
            options=OPTIONS.get(model(case)),
        )  # fmt: skip
    assert close(run, want)
    passes = [sum(i != off for i in calls) for off in (0, 2)]
    assert run.nfe.values.tolist() == [passes] * 2 and list(run.nfe.branch.values) == ["cond", "uncond"]
    assert plan.forward_passes == run.nfe.values.sum()
    assert run.trajectory.guidance_scale.values.tolist() == [[0, 3, 1, SCALE]] * 2


@pytest.mark.parametrize("case", CASES)
def test_adaptive_guidance_sample_by_sample(case):
    """One sample's branches agree better in the first step, and there it ends; the other goes on as long as it is below."""
    state = {"threshold": None, "ended": [None, None]}

    def formula(i, u, c, first):
        guided = u + SCALE * (c - u)
        for n, ended in enumerate(state["ended"]):
            if ended is not None and ended < i:
                guided[n] = c[n]
        if first:
            a, b = (x.double().flatten(1) for x in (u, c))
            cosines = ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).tolist()
            state["threshold"] = state["threshold"] or sum(cosines) / 2
            for n, cosine in enumerate(cosines):
                if state["ended"][n] is None and cosine >= state["threshold"]:
                    state["ended"][n] = i
        return guided

    with lent(case) as (pipe, calls):
        want = reference(case, pipe, calls, formula)
        run = traced(case, pipe, interp.AdaptiveGuidance(threshold=state["threshold"]))
    ended = [STEPS if e is None else e for e in state["ended"]]
    assert min(ended) == 0 and max(ended) > 0
    assert close(run, want)
    assert run.nfe.sel(branch="uncond").values.tolist() == [sum(i <= e for i in calls) for e in ended]
    assert (run.nfe.sel(branch="cond") == len(calls)).all()
    assert run.trajectory.guidance_scale.values.tolist() == [
        [SCALE if i <= e else 1 for i in range(STEPS)] for e in ended
    ]


@pytest.mark.parametrize("case", ["sd1 Heun", "sdxl Euler", "sd3 flow", "flux flow"])
def test_guidance_in_an_interval_of_noise(case):
    with lent(case) as (pipe, calls):
        sigma = interp.plan(pipe, PROMPTS, steps=STEPS, capture=BARE, options=OPTIONS.get(model(case))).timeline.sigma
        want = reference(case, pipe, calls, lambda i, u, c, first: u + 3 * (c - u) if i in (1, 2) else c)
        run = traced(case, pipe, interp.GuidanceInterval(start=float(sigma[1]), stop=float(sigma[3]), scale=3.0))
    assert close(run, want)
    assert run.nfe.sel(branch="uncond").values.tolist() == [sum(i in (1, 2) for i in calls)] * 2
    assert run.trajectory.guidance_scale.values.tolist() == [[1, 3, 3, 1]] * 2
