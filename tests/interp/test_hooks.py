"""The hook registry as its users meet it: reading, writing, nesting, several pipelines."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import interp
from tests.families.pipelines import sd1
from tests.interp.leftovers import untouched
from tests.interp.reference import SCALE, Eager, noise, sample, states, tiny

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
A, B = "a red circle", "a dog on the blue square background"


def call(pipe, prompts=(A, B), steps=2, scale=SCALE, **more):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(
        list(prompts), num_inference_steps=steps, guidance_scale=scale, generator=generators, output_type="latent",
        **more,
    ).images  # fmt: skip


def test_reading_every_quantity():
    """q, k, v, probs, in and out of one site, branch by branch, against plain torch hooks on its modules."""
    pipe, seen, plain = tiny("sd1"), {}, {}
    module = pipe.unet.get_submodule(SITE.removeprefix("unet."))
    handles = [getattr(module, f"to_{q}").register_forward_hook(
        lambda m, a, out, q=q: plain.setdefault(q, []).append(out.clone())) for q in "qkv"]  # fmt: skip
    handles.append(module.register_forward_hook(lambda m, a, out: plain.setdefault("out", []).append(out.clone())))
    handles.append(module.register_forward_pre_hook(lambda m, a: plain.setdefault("in", []).append(a[0].clone())))
    try:
        with untouched(pipe), interp.HookRegistry(pipe) as hooks, Eager(pipe.unet) as eager:
            for quantity in ("in", "out", "q", "k", "v", "probs"):
                found = hooks.read(
                    f"{SITE}:{quantity}", lambda x, at: seen.setdefault(at.site, []).append((at, x.clone()))
                )
                assert found == [f"{SITE}:{quantity}"]
            plain.clear()
            eager.probs.clear()
            call(pipe)
    finally:
        for handle in handles:
            handle.remove()
    for quantity in ("in", "out", "q", "k", "v", "probs"):
        got = seen[f"{SITE}:{quantity}"]
        order = [(at.step, at.branch, at.samples, at.evaluation) for at, _ in got]
        assert order == [(s, b, 2, 0) for s in (0, 1) for b in ("uncond", "cond")]
        assert [at.timestep for at, _ in got] == [501.0, 501.0, 1.0, 1.0]
        for i, (at, x) in enumerate(got):
            rows = slice(0, 2) if at.branch == "uncond" else slice(2, 4)
            if quantity == "probs":
                want = torch.from_numpy(eager.probs[SITE][at.step][rows])
                assert torch.allclose(x.double(), want, atol=1e-5)
            elif quantity in "qkv":
                want = plain[quantity][i // 2][rows].unflatten(-1, (4, -1)).transpose(1, 2)
                assert torch.equal(x, want)
            else:
                assert torch.equal(x, plain[quantity][i // 2][rows])


def test_writing_nothing_or_the_same_is_bit_equal():
    pipe = tiny("sd1")
    want = call(pipe)
    for quantity in ("out", "in", "probs"):
        for edit in (lambda x, at: None, lambda x, at: x):
            with interp.HookRegistry(pipe) as hooks:
                hooks.write(f"{SITE}:{quantity}", edit)
                got = call(pipe)
            if quantity == "probs" and edit(0, None) is not None:  # the output becomes p @ v: another order of sums
                assert torch.allclose(got, want, atol=1e-4)
            else:
                assert torch.equal(got, want), quantity


def test_writing_an_output_equals_a_plain_hook():
    pipe = tiny("sd1")
    module = pipe.unet.mid_block
    handle = module.register_forward_hook(lambda m, a, out: torch.cat([out[:2], out[2:] * 0.5]))
    want = call(pipe)
    handle.remove()
    with interp.HookRegistry(pipe) as hooks:
        hooks.write("unet.mid_block:out", lambda x, at: x * 0.5 if at.branch == "cond" else None)
        got = call(pipe)
    assert torch.equal(got, want)
    assert not torch.equal(want, call(pipe))


class Doubled:
    """An eager processor that doubles the attention to one token in the cond rows, and renormalises."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        heads = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = (heads(f(x)) for f, x in (
            (attn.to_q, hidden_states), (attn.to_k, encoder_hidden_states), (attn.to_v, encoder_hidden_states)))  # fmt: skip
        p = torch.softmax((q @ k.transpose(-1, -2)).double() * attn.scale, -1)
        weight = torch.ones(p.shape[0], 1, 1, p.shape[-1], dtype=p.dtype)
        weight[p.shape[0] // 2 :, ..., 2] = 2
        p = p * weight
        out = ((p / p.sum(-1, keepdim=True)).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def test_editing_probabilities_equals_an_explicit_processor():
    pipe = sd1()
    plain = call(pipe)

    def double(p, at):
        if at.branch == "uncond":
            return None
        p = p.clone()
        p[..., 2] *= 2
        return p / p.sum(-1, keepdim=True)

    with untouched(pipe), interp.HookRegistry(pipe) as hooks:
        hooks.write("*attn2:probs", double)
        got = call(pipe)
    pipe.unet.set_attn_processor(
        {n: Doubled() if "attn2" in n else AttnProcessor2_0() for n in pipe.unet.attn_processors}
    )
    want = call(pipe)
    scale = float(want.abs().max())
    assert float((got - want).abs().max()) <= 1e-5 * max(1, scale)
    assert float((got - plain).abs().max()) > 1e-2


def test_a_reader_sees_what_writers_made():
    pipe, seen = tiny("sd1"), []
    with interp.HookRegistry(pipe) as hooks:
        hooks.read("unet.mid_block:out", lambda x, at: seen.append(float(x.mean())))
        hooks.write("unet.mid_block:out", lambda x, at: torch.ones_like(x))
        hooks.write("unet.mid_block:out", lambda x, at: x * 3)  # in order
        call(pipe, steps=1)
    assert seen == [3.0, 3.0]


def test_an_edit_of_another_shape_is_refused():
    pipe = tiny("sd1")
    with untouched(pipe), pytest.raises(interp.InterpError, match="returned shape"), interp.HookRegistry(pipe) as h:
        h.write("unet.mid_block:out", lambda x, at: x[:1])
        call(pipe)


def test_globs_select_and_name_the_nearest():
    pipe = tiny("sd1")
    hooks = interp.HookRegistry(pipe)
    found = hooks.read("*attn2:probs", lambda x, at: None)
    assert len(found) == 4 and all(f.endswith("attn2:probs") for f in found)
    with pytest.raises(interp.InterpError, match=r"no site matches 'unet.mid_blok:out'; did you mean 'unet.mid_block'"):
        hooks.read("unet.mid_blok:out", lambda x, at: None)
    with pytest.raises(interp.InterpError, match=r"quantity 'prob'.*did you mean 'probs'"):
        hooks.read(f"{SITE}:prob", lambda x, at: None)


def test_a_site_added_while_active():
    pipe, seen = tiny("sd1"), []
    with untouched(pipe), interp.HookRegistry(pipe) as hooks:
        call(pipe, steps=1)
        hooks.read(f"{SITE}:probs", lambda x, at: seen.append(at.branch))
        hooks.read("unet.conv_out:out", lambda x, at: seen.append(at.branch))
        call(pipe, steps=1)
        assert seen == ["uncond", "cond"] * 2
    call(pipe, steps=1)
    assert len(seen) == 4


def test_a_registry_can_be_used_again():
    pipe, seen = tiny("sd1"), []
    hooks = interp.HookRegistry(pipe)
    hooks.read("unet.mid_block:out", lambda x, at: seen.append(at.step))
    for _ in range(2):
        with hooks:
            call(pipe, steps=1)
    assert seen == [0] * 4
    with hooks, pytest.raises(interp.InterpError, match="active already"), hooks:
        pass


def test_planning_and_recording_do_not_disturb_a_registry():
    pipe, seen = tiny("sd1"), []
    with untouched(pipe), interp.HookRegistry(pipe) as hooks:
        hooks.read("unet.mid_block:out", lambda x, at: seen.append((at.step, at.branch, type(x))))
        hooks.read(f"{SITE}:probs", lambda x, at: seen.append((at.step, at.branch, type(x))))
        interp.trace(pipe, A, steps=2, guidance_scale=SCALE, progress=False)
    assert len(seen) == 8
    assert set(seen) == {(s, b, torch.Tensor) for s in (0, 1) for b in ("cond", "uncond")}


def test_a_users_edit_is_recorded_by_record_inside_and_outside():
    pipe = tiny("sd1")
    with interp.HookRegistry(pipe) as hooks:
        hooks.write("unet.mid_block:out", lambda x, at: x * 0.5)
        want = call(pipe)
    for outer in (True, False):
        with untouched(pipe):
            if outer:
                with interp.HookRegistry(pipe) as hooks, interp.record(pipe) as recording:
                    hooks.write("unet.mid_block:out", lambda x, at: x * 0.5)
                    got = call(pipe)
            else:
                with interp.record(pipe) as recording, interp.HookRegistry(pipe) as hooks:
                    hooks.write("unet.mid_block:out", lambda x, at: x * 0.5)
                    got = call(pipe)
        assert torch.equal(got, want)
        assert np.array_equal(recording.run.final_latents.values, want.numpy())


def removed(pipe, hooks, step=1):
    """A user's own RemoveText: the cond rows leave the batch from `step` on."""

    def edit(denoiser_call):
        if denoiser_call.step >= step:
            denoiser_call.keep = ("uncond",)

    hooks.on_call(edit)


@pytest.mark.parametrize("watcher", ["outer", "inner"])
def test_dropped_branches_are_seen_by_every_registry(watcher):
    """Whichever registry is entered first: site, attention and prediction tell the rows that really ran."""
    pipe, seen = tiny("sd1"), []
    a, b = interp.HookRegistry(pipe), interp.HookRegistry(pipe)
    watching, dropping = (a, b) if watcher == "outer" else (b, a)
    watching.read("unet.mid_block:out", lambda x, at: seen.append(("out", at.step, at.branch, x.shape[0])))
    watching.read(f"{SITE}:probs", lambda x, at: seen.append(("probs", at.step, at.branch, x.shape[0])))
    watching.on_prediction(lambda p: seen.append(("prediction", p.call.step, tuple(p.outputs), 2)))
    removed(pipe, dropping)
    with untouched(pipe), a, b:
        got = call(pipe)
    assert set(seen) == {
        *((q, 0, branch, 2) for q in ("out", "probs") for branch in ("uncond", "cond")),
        ("out", 1, "uncond", 2), ("probs", 1, "uncond", 2),
        ("prediction", 0, ("uncond", "cond"), 2), ("prediction", 1, ("uncond",), 2),
    }  # fmt: skip
    want = sample(
        pipe, states(pipe, [A, B]), states(pipe, ["", ""]), [0, 1], 2, SCALE,
        keep=lambda i: ("uncond",) if i == 1 else ("uncond", "cond"),
    ).final  # fmt: skip
    assert torch.equal(got, want)


@pytest.mark.parametrize("order", ["record first", "registry first"])
def test_record_counts_what_a_user_dropped(order):
    pipe = tiny("sd1")
    capture = interp.Capture(branches=("cond", "uncond"))
    hooks = interp.HookRegistry(pipe)
    removed(pipe, hooks)
    recording = interp.record(pipe, capture=capture)
    with untouched(pipe):
        if order == "record first":
            with recording as r, hooks:
                call(pipe)
        else:
            with hooks, recording as r:
                call(pipe)
    assert r.run.nfe.values.tolist() == [[1, 2]] * 2
    assert np.isnan(r.run.noise_pred.isel(step=1).sel(branch="cond").values).all()
    assert np.isnan(r.run.attention("4x4").isel(step=1).sel(branch="cond").values).all()
    assert not np.isnan(r.run.noise_pred.isel(step=1).sel(branch="uncond").values).any()


def test_remove_text_watched_from_outside():
    pipe, seen = tiny("sd1"), []
    with interp.HookRegistry(pipe) as hooks:
        hooks.read("unet.mid_block:out", lambda x, at: seen.append((at.step, at.branch, x.shape[0])))
        interp.trace(
            pipe, [A, B], steps=2, guidance_scale=SCALE, interventions=[interp.RemoveText(start=0.5)], progress=False,
            batch_size=2,
        )  # fmt: skip
    assert seen == [(0, "uncond", 2), (0, "cond", 2), (1, "uncond", 2)]


def test_text_encoder_sites():
    """The text encoder can be read and written; a halved state equals editing the embeddings."""
    pipe, seen = tiny("sd1"), []
    with untouched(pipe), interp.HookRegistry(pipe) as hooks:
        hooks.read("text_encoder:out", lambda x, at: seen.append((tuple(x.shape), at.samples, x.clone())))
        call(pipe, steps=1)
    assert [s[:2] for s in seen] == [((2, 77, 32), 2)] * 2
    assert torch.equal(seen[0][2], states(pipe, [A, B])) and torch.equal(seen[1][2], states(pipe, ["", ""]))
    site = "text_encoder.encoder.layers.1.mlp:out"
    module = pipe.text_encoder.encoder.layers[1].mlp
    handle = module.register_forward_hook(lambda m, a, out: out * 0.5)
    want = call(pipe, steps=1)
    handle.remove()
    with interp.HookRegistry(pipe) as hooks:
        assert hooks.write(site, lambda x, at: x * 0.5) == [site]
        assert torch.equal(call(pipe, steps=1), want)


def test_two_pipelines_do_not_see_each_other():
    one, two, seen = tiny("sd1"), sd1(), []
    with interp.HookRegistry(one) as a, interp.HookRegistry(two) as b:
        for name, hooks in (("one", a), ("two", b)):
            hooks.read("unet.mid_block:out", lambda x, at, name=name: seen.append((name, "out", at.step)))
            hooks.read(f"{SITE}:probs", lambda x, at, name=name: seen.append((name, "probs", at.step)))
            hooks.on_step(lambda end, name=name: seen.append((name, "step", end.step)))
        call(one, steps=1)
        assert {s[0] for s in seen} == {"one"} and {s[2] for s in seen} == {0}
        seen.clear()
        call(two, steps=2)
        assert {s[0] for s in seen} == {"two"} and {s[2] for s in seen} == {0, 1}


def test_recording_one_pipeline_while_another_runs_inside():
    """A callback that runs another pipeline leaves the record alone."""
    one, two = tiny("sd1"), sd1()
    want = call(one)

    def other(pipe, step, timestep, kwargs):
        call(two, prompts=[B], steps=1)
        return kwargs

    with untouched(one), interp.record(one) as recording:
        got = call(one, callback_on_step_end=other)
    assert torch.equal(got, want)
    assert len(recording.run) == 2 and recording.run.nfe.values.tolist() == [[2, 2]] * 2


def test_guidance_off_has_one_branch():
    pipe, seen = tiny("sd1"), []
    with interp.HookRegistry(pipe) as hooks:
        hooks.read("unet.mid_block:out", lambda x, at: seen.append((at.branch, x.shape[0])))
        call(pipe, steps=1, scale=1.0)
    assert seen == [("cond", 2)]


def test_compiled_denoisers_are_not_silently_empty():
    """Hooks that are added after compilation are easily ignored: here every layer is there, and it is the right one."""
    pipe, options = tiny.__wrapped__("sd3"), {"max_sequence_length": 24}
    arguments = {
        "steps": 1,
        "guidance_scale": 1.0,
        "progress": False,
        "capture": interp.Capture(image=False),
        "options": options,
    }
    plain = interp.trace(pipe, A, **arguments)
    torch._dynamo.reset()
    pipe.transformer.compile(backend="eager")
    try:
        pipe(A, num_inference_steps=1, guidance_scale=1.0, output_type="latent", **options)
        with pytest.warns(UserWarning, match="runs eagerly"):
            run = interp.trace(pipe, A, **arguments)
    finally:
        torch._dynamo.reset()
    assert plain.grids
    for grid in plain.grids:
        assert np.allclose(run.attention(grid).values, plain.attention(grid).values, atol=1e-2, equal_nan=True)


def test_a_registry_does_not_keep_tensors():
    """Nothing of a run is held after it: the noise that went in can be freed."""
    import gc
    import weakref

    pipe = tiny("sd1")
    hooks = interp.HookRegistry(pipe)
    kept = []
    with hooks:
        hooks.read("unet.mid_block:out", lambda x, at: kept.append(weakref.ref(x)))
        call(pipe, steps=3)
        gc.collect()
        assert len(kept) == 6 and not any(r() is not None for r in kept[:4])
    assert noise(pipe, [0]).shape == (1, 4, 8, 8)
