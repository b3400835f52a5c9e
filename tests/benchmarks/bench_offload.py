"""Recording while weights are offloaded: is the picture that of an unwatched call, and is the memory what the plan says?

    python -m tests.benchmarks.bench_offload [--steps 3] [--batch 2]

Every offload of accelerate and diffusers, group offload with a stream among them, on Stable Diffusion 1.5's architecture and a
small FLUX-like transformer, random weights, fp16. Prints whether pictures and latents are bit-equal, and predicted and measured
peaks. On a machine without a GPU it runs the offloads that need none, on tiny models, and measures nothing.
"""

import argparse
import gc
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from diffusers.utils import logging

import interp
from tests.benchmarks.bench_memory import GIB, measured, models, traced


def grouped(level: str, device: str, **more: Any) -> Callable[[Any, Any], None]:
    def put(pipe: Any, denoiser: Any) -> None:
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and part is not denoiser:
                getattr(pipe, name).to(device)
        denoiser.enable_group_offload(torch.device(device), torch.device("cpu"), level, num_blocks_per_group=1, **more)

    return put


def offloads(device: str) -> dict[str, Callable[[Any, Any], None]]:
    groups = {f"groups, {level}": grouped(f"{level}_level", device) for level in ("block", "leaf")}
    if device == "cpu":
        return groups
    streamed = {f"groups, {v}, stream": grouped(f"{v}_level", device, use_stream=True) for v in ("block", "leaf")}
    recorded = {"groups, leaf, record_stream": grouped("leaf_level", device, use_stream=True, record_stream=True)}
    return {
        "none": lambda pipe, _: pipe.to(device),
        "parts": lambda pipe, _: pipe.enable_model_cpu_offload(),
        "modules": lambda pipe, _: pipe.enable_sequential_cpu_offload(),
        **groups, **streamed, **recorded,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    logging.set_verbosity_error()  # each pipeline warns again that fp16 is no good on a CPU, from where it is offloaded
    cuda = torch.cuda.is_available()
    prompts = ["a red circle on a blue background"] * options.batch
    for model, make, _, settings in models(cuda):
        for name, put in offloads("cuda" if cuda else "cpu").items():
            pipe = deepcopy(make().to("cpu"))
            denoiser = getattr(pipe, "unet", None) or pipe.transformer
            put(pipe, denoiser)
            plan = interp.plan(pipe, prompts, steps=options.steps, batch_size=options.batch, **settings)
            before = [
                unwatched(pipe, plan) for _ in range(2)
            ]  # a stream learns the order of the layers in the first call
            with interp.record(pipe) as recording:
                during = unwatched(pipe, plan)
            after, run = unwatched(pipe, plan), recording.run
            kept = torch.as_tensor(run.final_latents.values).float()
            same = torch.equal(before[1], during) and torch.equal(during, after)
            same &= during.ndim != 4 or torch.equal(kept, during.float().cpu())  # FLUX returns its latents packed
            line = f"{model:<11} {name:<28} bit-equal {same}  predicted {plan.memory / GIB:6.3f} GiB"
            if cuda:
                peak = measured(lambda pipe=pipe, plan=plan: traced(pipe, plan))
                line += f"  measured {peak / GIB:6.3f}  ratio {plan.memory / peak:.3f}"
            print(line, flush=True)
            del pipe, denoiser, plan, recording, run
            gc.collect()


def unwatched(pipe: Any, plan: Any) -> torch.Tensor:
    from interp.tracing import call_arguments

    return pipe(**{**call_arguments(pipe, plan, plan.batches[0]), "output_type": "latent"}).images


if __name__ == "__main__":
    main()
