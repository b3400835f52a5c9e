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
    whole = run.attention("16x16")
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
