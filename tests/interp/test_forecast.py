"""What the plan says of memory, against the tensors that a real run makes."""

import pytest
import torch

import interp
from interp.forecast import Counted, weights
from tests.families.pipelines import tiny

SHORT = {"max_sequence_length": 24}
EVERYTHING = interp.Capture(attention="all", heads="all", tokens="all", branches=("cond", "uncond"), dtype="float32")
NOTHING = interp.Capture(attention=None, image=False)
CASES = {
    "sd1": {"size": (32, 64)},
    "flux": {"size": (32, 64), "options": {**SHORT, "true_cfg_scale": 3.0}},
}


@pytest.mark.parametrize("capture", [EVERYTHING, NOTHING], ids=["everything", "nothing"])
@pytest.mark.parametrize("name", CASES)
def test_peak_of_a_traced_call(name, capture):
    """Within 20 % of what was alive at once in a real call on the CPU, weights included."""
    pipe, (height, width) = tiny(name), CASES[name]["size"]
    settings = {
        "steps": 2, "guidance_scale": 4.0, "height": height, "width": width, "batch_size": 2, "capture": capture,
        "options": CASES[name].get("options", {}),
    }  # fmt: skip
    prompts = ["a red circle", "a dog"]
    plan = interp.plan(pipe, prompts, **settings)
    with Counted() as counted:
        interp.trace(pipe, prompts, progress=False, **settings)
    held = weights(pipe)
    assert plan.memory - held == pytest.approx(counted.most, rel=0.2)
    if capture is EVERYTHING:
        assert plan.memory > plan.memory_untraced
    else:
        assert plan.memory == pytest.approx(plan.memory_untraced, rel=0.02)


def test_counting():
    with Counted() as counted:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100)
        del b
    assert counted.most == 8000 and counted.now == 4000
    assert c.shape == (10, 100)
    del c
    assert counted.now == 0


def test_memory_grows_with_the_batch_and_is_told():
    plans = [interp.plan(tiny("sd1"), ["a cat"] * 4, steps=2, batch_size=n, capture=EVERYTHING) for n in (1, 4)]
    assert plans[1].memory - weights(tiny("sd1")) > 3 * (plans[0].memory - weights(tiny("sd1")))
    assert "of device memory at the peak" in str(plans[0])
