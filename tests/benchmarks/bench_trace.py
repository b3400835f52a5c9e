"""CPU time of traced runs over untraced ones, side by side in one process, interleaved, minimum over repetitions.

python tests/benchmarks/bench_trace.py                 # the bundled model
python tests/benchmarks/bench_trace.py middle          # a random UNet of Stable Diffusion's topology, 0.3 as wide
python tests/benchmarks/bench_trace.py scenes --steps 20 --repeat 5 --batch 1
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: find tests/

import torch
from diffusers import UNet2DConditionModel

import interp

CAPTURES = {
    "default capture": interp.Capture(),
    "all tokens": interp.Capture(tokens="all"),
    "all heads": interp.Capture(heads="all"),
    "attention alone": interp.Capture(latents=False, noise_pred=False),
    "latents alone": interp.Capture(attention=None),
}


def middle() -> Any:
    """A random pipeline: SD 1's UNet at 0.3 of the width and 32×32 latents, tiny encoder and decoder."""
    from tests.families.pipelines import sd1

    pipe = sd1()
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        sample_size=32, cross_attention_dim=32, block_out_channels=(96, 192, 384, 384), attention_head_dim=8
    )
    return pipe


def measure(ways: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Minimum CPU seconds of each way; one round runs each once, so that a busy machine hits all alike."""
    best = dict.fromkeys(ways, float("inf"))
    for way in ways.values():
        way()
    for _ in range(repeat):
        for name, way in ways.items():
            start = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="scenes", help="'scenes', 'middle', or what interp.load takes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=5.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe = middle() if given.model == "middle" else interp.load(given.model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red circle on a blue background"
    arguments = {"num_inference_steps": given.steps, "guidance_scale": given.guidance}

    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(10**9))

        def untraced() -> None:
            generators = [torch.Generator().manual_seed(s) for s in range(given.batch)]
            pipe([prompt] * given.batch, generator=generators, **arguments)

        def traced(capture: interp.Capture, disk: bool, *changes: interp.Intervention) -> Callable[[], Any]:
            return lambda: interp.trace(
                pipe, prompt, seeds=range(given.batch), steps=given.steps, guidance_scale=given.guidance,
                capture=capture, interventions=changes, batch_size=given.batch, progress=False,
                store=Path(folder) / f"{next(count)}.zarr" if disk else None,
            )  # fmt: skip

        ways: dict[str, Callable[[], Any]] = {"untraced": untraced}
        ways |= {f"{name}, in memory": traced(capture, False) for name, capture in CAPTURES.items()}
        ways["default capture, to disk"] = traced(interp.Capture(), True)
        ways["text removed for the last half"] = traced(interp.Capture(), False, interp.RemoveText(start=0.5))
        best = measure(ways, given.repeat)
        plan = interp.plan(pipe, prompt, seeds=range(given.batch), steps=given.steps)
        start = time.process_time()
        interp.plan(pipe, prompt, seeds=range(given.batch), steps=given.steps)
        planning = time.process_time() - start
    print(f"{given.model}: {given.steps} steps, {given.batch} pictures of {plan.width}×{plan.height}, 1 thread")
    print(f"{'':34}CPU s   ratio")
    for name, seconds in best.items():
        print(f"{name:32}{seconds:7.2f}   {seconds / best['untraced']:.3f}")
    print(f"{'of which planning':32}{planning:7.2f}   {planning / best['untraced']:.3f}")


if __name__ == "__main__":
    main()
