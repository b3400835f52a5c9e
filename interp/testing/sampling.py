"""Branches, steps and noise levels are what the pipeline and its scheduler make of them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from interp.hooks import DenoiserCall, HookRegistry
from interp.recording import record
from interp.testing.case import BARE, FamilyCase, Recorded, StepSeen, close
from interp.testing.leftovers import untouched
from interp.testing.pictures import returned


def check_branches(case: FamilyCase) -> None:
    """What is combined of the two branches is what `scheduler.step` receives: the roles are not exchanged."""
    family = case.family
    for guided in case.modes:
        seen, run, arguments = case.recorded(guided).steps, case.recorded(guided).run, case.arguments(guided)
        noise = {str(b): torch.from_numpy(run.noise_pred.sel(branch=b).values) for b in run.noise_pred.branch.values}
        for step, one in enumerate(_first_evaluations(case, seen, run)):
            got = family.unpack(one.model_output, arguments).float()
            cond, uncond = noise["cond"][:, step], noise["uncond"][:, step]
            if guided:
                want = family.combine(uncond, cond, family.applied_guidance(arguments), arguments)
                assert (cond - uncond).abs().max() > 100 * case.tolerance * cond.abs().max(), "the branches are alike"
            else:
                want = cond
                assert torch.isnan(uncond).all(), "there is no branch without text, but one was recorded"
            close(got, want, case.tolerance, f"step {step}: the branches do not combine to what the scheduler gets")
        assert (run.nfe.sel(branch="cond").values == len(seen)).all()
        assert (run.nfe.sel(branch="uncond").values == (len(seen) if guided else 0)).all()


def _first_evaluations(case: FamilyCase, seen: Sequence[StepSeen], run: Any) -> list[StepSeen]:
    """Second-order schedulers evaluate twice a step: of each step the first one is kept."""
    steps = run.latents.sizes["step"]
    assert steps <= len(seen)
    return list(seen)[:: getattr(case.pipe.scheduler, "order", 1)][:steps]


def check_dropped(case: FamilyCase) -> None:
    """A dropped branch is not computed, and the scheduler receives the kept prediction exactly."""
    if case.guided is None:
        return
    family, pipe = case.family, case.pipe
    for kept in ("cond", "uncond"):
        rows: list[int] = []
        outputs: list[torch.Tensor] = []

        def drop(call: DenoiserCall, kept: str = kept) -> None:
            if call.step >= 1:
                call.keep = (kept,)

        def count(_: Any, args: tuple, kwargs: dict, rows: list[int] = rows) -> None:
            rows.append(family.rows(args, kwargs))

        def keep(seen: Any, kept: str = kept, outputs: list[torch.Tensor] = outputs) -> None:
            if seen.call.step >= 1:
                outputs.append(seen.outputs[kept].clone())

        handle = family.denoiser.register_forward_pre_hook(count, with_kwargs=True)
        try:
            with untouched(pipe), case.spied() as seen, HookRegistry(pipe) as hooks:
                hooks.on_call(drop)
                hooks.on_prediction(keep)
                case.call()
        finally:
            handle.remove()
        free, samples = len(outputs), len(case.prompts)
        assert sum(rows) == 2 * samples * (len(seen) - free) + samples * free, rows
        for one, output in zip(seen[-free:], outputs, strict=True):
            got = family.unpack(one.model_output, case.arguments())
            assert torch.equal(got, output), f"with {kept} alone the scheduler does not get its prediction exactly"


def check_steps(case: FamilyCase) -> None:
    """Latents, timesteps and noise levels of each step are the scheduler's own."""
    _compare(case, case.recorded(case.modes[0]))


def check_scheduler(case: FamilyCase, make: Callable[[Any], Any]) -> str:
    """The same with another scheduler, if the pipeline runs with it."""
    scheduler = make(case.pipe.scheduler)
    if scheduler is None:
        return "not offered: it is for models that predict something else"
    met: list[tuple[int, int, float]] = []
    with case.scheduled(scheduler):
        try:
            with case.spied() as seen, record(case.pipe, capture=BARE) as recording, HookRegistry(case.pipe) as hooks:
                hooks.on_call(lambda call: met.append((call.step, call.evaluation, call.timestep)))
                latents = case.call(num_inference_steps=3)
        except Exception:
            try:
                case.call(num_inference_steps=3)
            except Exception as error:  # whatever diffusers raises
                return f"not offered: the pipeline does not run with it ({type(error).__name__})"
            raise
        _compare(case, Recorded(latents, recording.run, seen))
    steps = [(step, round(time, 2)) for step, evaluation, time in dict.fromkeys(met) if evaluation == 0]
    times = recording.run.trajectory.timestep.values
    assert steps == [(i, round(float(t), 2)) for i, t in enumerate(times)], steps
    return "the same numbers"


def _compare(case: FamilyCase, one: Recorded) -> None:
    family, run, arguments = case.family, one.run, case.arguments()
    first = _first_evaluations(case, one.steps, run)
    want = torch.stack([family.unpack(s.sample, arguments) for s in first], 1).float()
    assert np.array_equal(run.latents.values, want.numpy()), "the latents are not those entering each step"
    assert torch.equal(returned(family, run, one.latents), one.latents)
    times = run.trajectory
    assert np.allclose(times.timestep.values, [s.timestep for s in first], rtol=1e-5)
    data, noise = times.data_scale.values**2, times.noise_scale.values**2
    assert np.allclose(times.alpha_bar.values, data / (data + noise), rtol=1e-4), (
        "the noise levels contradict themselves"
    )
