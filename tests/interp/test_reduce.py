"""A user's own reduction of attention, against the same computed from the whole maps."""

import numpy as np
import pytest
import torch

import interp
from interp.hooks import At
from tests.families.pipelines import tiny


def entropy(probs: torch.Tensor, at: At) -> torch.Tensor:
    """Mean entropy over the queries: (sample, head)."""
    return -(probs * probs.clamp_min(1e-12).log()).sum(-1).mean(-1)


def test_equals_the_reduction_of_stored_maps() -> None:
    prompts = ["a red cat", "a blue dog on a background"]
    capture = interp.Capture(tokens="all", heads="all", dtype="float32", reduce={"entropy": entropy})
    run = interp.trace(tiny("sd1"), prompts, steps=3, capture=capture, progress=False)
    kept = run.tree["sites/entropy"]["value"]
    whole = run.attention("8x8")
    p = whole.values.astype("float64")
    expected = -(p * np.log(np.maximum(p, 1e-12))).sum(-3).mean((-1, -2))  # (sample, step, branch, layer, head)
    mine = kept.sel(layer=whole["layer"].values).values
    assert mine.shape == expected.shape
    np.testing.assert_allclose(mine, expected, atol=1e-5)
    assert run.attrs["capture"]["reduce"]["entropy"][1].endswith("test_reduce.entropy")


def test_without_storing_maps_and_for_chosen_layers() -> None:
    capture = interp.Capture(attention=None, reduce={"mid": ("*mid_block*attn2", entropy)}, branches=("cond", "uncond"))
    run = interp.trace(
        tiny("sd1"), "a red cat", steps=4, capture=capture, interventions=[interp.RemoveText(start=0.5)], progress=False
    )
    value = run.tree["sites/mid"]["value"]
    assert run.grids == [] and value.sizes["layer"] == 1
    missing = value.isnull().all(["sample", "layer", "axis_0"])
    assert missing.sel(branch="cond").values.tolist() == [False, False, True, True]
    assert not missing.sel(branch="uncond").any()


@pytest.mark.parametrize(
    ("fn", "sentence"),
    [
        (lambda p, at: p.mean(), r"must return \(sample, …\)"),
        (lambda p, at: p.mean(1), "different shapes for different layers"),
        (lambda p: p, "fails on probabilities"),
    ],
)
def test_a_wrong_function_is_refused_before_anything_runs(fn: object, sentence: str) -> None:
    with pytest.raises(interp.InterpError, match=sentence):
        interp.plan(tiny("sd1"), "a cat", capture=interp.Capture(reduce={"bad": fn}))


EVERY = {"heads": "all", "tokens": "all", "dtype": "float32", "branches": ("cond", "uncond"), "image": False}
PROMPTS = [{"prompt": "a red cat", "negative_prompt": "a dog"}, {"prompt": "a blue dog on a background"}]
NAMED = ["entropy", "role_mass", "token_mass", "mean_map", "daam"]


@pytest.fixture(scope="module")
def whole() -> "interp.stores.Run":
    capture = interp.Capture(**EVERY, reduce=NAMED)
    return interp.trace(tiny("sd1"), PROMPTS, steps=3, capture=capture, progress=False, guidance_scale=4.0)


def maps_of(run: "interp.stores.Run") -> "np.ndarray":
    """Probabilities of the layers of the largest grid (sample, step, branch, layer, head, token, y, x)."""
    return run.attention("8x8").values.astype("float64")


def test_named_reductions_equal_those_of_stored_maps(whole: "interp.stores.Run") -> None:
    p, order = maps_of(whole), list(whole.attention("8x8").layer.values)

    def value(name: str) -> np.ndarray:
        kept = whole.site(name)
        return kept.sel(layer=order).values if "layer" in kept.dims else kept.values

    np.testing.assert_allclose(value("entropy"), -(p * np.log(np.maximum(p, 1e-12))).sum(-3).mean((-1, -2)), atol=1e-5)
    np.testing.assert_allclose(value("token_mass"), p.mean((-1, -2)), atol=1e-6)
    assert whole.site("token_mass").token_text.values[0, 2] == "red"
    daam = whole.site("daam")
    assert daam.dims == ("sample", "step", "branch", "token", "y", "x") and daam.step.values.tolist() == [2]
    mean = whole.site("mean_map")
    assert dict(mean.sizes)["y"] == 8 and len(whole.grids) == 2
    for grid in whole.grids:  # a smaller grid's cells are repeated
        own = whole.attention(grid).mean(("step", "head")).transpose("sample", "branch", "layer", ...)
        large = own.values.repeat(8 // own.sizes["query_y"], -1).repeat(8 // own.sizes["query_y"], -2)
        np.testing.assert_allclose(mean.sel(layer=own.layer).values[:, 0], large, atol=1e-6)


def test_layers_of_different_numbers_of_heads() -> None:
    """Stable Diffusion 2 and XL: the reductions of each layer's own heads, and nothing beyond them."""
    capture = interp.Capture(**{**EVERY, "branches": "cond"}, reduce=["entropy", "token_mass"])
    run = interp.trace(tiny("sd2"), "a red cat", steps=2, capture=capture, progress=False)
    heads = {run.attention(grid).sizes["head"] for grid in run.grids}
    assert len(heads) > 1 and run.site("entropy").sizes["head"] == max(heads)
    for grid in run.grids:
        p = run.attention(grid)
        mass = run.site("token_mass").sel(layer=p.layer).values
        np.testing.assert_allclose(mass[..., : p.sizes["head"], :], p.mean(("query_y", "query_x")).values, atol=1e-6)
        assert np.isnan(mass[..., p.sizes["head"] :, :]).all()


@pytest.mark.parametrize(("probe", "variable"), [("head_relevance", "votes"), ("attention_mass", "mass_per_token")])
def test_probes_read_the_mass_of_tokens_in_place_of_maps(whole, probe: str, variable: str) -> None:
    maps, reduced, neither = (
        interp.stores.Run(whole.tree.drop_nodes(n)) for n in ("sites", "attention", ["sites", "attention"])
    )
    want, got, both = (run.probe(probe)[variable] for run in (maps, reduced, whole))
    np.testing.assert_allclose(got.sel(layer=want.layer).values, want.values, atol=1e-6)
    assert both.equals(got) and np.isfinite(got).any()
    with pytest.raises(interp.InterpError, match=r"did not capture: .*reduce=\[.token_mass.\]"):
        neither.probe(probe)


def test_mass_of_roles_is_that_of_each_branch_s_own_tokens(whole: "interp.stores.Run") -> None:
    """All roles together hold all probability; the negative prompt has fewer words than the prompt."""
    mass, p = whole.site("role_mass"), whole.attention("8x8")
    np.testing.assert_allclose(mass.sum("role").values, 1, atol=1e-5)
    roles = p.token_role.values[0]
    expected = p.isel(sample=0).sel(branch="cond").values[..., roles == "word", :, :].sum(-3).mean((-1, -2))
    got = mass.isel(sample=0).sel(branch="cond", role="word", layer=p.layer.values).values
    np.testing.assert_allclose(got, expected, atol=1e-5)
    two = p.isel(sample=0).sel(branch="uncond").values[..., 1:3, :, :].sum(-3).mean((-1, -2))  # bos, "a", "dog", eos …
    got = mass.isel(sample=0).sel(branch="uncond", role="word", layer=p.layer.values).values
    np.testing.assert_allclose(got, two, atol=1e-5)


def summed(run: "interp.stores.Run", size: tuple[int, int]) -> np.ndarray:
    """DAAM's sum by hand: (sample, branch, token, y, x), each map brought to the size before it is added."""
    total = np.zeros(1)
    for grid in run.grids:
        maps = torch.from_numpy(run.attention(grid).sum("head", skipna=False).values)
        for step, layer in np.ndindex(maps.shape[1], maps.shape[3]):
            one = maps[:, step, :, layer].flatten(0, 1)
            gaps = one.isnan().any((-1, -2), keepdim=True)
            large = torch.nn.functional.interpolate(one.nan_to_num(), size=size, mode="bicubic").clamp(min=0)
            one = one if tuple(one.shape[-2:]) == size else large.masked_fill(gaps, float("nan"))
            part = one.unflatten(0, (maps.shape[0], maps.shape[2])).numpy()
            total = np.nansum([np.broadcast_to(total, part.shape), part], axis=0)
    return total


def test_sums_brought_to_the_largest_grid_and_appended_calls() -> None:
    """Layers of two grids, against torch's own bicubic; each call of `record` has sums of its own."""
    pipe = interp.load("scenes")
    capture = interp.Capture(**{**EVERY, "branches": ("cond",)}, reduce=["daam"])
    with interp.record(pipe, capture=capture) as recording:
        for prompt in ("a red circle", "a large blue star"):
            pipe(prompt, num_inference_steps=2, guidance_scale=4.0, height=64, width=64, output_type="latent")
    run = recording.run
    daam, want = run.site("daam"), summed(run, (16, 16))
    assert len(run.grids) > 1
    width = min(want.shape[2], daam.sizes["token"])
    used = (daam.token_role.values != "")[:, :width]
    got = daam.values[:, 0, 0, :width]
    np.testing.assert_allclose(got[used], want[:, 0, :width][used], rtol=1e-4, atol=1e-4)


def test_named_reductions_in_a_capture() -> None:
    capture = interp.Capture(reduce=["entropy"])
    assert interp.Capture.from_spec(capture.spec()) == interp.Capture(reduce={"entropy": ("cross", "entropy")})
    with pytest.raises(interp.InterpError, match="did you mean 'entropy'"):
        interp.Capture(reduce={"e": "entropie"})
    with pytest.raises(interp.InterpError, match="is of image → text, which"):
        interp.plan(tiny("sd1"), "a cat", capture=interp.Capture(reduce={"m": ("self", "role_mass")}))
    plan = interp.plan(tiny("sd1"), "a cat", steps=3, capture=interp.Capture(reduce={"e": ("self", "entropy")}))
    assert plan.layout.arrays["sites/e/value"].shape == (1, 3, 1, 4, 4)


def test_a_branch_that_is_dropped_in_some_steps_is_summed_over_the_others() -> None:
    settings = {
        "steps": 4,
        "guidance_scale": 4.0,
        "progress": False,
        "capture": interp.Capture(**EVERY, reduce=["daam"]),
    }
    run = interp.trace(tiny("sd1"), "a red cat", interventions=[interp.RemoveText(start=0.5)], **settings)
    np.testing.assert_allclose(run.site("daam").values[:, 0], summed(run, (8, 8)), atol=1e-4)
    assert np.isnan(maps_of(run)[0, 2:, 0]).all()
