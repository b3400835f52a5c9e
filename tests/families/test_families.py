"""What a family says of a pipeline is what the running pipeline does."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

import interp
from interp.catalog import dry_run
from interp.families import find_family
from interp.testing.leftovers import untouched as untouched_as_it_is
from tests.families.pipelines import sd1, tiny
from tests.families.variant_pipelines import controlled
from tests.interp.leftovers import untouched

A, B = "a red circle", "a dog on the blue square background"
NAMES = ["sd1", "sd2", "sdxl"]


def call(pipe, prompts=(A, B), steps=2, scale=5.0, **more):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(
        list(prompts), num_inference_steps=steps, guidance_scale=scale, generator=generators, output_type="latent",
        **more,
    ).images  # fmt: skip


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
@pytest.mark.parametrize("name", NAMES)
def test_the_dry_run_tells_real_shapes_in_running_order(name, size):
    pipe = tiny(name)
    family = find_family(pipe)
    before = {n: (p.data_ptr(), p.device) for n, p in pipe.unet.named_parameters()}
    with untouched(pipe):
        arguments = family.arguments({"height": size[0], "width": size[1]})
        shapes, grids = dry_run(family, arguments)
    assert before == {n: (p.data_ptr(), p.device) for n, p in pipe.unet.named_parameters()}
    real, order, queries = {}, [], {}
    handles = []
    for path, module in pipe.unet.named_modules():
        name = f"unet.{path}" if path else "unet"

        def look(_, args, out, name=name):
            first = out if isinstance(out, torch.Tensor) else out[0]
            real[name] = tuple(first.shape[1:])
            order.append(name)
            queries[name] = first.shape[1]

        handles.append(module.register_forward_hook(look))
    call(pipe, steps=1, height=size[0], width=size[1])
    for handle in handles:
        handle.remove()
    assert shapes == real
    sites = [s.name for s in family.attention_sites()]
    assert sites == [n for n in order if n in set(sites)]  # `running order` is what it says
    assert set(sites) == {n for n in order if n.endswith(("attn1", "attn2"))}
    for site, (height, width) in grids.items():
        assert height * width == queries[site] and height * size[1] == width * size[0]
    assert family.latent_shape(arguments) == (4, size[0] // 2, size[1] // 2)
    assert family.default_size() == (16, 16)


@pytest.mark.parametrize("name", NAMES)
def test_kinds_and_heads(name):
    family = find_family(tiny(name))
    sites = family.attention_sites()
    assert [s.kind for s in sites] == [{"attn1": "self", "attn2": "cross"}[s.name[-5:]] for s in sites]
    seen = {}
    with interp.HookRegistry(tiny(name)) as hooks:
        hooks.read("*:probs", lambda x, at: seen.setdefault(at.site, x.shape))
        call(tiny(name), steps=1)
    assert {s.name: s.heads for s in sites} == {n.removesuffix(":probs"): shape[1] for n, shape in seen.items()}
    table = interp.sites(tiny(name), "*:probs")
    assert {s.name: (s.shape, s.kind) for s in table} == {
        n: (tuple(shape[1:]), "self" if "attn1" in n else "cross") for n, shape in seen.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_encode_is_what_the_denoiser_receives(name):
    """The embeddings (and XL's pooled vector) of the cond rows, and cond rows come after uncond rows."""
    pipe, seen = tiny(name), {}
    family = find_family(pipe)

    def look(module, args, kwargs):
        if not seen:
            seen.update(text=family.text_inputs(kwargs), raw=kwargs)

    handle = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    call(pipe, steps=1, negative_prompt=["a green cat"] * 2)
    handle.remove()
    for prompts, rows in (([A, B], slice(2, 4)), (["a green cat"] * 2, slice(0, 2))):
        encoded = family.encode(prompts)
        assert torch.equal(seen["text"].embeddings[rows], encoded.embeddings)
        assert not encoded.embeddings.requires_grad
        if name == "sdxl":
            assert torch.equal(seen["text"].pooled[rows], encoded.pooled)
        else:
            assert encoded.pooled is None
    kept = dict(seen["raw"])
    changed = family.with_text(seen["raw"], family.encode([A, B]))
    assert seen["raw"] == kept and changed["encoder_hidden_states"] is not kept["encoder_hidden_states"]


@pytest.mark.parametrize("name", NAMES)
def test_guided_tells_whether_the_branch_without_text_runs(name):
    pipe = tiny(name)
    for scale in (0.0, 1.0, 1.5):
        rows = []
        handle = pipe.unet.conv_in.register_forward_hook(lambda m, a, out, rows=rows: rows.append(out.shape[0]))
        call(pipe, steps=1, scale=scale)
        handle.remove()
        assert rows == [4 if find_family(pipe).guided({"guidance_scale": scale}) else 2]


def test_sites_list_modules_and_encoders():
    table = interp.sites(tiny("sdxl"))
    names = {s.name for s in table}
    assert {"unet:out", "unet.mid_block:out", "text_encoder_2:out"} <= names
    assert len(names) == len(table)
    assert next(s for s in table if s.name == "unet.mid_block:out").shape == (32, 4, 4)
    text = str(table)
    assert (text.count("\n") == len(table) and "4×16×77" in text) or "head" not in text


def test_image_to_image_through_a_registry():
    pipe, seen = StableDiffusionImg2ImgPipeline(**sd1().components, requires_safety_checker=False), []
    pipe.set_progress_bar_config(disable=True)
    arguments = {"image": Image.new("RGB", (16, 16), "red"), "strength": 0.5, "num_inference_steps": 4}
    run = lambda: pipe(A, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments).images  # noqa: E731
    want = run()
    with interp.HookRegistry(pipe) as hooks:
        hooks.read("*mid_block*attn2:probs", lambda x, at: seen.append((at.step, at.branch)))
        assert torch.equal(run(), want)
    assert seen == [(s, b) for s in (0, 1) for b in ("uncond", "cond")]


def test_a_controlnet_loses_the_same_rows():
    """Rows that leave the denoiser leave the ControlNet beside it; with guidance kept, nothing changes."""
    pipe, rows = controlled(), {"unet": [], "controlnet": []}
    image = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    want = call(pipe, image=image, steps=4)
    with untouched_as_it_is(pipe), interp.HookRegistry(pipe) as hooks:
        hooks.on_call(lambda c: None)
        assert torch.equal(call(pipe, image=image, steps=4), want)
    handles = [
        getattr(pipe, n).conv_in.register_forward_hook(lambda m, a, out, n=n: rows[n].append(out.shape[0]))
        for n in rows
    ]

    def drop(call):
        if call.step >= 2:
            call.keep = ("cond",)

    with interp.HookRegistry(pipe) as hooks:
        hooks.on_call(drop)
        got = call(pipe, image=image, steps=4)
    for handle in handles:
        handle.remove()
    assert rows == {"unet": [4, 4, 2, 2], "controlnet": [4, 4, 2, 2]}
    assert torch.isfinite(got).all() and not torch.equal(got, want)


def test_subclasses_of_a_pipeline_are_known():
    class Mine(type(tiny("sd1"))):
        pass

    pipe = Mine(**tiny("sd1").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    run = interp.trace(pipe, A, steps=1, progress=False)
    assert run.attrs["pipeline"]["class"] == "Mine" and np.isfinite(run.latents.values).all()
