"""Hidden states of text encoders, against transformers' own."""

import numpy as np
import pytest
import torch

import interp
from interp.families import find_family
from tests.families.pipelines import BUILDERS, tiny

A, B = "a red circle", "a dog on the blue square background"
CAPTURE = interp.Capture(attention=None, image=False, text="layers")
OPTIONS = {"sd3": {"max_sequence_length": 24}, "flux": {"max_sequence_length": 24}}


def traced(name, **more):
    return interp.trace(
        tiny(name), [{"prompt": A, "negative_prompt": "a cat"}, {"prompt": B}], steps=1, guidance_scale=4.0, height=16,
        width=16, batch_size=2, capture=CAPTURE, progress=False, **{"options": OPTIONS.get(name, {}), **more},
    )  # fmt: skip


@torch.no_grad()
def own(encoder, ids, **more):
    return torch.stack(encoder(torch.tensor(ids), output_hidden_states=True, **more).hidden_states, 1)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_states_of_every_encoder_and_layer(name):
    run, pipe = traced(name), tiny(name)
    prompts = {"cond": [A, B], "uncond": ["a cat", ""]}
    encoders = find_family(pipe).text_encoders
    assert set(run.tree["text"].children) == set(encoders)
    for encoder_name, (tokenizer, encoder) in encoders.items():
        hidden = run.tree[f"text/{encoder_name}/hidden"]
        assert hidden.dims == ("sample", "branch", "layer", "token", "hidden_feature")
        for branch, texts in prompts.items():
            got = hidden.sel(branch=branch).values
            if branch == "uncond" and name == "flux":
                assert np.isnan(got).all()
                continue
            ids = tokenizer(texts, padding="max_length", max_length=hidden.sizes["token"])["input_ids"]
            want = own(encoder, ids).numpy()
            layers = min(want.shape[1], got.shape[1])
            np.testing.assert_allclose(got[:, : layers - 1], want[:, : layers - 1], atol=1e-5)  # the last may be normed
        assert run.tree[f"text/{encoder_name}"]["token_role"].values.shape == (2, hidden.sizes["token"])


def test_prompts_of_different_lengths_without_the_template():
    """Qwen-Image: the rows are those of the words and what follows them; the last layer, normed, is what is read."""
    run, pipe = traced("qwenimage"), tiny("qwenimage")
    node = run.tree["text/text_encoder"]
    hidden, states = node["hidden"].sel(branch="cond").values, node["embeddings"].sel(branch="cond").values
    assert np.array_equal(np.isnan(hidden[:, -1]), np.isnan(states))
    with torch.no_grad():
        normed = pipe.text_encoder.model.language_model.norm(torch.from_numpy(hidden[:, -1])).numpy()
    np.testing.assert_allclose(normed, states, atol=1e-5)


def test_the_guidance_term():
    run = interp.trace(
        tiny("sd1"), A, steps=2, guidance_scale=4.0, progress=False, interventions=[interp.RemoveText(start=0.5)]
    )
    term, noise = run.guidance, run.noise_pred
    assert term.dims == ("sample", "step", "channel", "y", "x")
    first = noise.isel(step=0)
    assert np.array_equal(term.values[:, 0], first.sel(branch="cond").values - first.sel(branch="uncond").values)
    assert np.isnan(term.values[:, 1]).all()
    with pytest.raises(interp.InterpError, match="choose True, False or 'layers'"):
        interp.Capture(text="all")


def test_a_plan_leaves_a_fresh_encoder_able_to_show_its_layers():
    """transformers puts its hooks on when layers are first asked for, and notes that it did: a plan must not part the two."""
    pipe = BUILDERS["sd1"]()
    before = {name: set(vars(module)) for name, module in pipe.text_encoder.named_modules()}
    assert interp.plan(pipe, A, steps=1, height=16, width=16, capture=interp.Capture(text="layers")).memory > 0
    assert {name: set(vars(module)) for name, module in pipe.text_encoder.named_modules()} == before
    ids = torch.tensor(pipe.tokenizer([A], padding="max_length", max_length=77)["input_ids"])
    assert own(pipe.text_encoder, ids.tolist()).shape[1] == pipe.text_encoder.config.num_hidden_layers + 1
