"""What `plan.memory` predicts against what a GPU really took, for several captures and batch sizes.

    python -m tests.benchmarks.bench_memory [--steps 2] [--batches 1 4 8]

Stable Diffusion 1.5's architecture and a small FLUX-like transformer, both with random weights, fp16. Prints predicted and
measured peaks in GiB and their ratio, traced and untraced: the peak of all device memory (weights, activations, and what
recording holds), and the peak that recording adds. On a machine without a GPU it runs tiny models and prints predictions
alone.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

import interp
from interp.planning import Plan, plan
from interp.stores import create_run
from interp.tracing import call_arguments, run_batch
from tests.families.pipelines import _text_config, t5, t5_tokenizer, tiny, tokenizer

GIB = 2**30
MID = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2"
CAPTURES = {
    "latents and noise alone": interp.Capture(attention=None),
    "default": interp.Capture(),
    "all heads, all tokens": interp.Capture(heads="all", tokens="all"),
    "self-attention of 8² and 16²": interp.Capture(attention=("*mid_block*attn1", "*up_blocks.1*attn1")),
    "self-attention of 32²": interp.Capture(attention="*down_blocks.1.attentions.0*attn1"),
    "q, k, v of a layer": interp.Capture(attention=None, sites=tuple(f"{MID}:{q}" for q in "qkv")),
    "entropy and DAAM": interp.Capture(attention=None, reduce=["entropy", "daam"]),
}
DIT = {
    "latents and noise alone": interp.Capture(attention=None),
    "default": interp.Capture(),
    "all heads, all tokens": interp.Capture(heads="all", tokens="all"),
    "output of a block": interp.Capture(attention=None, sites=("*transformer_blocks.0:out",)),
}


def small_dit() -> FluxPipeline:
    """A FLUX-like transformer of 8 layers, 1536 wide, at 512²."""
    torch.manual_seed(0)
    tok, tok2 = tokenizer(), t5_tokenizer()
    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=64, num_layers=3, num_single_layers=5, attention_head_dim=64, num_attention_heads=24,
            joint_attention_dim=512, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24), guidance_embeds=True,
        ),
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4, latent_channels=16,
            up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, sample_size=512, shift_factor=0.1,
        ),
        text_encoder=CLIPTextModel(_text_config(tok, 64)), tokenizer=tok, text_encoder_2=t5(tok2, 512), tokenizer_2=tok2,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )  # fmt: skip
    pipe.default_sample_size = 64
    pipe.set_progress_bar_config(disable=True)
    return pipe


def models(cuda: bool) -> Iterator[tuple[str, Callable[[], Any], dict[str, interp.Capture], dict[str, Any]]]:
    short = {"options": {"max_sequence_length": 256 if cuda else 24}}
    if cuda:
        from tests.benchmarks.bench_gpu import stable_diffusion

        yield "SD 1.5", stable_diffusion, CAPTURES, {}
        yield "small DiT", lambda: small_dit().to("cuda", torch.float16), DIT, short
    else:
        tiny_captures = {n: c for n, c in CAPTURES.items() if "of" not in n.split()}
        yield "tiny SD 1.x", lambda: tiny("sd1"), tiny_captures, {}
        yield "tiny FLUX", lambda: tiny("flux"), DIT, {**short, "height": 32, "width": 48}


def measured(run: Callable[[], object]) -> int:
    """Peak of allocated device memory, after one call that fills the library's own caches."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def traced(pipe: Any, one: Plan) -> None:
    with create_run(None, one.layout) as writer:
        run_batch(pipe, one, writer, one.batches[0], one.batches[0])


def cases(captures: dict[str, interp.Capture]) -> Iterator[tuple[str, interp.Capture]]:
    """Every capture without pictures, since the peak of decoding hides that of recording; the default with them too."""
    for name, capture in captures.items():
        yield name, capture.changed(image=False)
    yield "default, pictures decoded", interp.Capture()


def told(one: Plan) -> str:
    added = one.memory - one.memory_untraced
    return f"predicted {one.memory / GIB:6.3f} GiB, untraced {one.memory_untraced / GIB:6.3f}, added {added / GIB:6.3f}"


def compared(pipe: Any, one: Plan, base: dict[bool, int]) -> tuple[str, float]:
    """Measure one plan; `base` remembers the untraced peak, with and without pictures."""
    image = one.capture.image
    if image not in base:
        base[image] = measured(lambda: pipe(**call_arguments(pipe, one, one.batches[0])))
    peak = measured(lambda: traced(pipe, one))
    ratio, plain = one.memory / peak, one.memory_untraced / base[image]
    added = (peak - base[image]) / GIB
    return (
        f"{told(one)}   measured {peak / GIB:6.3f}, {base[image] / GIB:6.3f}, {added:6.3f}   "
        f"ratio {ratio:.3f}, untraced {plain:.3f}",
        ratio,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    options = parser.parse_args()
    cuda, ratios = torch.cuda.is_available(), []
    for model, make, captures, settings in models(cuda):
        pipe = make()
        for batch in options.batches:
            base: dict[bool, int] = {}
            prompts = ["a red circle on a blue background"] * batch
            for name, capture in cases(captures):
                one = plan(pipe, prompts, steps=options.steps, batch_size=batch, capture=capture, **settings)
                try:
                    line, ratio = compared(pipe, one, base) if cuda else (told(one), 1.0)
                except torch.cuda.OutOfMemoryError:
                    line, ratio = f"{told(one)}   out of memory", 1.0
                ratios.append(ratio)
                print(f"{model:<11} batch {batch}  {name:<30} {line}", flush=True)
        del pipe
        gc.collect()
    if cuda:
        print(f"predicted / measured: {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
