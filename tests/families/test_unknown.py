"""Pipelines that no family describes: what they still give, and the sentences about what they cannot."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image

import interp
from interp.families import find_family
from tests.families import pipelines
from tests.interp.leftovers import untouched

A, B = "a red circle", "a dog on the blue square background"
BARE = interp.Capture(attention=None)


class Mixer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, sample_size: int = 8):
        super().__init__()
        self.patch, self.text = torch.nn.Conv2d(4, 16, 2, stride=2), torch.nn.Embedding(128, 16)
        self.block = torch.nn.Linear(16, 16)
        self.unpatch = torch.nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.form = tuple

    def forward(self, hidden_states, timestep, text, return_dict=True):
        x = self.patch(hidden_states)
        tokens = (
            x.flatten(2).transpose(1, 2) + self.text(text).mean(1, keepdim=True) + timestep.reshape(-1, 1, 1) / 1000
        )
        x = self.block(tokens).tanh().transpose(1, 2).reshape(x.shape)
        out = self.unpatch(x)
        return {tuple: (out,), list: [out], dict: {"flow": out, "more": 1}, torch.Tensor: out}[self.form]


class MadeUpPipeline(DiffusionPipeline):
    """Rows [cond, uncond], the other way around than elsewhere."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.rescale = False

    @torch.no_grad()
    def __call__(
        self, prompt, num_inference_steps=4, guidance_scale=3.0, height=8, width=8, generator=None, output_type="pil",
        num_images_per_prompt=1,
    ):  # fmt: skip
        prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_images_per_prompt)]
        codes = torch.tensor([[ord(c) % 128 for c in p.ljust(40)[:40]] for p in prompts])
        guided = guidance_scale > 1
        codes = torch.cat([codes, torch.zeros_like(codes)]) if guided else codes
        generators = generator if isinstance(generator, list) else [generator] * len(prompts)
        x = torch.stack([torch.randn(4, height, width, generator=g) for g in generators])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            out = self.transformer(torch.cat([x, x]) if guided else x, t.expand(len(codes)), text=codes)
            out = out["flow"] if isinstance(out, dict) else out if isinstance(out, torch.Tensor) else out[0]
            if guided:
                cond, uncond = out.chunk(2)
                out = uncond + guidance_scale * (cond - uncond)
                out = out / out.norm() if self.rescale else out
            x = self.scheduler.step(out, t, x).prev_sample
        if output_type == "latent":
            return (x,)
        pixels = (x[:, :3].clamp(-1, 1) * 127 + 128).byte().permute(0, 2, 3, 1).numpy()
        return ([Image.fromarray(p) for p in pixels],)


@pytest.fixture(scope="module")
def made_up():
    torch.manual_seed(0)
    pipe = MadeUpPipeline(Mixer().eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def cogview():
    return pipelines.dit.cogview4()


def call(pipe, **more):
    given = {
        "generator": [torch.Generator().manual_seed(i) for i in range(2)],
        "height": 32,
        "width": 48,
        "output_type": "latent",
    }
    out = pipe([A, B], num_inference_steps=3, **{**given, **more})
    return out[0] if isinstance(out, tuple) else out.images


def plainly(pipe, **more):
    """Predictions in calling order, and what the scheduler was given: by plain hooks."""
    outputs, given, own = [], [], pipe.scheduler

    class Spy(type(own)):
        def step(self, model_output, timestep, sample, **kwargs):
            given.append((model_output.clone(), sample.clone()))
            return super().step(model_output, timestep, sample, **kwargs)

    handle = pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(out[0].clone()))
    Spy.__name__ = type(own).__name__
    pipe.scheduler = Spy.from_config(own.config)
    try:
        call(pipe, **more)
    finally:
        pipe.scheduler = own
        handle.remove()
    return outputs, given


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", ["made_up", "cogview"])
def test_latents_predictions_and_sites(name, scale, request):
    """Bit-equal to an unwatched call, branches as they were computed; also with guidance as rows in a strange order."""
    pipe = request.getfixturevalue(name)
    path = {"made_up": "transformer.block", "cogview": "transformer.transformer_blocks.1.attn1"}[name]
    want = call(pipe, guidance_scale=scale)
    outputs, given = plainly(pipe, guidance_scale=scale)
    capture = interp.Capture(attention=None, sites=[path], branches=("cond", "uncond"), image=False)
    with untouched(pipe), interp.record(pipe, capture=capture) as recording:
        got = call(pipe, guidance_scale=scale)
    assert torch.equal(got, want)
    run = recording.run
    assert np.array_equal(run.final_latents.values, want.float().numpy())
    assert np.array_equal(run.latents.values, np.stack([x.float().numpy() for _, x in given], 1))
    noise = run.noise_pred
    if scale == 1:
        assert np.array_equal(noise.sel(branch="cond").values, torch.stack(outputs, 1).float().numpy())
        assert np.isnan(noise.sel(branch="uncond").values).all()
    else:
        cond, uncond = (torch.stack(o, 1) for o in zip(*(o.chunk(2) for o in outputs), strict=True)) if name == "made_up" else (
            torch.stack(outputs[::2], 1), torch.stack(outputs[1::2], 1)
        )  # fmt: skip
        assert np.array_equal(noise.sel(branch="cond").values, cond.float().numpy())
        assert np.array_equal(noise.sel(branch="uncond").values, uncond.float().numpy())
    assert run.nfe.values.tolist() == [[3, 3 if scale > 1 else 0]] * 2
    value = run.tree[f"sites/{path}"]["value"]
    seen = []
    handle = (
        pipe.get_submodule(path)
        if hasattr(pipe, "get_submodule")
        else pipe.transformer.get_submodule(path.partition(".")[2])
    )
    handle = handle.register_forward_hook(
        lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    call(pipe, guidance_scale=scale)
    handle.remove()
    first = seen[0][:2].float().numpy()  # both pipelines compute the branch with text first
    assert np.array_equal(value.isel(step=0).sel(branch="cond").values.reshape(first.shape), first)


@pytest.mark.parametrize("form", [torch.Tensor, list, dict])
def test_a_transformer_may_return_what_it_likes(made_up, form):
    want = call(made_up)
    made_up.transformer.form = form
    try:
        with interp.record(made_up, capture=interp.Capture(attention=None, sites=["transformer.block"])) as recording:
            got = call(made_up)
        run = recording.run
        assert torch.equal(got, want) and np.array_equal(run.final_latents.values, want.numpy())
        assert np.isfinite(run.noise_pred.values).all() and run.site("transformer.block").sizes["position"] == 16 * 24
        with interp.HookRegistry(made_up) as hooks:
            hooks.write("transformer:out", lambda x, at: x * 0)
            if form is list:
                with pytest.raises(interp.InterpError, match="a list passes at 'transformer:out', and no tensor"):
                    call(made_up)
            else:
                assert not torch.equal(call(made_up), want)
    finally:
        made_up.transformer.form = tuple


def test_a_traced_picture_and_the_sentence(made_up):
    with pytest.warns(UserWarning, match="no model family describes a MadeUpPipeline.*attention is unknown") as told:
        run = interp.trace(made_up, [A, B], steps=2, height=16, width=24, progress=False)
    assert [w.filename for w in told if "family" in str(w.message)] == [__file__]
    want = made_up(
        [A, B],
        num_inference_steps=2,
        height=16,
        width=24,
        generator=[torch.Generator().manual_seed(0) for _ in range(2)],
    )[0]
    assert np.array_equal(run.images.values, np.stack([np.asarray(p) for p in want]))
    assert "attention" not in run.tree.children and np.isfinite(run.noise_pred.values).all()


@pytest.mark.parametrize("attention", ["cross", "within_text", "all", "*block*", "*no such name*"])
def test_attention_is_refused(cogview, attention):
    capture = interp.Capture(attention=attention)
    with pytest.raises(interp.InterpError, match=r"CogView4Pipeline, so where text and image lie.*attention=None"):
        interp.plan(cogview, A, capture=capture, height=32, width=48)
    for site in ("*attn*:probs", "transformer.whatever:q"):
        with pytest.raises(interp.InterpError, match="where text and image lie"):
            interp.HookRegistry(cogview).read(site, print)


def test_text_is_refused_and_guidance_is_not(cogview):
    given = {"steps": 4, "height": 32, "width": 48, "guidance_scale": 3.0, "capture": BARE, "progress": False}
    with pytest.raises(interp.InterpError, match="where its text lies is unknown"):
        interp.trace(cogview, A, interventions=[interp.ReplacePrompt(B)], **given)
    with pytest.raises(interp.InterpError, match="where its text lies is unknown"):
        interp.plan(cogview, A, steps=4, height=32, width=48, capture=interp.Capture(attention=None, text=True))
    run = interp.trace(cogview, A, interventions=[interp.RemoveText(start=0.5)], **given)
    assert run.nfe.values.tolist() == [[2, 4]]


def test_branches_that_nothing_tells(made_up):
    """The scheduler is given something else than a combination of the two: refused, or kept without."""
    made_up.rescale = True
    try:
        told = "does not tell which is with text; call it without guidance"
        with pytest.raises(interp.InterpError, match=told), interp.record(made_up, capture=BARE):
            call(made_up)
        with interp.record(made_up, capture=interp.Capture(attention=None, noise_pred=False, image=False)) as recording:
            got = call(made_up)
        assert np.array_equal(recording.run.final_latents.values, got.numpy())
        assert (
            recording.run.nfe.values.tolist() == [[-1, -1]] * 2
            and np.isnan(recording.run.trajectory["guidance_scale"]).all()
        )
    finally:
        made_up.rescale = False
    with pytest.raises(interp.InterpError, match="does not name its branches, so interventions need guidance off"):
        interp.plan(made_up, A, interventions=[interp.RemoveText()], capture=BARE)


def test_rows_are_numbered_for_hooks(made_up):
    seen = []
    with interp.HookRegistry(made_up) as hooks:
        hooks.read("transformer.block", lambda x, at: seen.append((at.step, at.branch, x.shape[0])))
        call(made_up)
    assert seen == [(s, b, 2) for s in range(3) for b in ("#0", "#1")]


def test_a_glance_disturbs_nothing(cogview):
    """Text encoder hooks of others do not see it, nor does the global generator move."""
    seen = []
    interp.plan(cogview, A, capture=BARE, height=48, width=32, steps=3)
    with untouched(cogview), interp.HookRegistry(cogview) as hooks:
        hooks.read("text_encoder.layers.0", lambda x, at: seen.append(at.step))
        state = torch.get_rng_state()
        interp.plan(cogview, A, capture=BARE, height=48, width=48, steps=3)
        assert torch.equal(torch.get_rng_state(), state) and not seen
    assert find_family(cogview).name == "unknown"


def test_a_module_that_runs_twice_in_a_call_is_refused(cogview):
    """CogView4's feed-forward runs for the image, then for the text."""
    capture = interp.Capture(attention=None, sites=["transformer.transformer_blocks.0.ff"], image=False)
    with pytest.raises(interp.InterpError, match="runs several times within one call"):
        interp.trace(cogview, A, capture=capture, steps=2, height=32, width=48, progress=False)


def test_sites_have_shapes(cogview):
    table = {s.name: s for s in interp.sites(cogview, "transformer*", height=32, width=48)}
    assert table["transformer:out"].shape == (4, 16, 24)
    assert table["transformer.transformer_blocks.0.ff:out"].kind == "module"


def test_known_pipelines_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        interp.plan(pipelines.tiny("pixart_alpha"), A, height=32, width=48, options={"use_resolution_binning": False})
