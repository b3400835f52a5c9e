"""What the plan says a run will take, against the files that it took."""

import numpy as np
import pytest

import interp
from tests.interp.reference import SCALE, tiny

A, B = "a red circle", "a dog on the blue square background"
CROSS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def files(path, *, below=""):
    return sum(f.stat().st_size for f in (path / below).rglob("*") if f.is_file())


CAPTURES = {
    "trajectory": {"attention": None},
    "sites": {
        "attention": None,
        "sites": ("unet.mid_block:update", f"{CROSS}:[qkv]", f"{CROSS}:q", f"{CROSS}:k", f"{CROSS}:v"),
    },
    "both branches": {"attention": None, "sites": f"{CROSS}:v", "branches": ("cond", "uncond"), "text": True},
    "few steps": {"attention": None, "steps": [0, 3], "sites": f"{CROSS}:k", "noise_pred": False, "latents": False},
}
CAPTURES["sites"]["sites"] = tuple(s for s in CAPTURES["sites"]["sites"] if "[" not in s)
CONDITIONS = {
    "baseline": [],
    "late": [interp.RemoveText(start=0.5)],
    "swapped": [interp.ReplacePrompt(B, start=2, stop=3, unit="step")],
}


@pytest.mark.parametrize("name", CAPTURES)
def test_bytes_on_disk(name, tmp_path):
    """Within 5 % of the files where nothing is compressed, whatever is repeated and whatever is left out."""
    settings = {
        "steps": 5, "guidance_scale": SCALE, "seeds": [0, 1], "conditions": CONDITIONS, "batch_size": 2,
        "capture": interp.Capture(**CAPTURES[name]),
    }  # fmt: skip
    plan = interp.plan(tiny("sd1"), A, **settings)
    interp.trace(tiny("sd1"), A, store=tmp_path / "run.zarr", progress=False, **settings)
    assert plan.bytes == pytest.approx(files(tmp_path / "run.zarr"), rel=0.05)
    for array, predicted in plan.bytes_by_array.items():
        if array.endswith("/value") or array.startswith("trajectory/noise"):
            found = files(tmp_path / "run.zarr", below=f"{array}/c")
            assert predicted == pytest.approx(found, rel=0.05), array


def test_bytes_of_attention_are_those_before_compression(tmp_path):
    capture = interp.Capture(attention="all", heads="all", tokens="all", latents=False, noise_pred=False, image=False)
    settings = {"steps": 6, "guidance_scale": SCALE, "seeds": [0, 1], "capture": capture}
    plan = interp.plan(tiny("sd1"), A, **settings)
    run = interp.trace(tiny("sd1"), A, store=tmp_path / "run.zarr", progress=False, **settings)
    logical = sum(v.nbytes for n in run.tree.subtree for name, v in n.data_vars.items() if name == "probs")
    predicted = sum(b for name, b in plan.bytes_by_array.items() if name.endswith("probs"))
    assert predicted == pytest.approx(logical, rel=0.05)
    assert 0.4 * plan.bytes < files(tmp_path / "run.zarr") < plan.bytes
    assert np.isfinite(logical)


LARGE = {"steps": 20, "guidance_scale": SCALE, "seeds": [0, 1], "height": 32, "width": 32}


def refused(budget, **capture):
    with pytest.raises(interp.InterpError) as caught:
        interp.plan(tiny("sd1"), [A, B], capture=interp.Capture(budget=budget, **capture), **LARGE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("budget", ["5MB", "400kB"])
def test_a_budget_refuses_and_proposes(budget):
    """What it proposes does fit, by the plan of exactly that, however little is left of what was asked for."""
    large = {"heads": "all", "tokens": "all", "dtype": "float32", "attention": "all", "text": True}
    text = refused(budget, **large)
    assert "self_attention/16x16/probs alone" in text and "heads='mean' saves" in text and "which leaves" in text
    fields = dict(part.split(" saves")[0].strip().split("=", 1) for part in text.split(";")[1:-1])
    proposed = interp.Capture(**{**large, **{k: eval(v) for k, v in fields.items()}}, budget=budget)
    interp.plan(tiny("sd1"), [A, B], capture=proposed, **LARGE)


def test_a_budget_that_nothing_meets():
    assert "raise the budget" in refused("1kB") and "of the 4 samples" in refused("50kB")
    assert "give a size such as '2GB'" in refused("two")
    interp.plan(tiny("sd1"), A, steps=2, capture=interp.Capture(budget="2GB"))


def test_another_budget_resumes_the_same_run(tmp_path):
    settings = {"steps": 2, "progress": False, "store": tmp_path / "run.zarr"}
    interp.trace(tiny("sd1"), A, capture=interp.Capture(budget="1GB"), **settings)
    interp.trace(tiny("sd1"), A, capture=interp.Capture(), **settings)
