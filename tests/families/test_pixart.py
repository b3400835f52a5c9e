"""PixArt: masked text states, sizes that are binned, a model of one step."""

import numpy as np
import pytest
import torch

import interp
from interp.families import find_family
from tests.families.pipelines import pixart_alpha, tiny

A = "A Red circle"
OPTIONS = {"max_sequence_length": 24, "use_resolution_binning": False}


def test_masked_padding_gets_nothing():
    """Its attention is 0, and changing its states changes nothing."""
    pipe = tiny("pixart_alpha")
    arguments = {"steps": 2, "height": 32, "width": 48, "options": OPTIONS, "progress": False}
    capture = interp.Capture(heads="all", dtype="float32", image=False)
    run = interp.trace(pipe, A, capture=capture, **arguments)
    table = run.tokens("8x12")
    probs = run.attention("8x12").isel(sample=0)
    assert list(table["token_text"].values[0][:4]) == ["a", "red", "circle", "</s>"]  # the pipeline lower-cases
    assert (probs.isel(token=-1).values == 0).all() and int(table["token_count"].values[0, -1]) == 20
    assert np.allclose(probs.isel(token=slice(0, 4)).sum("token").values, 1, atol=1e-5)


def test_the_mask_moves_with_the_prompt():
    """A longer prompt in the middle of the run brings its own mask."""
    pipe = tiny("pixart_alpha")
    arguments = {"steps": 2, "height": 32, "width": 48, "options": OPTIONS, "progress": False}
    capture = interp.Capture(tokens="all", dtype="float32", image=False)
    changes = [interp.ReplacePrompt("a dog on the blue square background", start=0.5)]
    run = interp.trace(pipe, A, capture=capture, interventions=changes, **arguments)
    reached = (run.attention("8x12").isel(sample=0).max(("branch", "layer", "head", "query_y", "query_x")) > 0).sum(
        "token"
    )
    assert reached.values.tolist() == [4, 9]


def test_sizes_are_binned_as_the_pipeline_does():
    """At 256² training size the nearest aspect ratio is generated, and the picture resized to what was asked for."""
    pipe = pixart_alpha()
    pipe.transformer.register_to_config(sample_size=32)
    family = find_family(pipe)
    arguments = family.arguments({"height": 32, "width": 64, "max_sequence_length": 24})
    want = pipe(
        A, height=32, width=64, num_inference_steps=2, max_sequence_length=24, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert family.latent_shape(arguments) == tuple(want.shape[1:])
    assert family.latent_shape(arguments)[1:] != (16, 32)
    assert family.latent_shape({**arguments, "use_resolution_binning": False}) == (4, 16, 32)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_single_step_goes_on_with_the_predicted_picture(steps):
    from diffusers import DDIMScheduler

    pipe = pixart_alpha()
    pipe.scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02)
    with interp.record(pipe) as recording:
        got = pipe(A, height=32, width=48, num_inference_steps=steps, output_type="latent", **OPTIONS).images
    assert np.array_equal(recording.run.final_latents.values, got.numpy())


def test_a_running_pipeline_does_not_tell_its_guidance():
    """The pipeline keeps it in a local variable: whoever comes later is told so, never given a guess."""
    pipe = tiny("pixart_alpha")
    hooks = interp.HookRegistry(pipe)
    entered = []

    def enter(step, timestep, latents):
        if not entered:
            entered.append(hooks.__enter__())

    try:
        with pytest.raises(interp.InterpError, match="enter the HookRegistry before the pipeline is called"):
            pipe(A, height=32, width=48, num_inference_steps=3, output_type="latent", callback=enter, **OPTIONS)
    finally:
        hooks.__exit__(None, None, None)
