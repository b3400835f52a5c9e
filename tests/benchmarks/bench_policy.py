"""Forward passes saved and seconds saved, side by side: Stable Diffusion 1.5's architecture, random weights, fp16, 512×512.

    python -m tests.benchmarks.bench_policy [--repeat 3]

Each setting is compared with the same pipeline without interventions, measured interleaved in one process (medians);
nothing is recorded. Speed does not depend on the values of the weights.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

import interp
from interp.hooks import HookRegistry
from interp.interventions import Intervention, attach_all
from interp.planning import plan
from interp.tracing import call_arguments
from tests.benchmarks.bench_gpu import seconds, stable_diffusion

late = {"start": 0.6}
gate = {"start": 0.4}
tenth: dict[str, Any] = {"start": 10, "unit": "step"}
DDIM: dict[str, list[Intervention]] = {
    "no intervention": [],
    "text removed, last 20 of 50": [interp.RemoveText(**late)],
    "guidance removed, last 20 of 50": [interp.RemoveGuidance(**late)],
    "cross-attention cached, last 30 of 50": [interp.CacheCrossAttention(**gate)],
    "cached and guidance removed, last 30 of 50": [interp.CacheCrossAttention(**gate), interp.RemoveGuidance(**gate)],
}
FEW: dict[str, list[Intervention]] = {
    "no intervention": [],
    "text removed, last 15 of 25": [interp.RemoveText(**tenth)],
    "cross-attention cached, last 15 of 25": [interp.CacheCrossAttention(**tenth)],
    "cached and guidance removed (T-GATE's 10 of 25)": [
        interp.CacheCrossAttention(**tenth),
        interp.RemoveGuidance(**tenth),
    ],
}


def measure(
    pipe: StableDiffusionPipeline, settings: dict[str, list[Intervention]], batch: int, steps: int, repeat: int
) -> None:
    prompts = ["a red circle on a blue background with a green cat and a dog"] * batch
    runs: dict[str, Callable[[], object]] = {}
    saved = {}
    for name, changes in settings.items():
        one = plan(pipe, prompts, steps=steps, guidance_scale=7.5, batch_size=batch, interventions=changes)
        saved[name] = 1 - one.forward_passes / (2 * steps * batch)

        def run(one=one, changes=changes) -> None:
            with HookRegistry(pipe) as hooks:
                attach_all(changes, hooks, one.batch(one.batches[0]))
                pipe(**call_arguments(pipe, one, one.batches[0]))

        runs[name] = run if changes else lambda one=one: pipe(**call_arguments(pipe, one, one.batches[0]))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeat + 1):  # the first warms up
        for name, run in runs.items():
            spent = seconds(run)
            if round_:
                times[name].append(spent)
    base = statistics.median(times["no intervention"])
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{batch:3} pictures, {steps} steps  {name:<47} {median:6.2f} s   passes saved {saved[name]:6.1%}   "
            f"seconds saved {1 - median / base:6.1%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    pipe = stable_diffusion()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, fp16, 512×512")
    measure(pipe, DDIM, 1, 50, options.repeat)
    measure(pipe, DDIM, 16, 50, options.repeat)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    measure(pipe, FEW, 16, 25, options.repeat)


if __name__ == "__main__":
    main()
