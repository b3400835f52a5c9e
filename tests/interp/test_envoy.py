"""nnsight over the live pipeline: recorded bit-equal, edits as interventions, and a contract test for each quirk."""

import gc
import warnings
import weakref

import nnsight
import numpy as np
import pytest
import torch
from peft import LoraConfig

import interp
from interp.interventions import from_spec
from tests.families.pipelines import sd1, tiny

A, B = "a red circle", "a dog on the blue square background"
K = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
EVERYTHING = interp.Capture(attention="all", heads="all", tokens="all", branches=("cond", "uncond"), text=True,
                            sites=("unet.mid_block:out",), dtype="float32")  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    """A pipeline of this module's own: nnsight keeps its `forward` on what it has wrapped."""
    return sd1()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def halved(pipe, site=None, keep=lambda step: True):
    """The reference: the mid block's output halved by a plain torch hook, in an untraced call."""
    calls = []

    def halve(module, args, out):
        calls.append(1)
        return out / 2 if keep(len(calls) - 1) else out

    handle = pipe.unet.mid_block.register_forward_hook(halve)
    try:
        return pipe(A, generator=generator(), **K).images.numpy()
    finally:
        handle.remove()


def halving(pipe):
    model = interp.nnsight(pipe)
    with model.edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            edited.unet.mid_block.output = edited.unet.mid_block.output / 2
    return edited


def trace(pipe, changes, **more):
    return interp.trace(
        pipe, A, steps=3, guidance_scale=5.0, interventions=changes, progress=False,
        capture=interp.Capture(attention=None, image=False), **more,
    )  # fmt: skip


# The pipeline's own modules


def test_the_modules_are_shared_and_the_model_is_the_same_each_time(pipe):
    tensors = {id(p) for p in pipe.unet.parameters()}
    model = interp.nnsight(pipe)
    assert interp.nnsight(pipe) is model and model.pipeline is pipe
    assert {id(p) for p in model._module.unet.parameters()} == tensors
    assert model.unet.mid_block._module is pipe.unet.mid_block
    assert {p.data_ptr() for p in model._module.parameters()} == {
        p.data_ptr() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()
    }


def test_the_model_of_a_forgotten_pipeline_is_freed():
    own = sd1()
    seen = weakref.ref(own.unet)
    halving(own)
    del own
    gc.collect()
    assert seen() is None


def test_a_recorded_generation_is_the_plain_one(pipe):
    want = pipe(A, generator=generator(), **K).images
    with interp.record(pipe, capture=EVERYTHING) as plain:
        pipe(A, generator=generator(), **K)
    model = interp.nnsight(pipe)
    pipe.unet.mid_block.register_forward_hook(lambda *_: None).remove()
    interp.catalog._DRY_RUNS.clear()  # planning runs the denoiser without data, which a block must not be served
    with interp.record(pipe, capture=EVERYTHING) as recording, model.generate(A, generator=generator(), **K) as tracer:
        seen = [].save()
        for _ in tracer.iter[:3]:
            seen.append(model.unet.mid_block.output.clone())
        result = tracer.result.save()
    assert torch.equal(result.images, want)
    for node, other in zip(recording.run.tree.subtree, plain.run.tree.subtree, strict=True):
        for name, array in node.data_vars.items():
            if name != "seed":
                assert np.array_equal(array.values, other[name].values, equal_nan=array.dtype.kind == "f"), name
    value = recording.run.tree["sites/unet.mid_block"]["value"].sel(branch=["uncond", "cond"]).values[0]
    assert np.array_equal(value, torch.stack(seen).numpy())


def test_an_edited_generation_is_recorded_as_it_was(pipe):
    edited = halving(pipe)
    with warnings.catch_warnings(), interp.record(pipe, capture=EVERYTHING) as recording:
        warnings.simplefilter("ignore")  # nnsight tells that the open-ended loop ran out
        images = edited.generate(A, generator=generator(), **K).images
    assert np.array_equal(images.numpy(), halved(pipe))
    assert np.array_equal(recording.run.final_latents.values, images.numpy())
    untouched = trace(pipe, [])
    assert not np.array_equal(untouched.final_latents.values, images.numpy())


def test_a_module_run_by_a_block_itself_is_not_recorded(pipe):
    """A logit-lens-like call inside a block is not the pipeline's: it must not overwrite what the pipeline computed."""
    model = interp.nnsight(pipe)
    with interp.record(pipe, capture=EVERYTHING) as plain:
        want = pipe(A, generator=generator(), **K).images
    with interp.record(pipe, capture=EVERYTHING) as recording, model.generate(A, generator=generator(), **K) as tracer:
        for _ in tracer.iter[:3]:
            hidden, options = model.unet.down_blocks[0].attentions[0].inputs
            model.unet.mid_block.output  # noqa: B018
            again = model.unet.down_blocks[0].attentions[0](hidden[0] * 3, **options)  # noqa: F841
        result = tracer.result.save()
    assert torch.equal(result.images, want)
    for grid in plain.run.grids:
        assert np.array_equal(plain.run.attention(grid).values, recording.run.attention(grid).values, equal_nan=True)


# Edits as interventions


def test_an_edit_in_a_trace_is_a_torch_hook(pipe):
    edited = halving(pipe)
    for start, keep in ((None, lambda i: True), (1 / 3, lambda i: i >= 1), (2 / 3, lambda i: i >= 2)):
        run = trace(pipe, [interp.NNsightEdit(edited, start=start)])
        assert np.array_equal(run.final_latents.values, halved(pipe, keep=keep))
        function = trace(pipe, [interp.Edit(lambda x, at: x / 2, "unet.mid_block:out", start=start)])
        assert np.array_equal(run.final_latents.values, function.final_latents.values)
    run = trace(pipe, [interp.NNsightEdit(edited, stop=2, unit="step")])
    assert np.array_equal(run.final_latents.values, halved(pipe, keep=lambda i: i < 2))
    run = trace(pipe, [interp.NNsightEdit(edited, stop=0.0)])  # an empty window
    assert np.array_equal(run.final_latents.values, trace(pipe, []).final_latents.values)


def test_a_block_begins_with_its_window(pipe):
    """`tracer.iter[0]`, and a plain read, are the window's first step."""
    with interp.nnsight(pipe).edit() as (_, once):
        once.unet.mid_block.output = once.unet.mid_block.output / 2
    run = trace(pipe, [interp.NNsightEdit(once, start=1, stop=3, unit="step")])
    assert np.array_equal(run.final_latents.values, halved(pipe, keep=lambda i: i == 1))


def test_a_whole_run_includes_the_text_encoder(pipe):
    with interp.nnsight(pipe).edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            edited.text_encoder.output.last_hidden_state[:] = 0
    handle = pipe.text_encoder.register_forward_hook(lambda m, a, out: (out.last_hidden_state.zero_(), None)[1])
    want = pipe(A, generator=generator(), **K).images.numpy()
    handle.remove()
    assert np.array_equal(trace(pipe, [interp.NNsightEdit(edited)]).final_latents.values, want)


def test_edits_are_applied_in_their_order(pipe):
    with interp.nnsight(pipe).edit() as (tracer, plus):
        for _ in tracer.iter[:]:
            plus.unet.mid_block.output = plus.unet.mid_block.output + 1
    half = halving(pipe)
    images = {}
    for name, changes in {"half, plus": [half, plus], "plus, half": [plus, half]}.items():
        images[name] = trace(pipe, [interp.NNsightEdit(e) for e in changes]).final_latents.values
    for name, formula in {"half, plus": lambda x: x / 2 + 1, "plus, half": lambda x: (x + 1) / 2}.items():
        handle = pipe.unet.mid_block.register_forward_hook(lambda m, a, out, f=formula: f(out))
        want = pipe(A, generator=generator(), **K).images.numpy()
        handle.remove()
        assert np.array_equal(images[name], want)
    assert not np.array_equal(*images.values())
    # the same edits in two windows
    twice = [interp.NNsightEdit(half, stop=1, unit="step"), interp.NNsightEdit(half, start=2, unit="step")]
    assert np.array_equal(trace(pipe, twice).final_latents.values, halved(pipe, keep=lambda i: i != 1))


def test_edits_that_are_python_are_marked(pipe, tmp_path):
    edited = halving(pipe)
    conditions = {
        "nnsight": [interp.NNsightEdit(edited, start=0.5)],
        "function": [interp.Edit(generator, "unet.mid_block:out", stop=0.0)],
        "data": [interp.RemoveText(start=0.5)],
    }
    store = tmp_path / "run.zarr"
    run = interp.trace(pipe, A, steps=2, guidance_scale=5.0, conditions=conditions, store=store, progress=False)
    specs = {name: one for name, (one,) in run.attrs["conditions"].items()}
    assert specs["nnsight"]["serialisable"] is False and specs["function"]["serialisable"] is False
    assert specs["data"].get("serialisable", True)
    assert specs["nnsight"]["edits"] == [
        "for _ in tracer.iter[:]:\n    edited.unet.mid_block.output = edited.unet.mid_block.output / 2"
    ]
    assert specs["function"]["fn"].endswith("test_envoy.generator") and "manual_seed" in specs["function"]["source"]
    for name in ("nnsight", "function"):
        with pytest.raises(interp.InterpError, match="edit in Python"):
            from_spec(specs[name])
    # the same edits resume the run, others do not
    assert (
        len(interp.trace(pipe, A, steps=2, guidance_scale=5.0, conditions=conditions, store=store, progress=False)) == 3
    )
    with interp.nnsight(pipe).edit() as (tracer, other):
        for _ in tracer.iter[:]:
            other.unet.mid_block.output = other.unet.mid_block.output / 3
    conditions["nnsight"] = [interp.NNsightEdit(other, start=0.5)]
    with pytest.raises(interp.InterpError):
        interp.trace(pipe, A, steps=2, guidance_scale=5.0, conditions=conditions, store=store, progress=False)


def test_messages(pipe):
    model = interp.nnsight(pipe)
    with pytest.raises(interp.InterpError, match="holds no edits"):
        trace(pipe, [interp.NNsightEdit(model)])
    with pytest.raises(interp.InterpError, match=r"interp\.nnsight\(pipe\)"):
        trace(pipe, [interp.NNsightEdit(pipe)])
    with pytest.raises(interp.InterpError, match="another pipeline"):
        trace(tiny("sd1"), [interp.NNsightEdit(halving(pipe))])
    with pytest.raises(interp.InterpError, match="function of"):
        interp.Edit("no function", "unet.mid_block:out")
    with model.edit() as (_, late):  # the mid block runs after conv_in
        late.unet.mid_block.output  # noqa: B018
        late.unet.conv_in.output = late.unet.conv_in.output * 0
    with pytest.raises(interp.InterpError, match=r"waits for 'unet\.conv_in\.output'"):
        trace(pipe, [interp.NNsightEdit(late, stop=1, unit="step")])
    with model.edit() as (tracer, stops):
        stops.unet.mid_block.output  # noqa: B018
        tracer.stop()
    with pytest.raises(interp.InterpError, match="stopped the run"):
        trace(pipe, [interp.NNsightEdit(stops)])


def test_nothing_stays_after_an_exception_in_an_edit(pipe):
    want = trace(pipe, []).final_latents.values
    with interp.nnsight(pipe).edit() as (tracer, wrong):
        for _ in tracer.iter[:]:
            wrong.unet.mid_block.output = wrong.unet.mid_block.output / 2
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        trace(pipe, [interp.NNsightEdit(wrong)])
    interleaver = interp.nnsight(pipe).interleaver
    assert not interleaver.interleaving and not interleaver.mediators
    assert type(pipe).__name__ == "StableDiffusionPipeline" and "interp" not in str(type(pipe))
    assert np.array_equal(trace(pipe, []).final_latents.values, want)
    assert np.array_equal(pipe(A, generator=generator(), **K).images.numpy(), want)


def test_an_edit_ends_quietly(pipe):
    """The open-ended loop of an edit ends by running out: expected, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(pipe, [interp.NNsightEdit(halving(pipe))])


# What nnsight does unexpectedly


def test_a_trace_runs_all_steps(pipe):
    """nnsight's own DiffusionModel runs one step unless told otherwise."""
    own = {k: v for k, v in K.items() if k != "num_inference_steps"}
    model, steps = interp.nnsight(pipe), []
    handle = pipe.unet.register_forward_hook(lambda *_: steps.append(1))
    with model.generate(
        A, seed=0, callback_on_step_end=lambda p, i, t, k: setattr(p, "_interrupt", i >= 2) or k, **own
    ):
        pass
    handle.remove()
    assert len(steps) == 3  # interrupted, not ended


def test_a_seed_is_that_of_interp(pipe):
    run = interp.trace(pipe, [A], seeds=[5, 6], steps=3, guidance_scale=5.0, progress=False)
    images = interp.nnsight(pipe).generate([A, A], seed=5, **K).images
    assert np.array_equal(images.numpy(), run.final_latents.values)
    images = interp.nnsight(pipe).generate(A, seed=5, num_images_per_prompt=2, **K).images
    assert np.array_equal(images.numpy(), run.final_latents.values)


def test_outputs_survive_several_invokes_and_a_cache(pipe):
    model = interp.nnsight(pipe)
    with model.generate(seed=0, **K) as tracer:
        with tracer.invoke(A):
            result = tracer.result.save()
        with tracer.invoke(B):
            middle = model.unet.mid_block.output.save()
    want = pipe([A, B], generator=[generator(0), generator(1)], **K).images
    assert middle.shape[0] == 2 and torch.equal(result.images, want[:1])
    with model.generate(A, seed=0, **K) as tracer:
        cache = tracer.cache()
    assert len(cache["model.unet.mid_block"]) == 3
    assert torch.equal(cache["model"].output.images, pipe(A, generator=generator(), **K).images)


def test_an_edit_in_place_of_one_invoke_is_refused_under_guidance(pipe):
    model = interp.nnsight(pipe)
    with pytest.raises(interp.InterpError, match="assign instead"), model.generate(seed=0, **K) as tracer:
        with tracer.invoke(A):
            model.unet.mid_block.output[:] = 0
        with tracer.invoke(B):
            pass
    for scale in (1.0, 5.0):  # assigned: only its own rows change
        with model.generate(seed=0, **{**K, "guidance_scale": scale}) as tracer:
            with tracer.invoke(A):
                model.unet.mid_block.output = model.unet.mid_block.output * 0
            with tracer.invoke(B):
                result = tracer.result.save()
            with tracer.invoke():
                whole = tracer.result.save()
        plain = [pipe(p, generator=generator(i), **{**K, "guidance_scale": scale}).images for i, p in enumerate((A, B))]
        assert torch.allclose(result.images, plain[1], atol=1e-3)
        assert not torch.allclose(whole.images[:1], plain[0], atol=1e-1)
    # one invoke is the whole batch, and an edit in place works
    with model.generate(A, seed=0, **K) as tracer:
        for _ in tracer.iter[:3]:
            model.unet.mid_block.output[:] = model.unet.mid_block.output / 2
        result = tracer.result.save()
    assert np.array_equal(result.images.numpy(), halved(pipe))


def test_lora_that_comes_and_goes_after_wrapping():
    """Without following, `to_q.output` would silently be the base layer's."""
    own = sd1()
    model = interp.nnsight(own)
    own.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for _ in range(2):
        seen = {}
        to_q = own.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
        handle = to_q.register_forward_hook(lambda m, a, out, seen=seen: seen.setdefault("q", out.clone()))
        with model.generate(A, seed=0, **K):
            query = model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.output.save()
        handle.remove()
        assert torch.equal(query, seen["q"])
        own.unet.unload_lora()


def test_a_forward_that_was_put_back_is_wrapped_again():
    """Taking an offload hook away puts the old `forward` back, and with it an edit would be silently gone."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    own = sd1()
    add_hook_to_module(own.unet.mid_block, ModelHook())
    edited = halving(own)
    remove_hook_from_module(own.unet.mid_block)
    assert np.array_equal(trace(own, [interp.NNsightEdit(edited)]).final_latents.values, halved(own))
    add_hook_to_module(own.unet.mid_block, ModelHook())
    assert np.array_equal(trace(own, [interp.NNsightEdit(edited)]).final_latents.values, halved(own))


def test_exchanged_parts_are_followed():
    own, other = sd1(), sd1()
    edited = halving(own)
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(2)
    own.unet = other.unet
    assert np.array_equal(trace(own, [interp.NNsightEdit(edited)]).final_latents.values, halved(own))


def test_the_version_is_the_one_that_was_read():
    """The contract above was read in this version; another one must be read again."""
    assert nnsight.__version__.startswith("0.8.")
