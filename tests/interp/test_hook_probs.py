"""`hook_probs`: a torch hook, an nnsight edit and a writer of `…:probs` mean the same; what nobody changed is untouched."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

import interp
from interp.kernels import AttentionCall
from tests.families.pipelines import BUILDERS
from tests.interp.leftovers import fingerprint, untouched
from tests.interp.reference import tiny

K = {"num_inference_steps": 2, "output_type": "latent"}
A, B = "a red circle", "a dog on the blue square"
SD1 = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
SITES = {
    "sd1": SD1,
    "pixart_alpha": "transformer.transformer_blocks.1.attn2",
    "sd3": "transformer.transformer_blocks.0.attn",
    "flux": "transformer.single_transformer_blocks.0.attn",
}


def call(pipe, prompts=A, **more):
    count = len(prompts) if isinstance(prompts, list) else 1
    if "PixArt" in type(pipe).__name__:
        more["use_resolution_binning"] = False
    generators = [torch.Generator().manual_seed(s) for s in range(count)]
    return pipe(prompts, generator=generators, **{**K, **more}).images


def module(pipe, site):
    root, _, path = site.partition(".")
    return getattr(pipe, root).get_submodule(path)


def tripled(probs):
    """Any change of probabilities (…, key): the third key counts three times."""
    return torch.where(torch.arange(probs.shape[-1]) == 2, probs * 3, probs)


@pytest.mark.parametrize("name", SITES)
def test_all_ways_to_edit_mean_the_same(name):
    """Max difference 0 between a torch hook, nnsight (a trace, an edit in place, an intervention) and a writer."""
    pipe, site = BUILDERS[name](), SITES[name]  # its own: nnsight keeps its `forward` on what it has wrapped
    plain, images, before = call(pipe), {}, fingerprint(pipe)
    options = {**K, "use_resolution_binning": False} if name == "pixart_alpha" else K
    with interp.HookRegistry(pipe):
        module(pipe, site).hook_probs.register_forward_hook(lambda m, args, out: tripled(out))
        images["torch"] = call(pipe)
    assert not hasattr(module(pipe, site), "hook_probs")
    with interp.HookRegistry(pipe) as hooks:
        hooks.write(f"{site}:probs", lambda probs, at: tripled(probs))
        images["registry"] = call(pipe)
    assert fingerprint(pipe) == before
    names = [*getattr(pipe, site.split(".")[0]).state_dict()]
    model = interp.nnsight(pipe)
    probs = model.get(f"{site}.hook_probs")
    with model.generate(A, generator=torch.Generator().manual_seed(0), **options) as tracer:
        for _ in tracer.iter[:2]:
            probs.output = tripled(probs.output)
        images["nnsight"] = tracer.result.save()
    images["nnsight"] = images["nnsight"].images
    with model.generate(A, generator=torch.Generator().manual_seed(0), **options) as tracer:
        for _ in tracer.iter[:2]:
            probs.output[:] = tripled(probs.output)
        result = tracer.result.save()
    images["in place"] = result.images
    for way, image in images.items():
        assert torch.equal(image, images["registry"]), way
    assert not torch.equal(images["registry"], plain)
    with interp.HookRegistry(
        pipe
    ):  # once nnsight knows the model the child stays, but not a hook of an earlier context
        module(pipe, site).hook_probs.register_forward_hook(lambda m, args, out: tripled(out))
    with interp.HookRegistry(pipe):
        assert torch.equal(call(pipe), plain)
    assert [*getattr(pipe, site.split(".")[0]).state_dict()] == names
    assert "hook_probs" not in str([s.name for s in interp.sites(pipe)])


def test_an_nnsight_edit_as_an_intervention():
    pipe = BUILDERS["sd1"]()
    with interp.nnsight(pipe).edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            probs = edited.unet.mid_block.attentions[0].transformer_blocks[0].attn2.hook_probs
            probs.output = tripled(probs.output)
    for window in ({"start": 0.25, "stop": 0.75},):
        edit = interp.Edit(lambda probs, at: tripled(probs), f"{SD1}:probs", **window)
        runs = [
            interp.trace(pipe, A, steps=4, guidance_scale=5.0, interventions=[change], progress=False)
            for change in (interp.NNsightEdit(edited, **window), edit)
        ]
        assert np.array_equal(*(run.final_latents.values for run in runs))
        assert np.array_equal(*(run.attention("4x4").values for run in runs), equal_nan=True)
    # a later step alone: visits at which nobody waits are counted, though no probabilities are formed there
    with interp.nnsight(pipe).generate(A, seed=0, num_inference_steps=4, output_type="latent") as tracer:
        for _ in tracer.iter[2:3]:
            edited.unet.mid_block.attentions[0].transformer_blocks[0].attn2.hook_probs.output[:] = 0
        late = tracer.result.save()
    with interp.HookRegistry(pipe) as hooks:
        hooks.write(f"{SD1}:probs", lambda probs, at: probs * 0, steps=[2])
        want = call(pipe, num_inference_steps=4)
    assert torch.equal(late.images, want)


def test_a_cache_of_all_modules_leaves_probabilities_out():
    pipe = BUILDERS["sd1"]()
    model = interp.nnsight(pipe)
    probs = model.get(f"{SD1}.hook_probs")
    with model.generate(A, seed=0, **K) as tracer:
        cache = tracer.cache()
    assert len(cache["model.unet.mid_block"]) == 2
    assert not any("hook_probs" in name for name in cache.keys())  # noqa: SIM118, it is no dict
    with model.generate(A, seed=0, **K) as tracer:
        kept = tracer.cache(modules=[probs])
    read = []
    with interp.HookRegistry(pipe) as hooks:
        hooks.read(f"{SD1}:probs", lambda probs, at: read.append(probs.clone()))
        call(pipe)
    stored = kept[f"model.{SD1}.hook_probs"].output
    assert torch.equal(torch.cat(stored), torch.cat(read))


class Edited:
    """A plain processor of diffusers' `Attention`: eager softmax, the edit, probs @ value. Nothing of interp in it."""

    def __init__(self, edit):
        self.edit = edit

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for f, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        out = self.edit(torch.softmax(scores, -1)) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(-2))


def test_an_edit_equals_an_eager_processor():
    """Max difference 2e-5 relative to the largest latent: the same formula in another order of operations."""
    pipe = tiny("sd1")
    with untouched(pipe):
        attn = module(pipe, SD1)
        with interp.HookRegistry(pipe) as hooks:
            hooks.write(f"{SD1}:probs", lambda probs, at: tripled(probs))
            got = call(pipe, [A, B])
        own = attn.processor
        try:
            attn.processor = Edited(tripled)
            want = call(pipe, [A, B])
            attn.processor = Edited(lambda probs: probs)
            plain = call(pipe, [A, B])
        finally:
            attn.processor = own
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert (got - plain).abs().max() > 1e-2


def test_what_nobody_changed_is_the_kernels_own():
    pipe = tiny("sd1")
    plain, outputs = call(pipe, [A, B]), {}

    def keep(name, edit=None, **hook):
        """The module's output in the first step, and the picture."""
        with interp.HookRegistry(pipe) as hooks:
            if edit is not None:
                hooks.write(f"{SD1}:probs", edit, **hook)
            seen = []
            module(pipe, SD1).to_out[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
            handle = list(module(pipe, SD1).to_out[0]._forward_pre_hooks)[-1]
            image = call(pipe, [A, B])
            del module(pipe, SD1).to_out[0]._forward_pre_hooks[handle]
        outputs[name] = seen[0].unflatten(-1, (4, -1))  # (rows, query, head, feature)
        return image

    with untouched(pipe):
        assert torch.equal(keep("plain"), plain)
        # equal values, in a tensor of their own: identity is seen by value
        assert torch.equal(keep("clone", lambda probs, at: probs.clone()), plain)
        assert torch.equal(keep("other steps", lambda probs, at: probs * 2, steps=[]), plain)

        def one(probs, at):
            changed = probs.clone()
            changed[1, 2, 5] = 0
            return changed if at.branch == "cond" else None

        assert not torch.equal(keep("one query", one), plain)
        different = (outputs["one query"] != outputs["plain"]).any(-1).nonzero().tolist()
        assert different == [[3, 5, 2]]  # row 3 is the second sample with text; query 5, head 2
        assert outputs["one query"][3, 5, 2].abs().max() == 0
        with interp.HookRegistry(pipe):
            module(pipe, SD1).hook_probs.register_forward_hook(lambda m, args, out: None)
            assert torch.equal(call(pipe, [A, B]), plain)


def test_probabilities_are_formed_where_somebody_listens(monkeypatch):
    pipe, formed = tiny("sd1"), []
    own = AttentionCall.probabilities
    monkeypatch.setattr(AttentionCall, "probabilities", lambda self, *a: (formed.append(self.site), own(self, *a))[1])
    with interp.HookRegistry(pipe) as hooks:
        hooks.read("*:q", lambda q, at: None)
        call(pipe)
        assert not formed
        hooks.read(f"{SD1}:probs", lambda probs, at: None, steps=[1])
        call(pipe)
    assert formed == [SD1]
    model = interp.nnsight(own_pipe := BUILDERS["sd1"]())
    formed.clear()
    with model.generate(A, seed=0, **K) as tracer:
        for _ in tracer.iter[1:2]:
            model.get(f"{SD1}.hook_probs").output.save()
    assert formed == [SD1] and own_pipe is model.pipeline


def test_hooks_come_together():
    """A torch hook, then the registries' writers in the order in which they were entered; readers see what was used."""
    pipe, seen = tiny("sd1"), []
    with untouched(pipe), interp.HookRegistry(pipe) as outer, interp.HookRegistry(pipe) as inner:
        outer.read(f"{SD1}:probs", lambda probs, at: seen.append(probs.clone()))
        inner.write(f"{SD1}:probs", lambda probs, at: probs + 2)
        outer.write(f"{SD1}:probs", lambda probs, at: probs * 3)
        module(pipe, SD1).hook_probs.register_forward_hook(lambda m, args, out: out * 0 + 1)
        call(pipe)
    assert seen and all((probs == 5).all() for probs in seen)


def test_a_run_holds_the_probabilities_that_were_used():
    pipe = tiny("sd1")
    capture = interp.Capture(attention=SD1, heads="all", tokens="all", dtype="float32", branches=("cond", "uncond"))
    edit = interp.Edit(lambda probs, at: tripled(probs) if at.branch == "cond" else None, f"{SD1}:probs", start=0.5)
    first, changed = (
        interp.trace(pipe, A, steps=2, guidance_scale=5.0, capture=capture, interventions=c, progress=False)
        for c in ([], [edit])
    )
    before, after = (run.attention("4x4").values for run in (first, changed))
    assert np.array_equal(after[:, 0], before[:, 0])
    sums = after[:, 1].sum(-3)  # (sample, branch, layer, head, y, x)
    assert np.allclose(sums[:, 1], 1, atol=1e-5)
    assert np.allclose(sums[:, 0], 1 + 2 / 3 * after[:, 1, 0, :, :, 2], atol=1e-5)


def test_explicit_processors_are_edited_too():
    """diffusers' `AttnProcessor` forms probabilities itself: within 2e-5 of the fused kernel's edit."""
    pipe = BUILDERS["sd1"]()  # its own: turning slicing off leaves other processors behind

    def edited(edit):
        with interp.HookRegistry(pipe) as hooks:
            hooks.write(f"{SD1}:probs", lambda probs, at: edit(probs))
            return call(pipe, [A, B])

    want = edited(tripled)
    pipe.unet.set_attn_processor(AttnProcessor())
    plain, got = call(pipe, [A, B]), edited(tripled)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max() and not torch.equal(got, plain)
    assert torch.equal(edited(torch.clone), plain)
    pipe.enable_attention_slicing(1)
    with pytest.raises(interp.InterpError, match="slicing"):
        edited(tripled)


def test_a_run_is_planned_and_recorded_inside_a_registry():
    """What rehearses the model inside watches it for itself, and the registry around sees the run as well."""
    pipe, seen = tiny("sd1"), []
    capture = interp.Capture(attention=None, sites=(f"{SD1}:q",), image=False)
    with untouched(pipe), interp.HookRegistry(pipe) as hooks:
        hooks.read(f"{SD1}:q", lambda q, at: seen.append(q.clone()) if at.branch == "cond" else None)
        hooks.read(f"{SD1}:probs", lambda probs, at: None)
        run = interp.trace(pipe, A, steps=2, guidance_scale=5.0, capture=capture, progress=False)
    assert np.array_equal(run.site(f"{SD1}:q").sel(branch="cond").values[0], torch.cat(seen).numpy())


class Unseen(Edited):
    """A processor that calls none of the known kernels."""


def test_messages_and_exceptions():
    pipe = tiny("sd1")
    plain = call(pipe)
    with untouched(pipe):
        with interp.HookRegistry(pipe) as hooks:
            hooks.write(f"{SD1}:probs", lambda probs, at: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                call(pipe)
        with interp.HookRegistry(pipe):
            module(pipe, SD1).hook_probs.register_forward_hook(lambda m, args, out: out[:, :1])
            with pytest.raises(interp.InterpError, match=r"were changed to \(2, 1, 16, 77\), but \(2, 4, 16, 77\)"):
                call(pipe)
        assert torch.equal(call(pipe), plain)
        attn = module(pipe, SD1)
        assert isinstance(attn, Attention)
        own = attn.processor
        try:
            attn.processor = Unseen(lambda probs: probs)
            with interp.HookRegistry(pipe):
                call(pipe)  # nobody asked
                attn.hook_probs.register_forward_hook(lambda m, args, out: None)
                with pytest.raises(interp.InterpError, match="processor Unseen"):
                    call(pipe)
        finally:
            attn.processor = own
