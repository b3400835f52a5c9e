"""Tracing on a GPU: Stable Diffusion 1.5's architecture with random weights (speed does not depend on the values).

    python tests/benchmarks/bench_gpu.py [--batch 8] [--steps 50] [--repeat 3]

Prints seconds and ratios to the same pipeline untraced, measured interleaved in one process (medians), whether the
traced picture equals the untraced one bit for bit, and the peak of device memory that tracing adds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import interp
from interp.hooks import HookRegistry
from interp.interventions import Batch, attach_all
from interp.planning import Plan, plan
from interp.recorder import Recorder, pictures
from interp.stores import create_run
from interp.tracing import call_arguments, run_batch
from tests.families.pipelines import tokenizer


def stable_diffusion() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tok = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tok), hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tok,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda", torch.float16)


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def variants(pipe: StableDiffusionPipeline, batch: int, steps: int, folder: Path) -> dict[str, Callable[[], object]]:
    prompts = ["a red circle on a blue background with a green cat and a dog"] * batch
    common = {"steps": steps, "seeds": 0, "guidance_scale": 7.5, "batch_size": batch}
    numbers = iter(range(10**6))

    def planned(**changes: object) -> Plan:
        return plan(pipe, prompts, **{**common, **changes})  # type: ignore[arg-type]

    def traced(one: Plan, *, disk: bool) -> Callable[[], object]:
        def run() -> None:
            with create_run(folder / f"{next(numbers)}.zarr" if disk else None, one.layout) as writer:
                run_batch(pipe, one, writer, one.batches[0], one.batches[0])

        return run

    def intervened(one: Plan) -> Callable[[], object]:
        def run() -> None:
            (changes,) = one.conditions.values()
            with HookRegistry(pipe) as hooks:
                members = one.batches[0]
                attach_all(changes, hooks, Batch(one.rows(members), one.tokens, one.timeline, one.guidance_scale))
                pipe(**call_arguments(pipe, one, members))

        return run

    base = planned()
    every = planned(capture=interp.Capture(tokens="all"))
    heads = planned(capture=interp.Capture(tokens="all", heads="all"))
    late = planned(interventions=[interp.RemoveText(start=0.6)])
    found: dict[str, Callable[[], object]] = {
        "untraced": lambda: pipe(**call_arguments(pipe, base, base.batches[0])),
        "traced, default capture, memory": traced(base, disk=False),
        "traced, default capture, disk": traced(base, disk=True),
        "traced, all tokens, disk": traced(every, disk=True),
        "text removed last 40 %, untraced": intervened(late),
    }
    if batch <= 2:
        found["traced, all tokens, all heads, disk"] = traced(heads, disk=True)
    return found


def check_equal(pipe: StableDiffusionPipeline, steps: int) -> bool:
    one = plan(pipe, ["a red circle", "a blue dog"], steps=steps, batch_size=2)
    with create_run(None, one.layout) as writer, HookRegistry(pipe) as hooks:
        recorder = Recorder(hooks, writer, one, one.batches[0])
        recorder.begin()
        traced = pictures(pipe(**call_arguments(pipe, one, one.batches[0])))
        recorder.finish(traced)
    untraced = pictures(pipe(**call_arguments(pipe, one, one.batches[0])))
    assert traced is not None and untraced is not None
    return bool((traced == untraced).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    pipe = stable_diffusion()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, fp16, 512×512, {options.steps} DDIM steps")
    print("traced picture bit-equal to the untraced one:", check_equal(pipe, 5))
    with tempfile.TemporaryDirectory() as folder:
        runs = variants(pipe, options.batch, options.steps, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in runs}
        peak: dict[str, float] = {}
        for round_ in range(options.repeat + 1):  # the first warms up
            for name, run in runs.items():
                torch.cuda.reset_peak_memory_stats()
                spent = seconds(run)
                peak[name] = torch.cuda.max_memory_allocated() / 2**30
                if round_:
                    times[name].append(spent)
    base = statistics.median(times["untraced"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"batch {options.batch}  {name:<38} {median:6.2f} s  ×{median / base:.3f}  peak {peak[name]:.2f} GiB")


if __name__ == "__main__":
    main()
