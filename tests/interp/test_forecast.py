"""What the plan says of memory, against the tensors that a real run makes."""

from functools import cache

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry

import interp
from interp.forecast import Counted, weights
from tests.families import pipelines
from tests.families.pipelines import tiny

SHORT = {"max_sequence_length": 24}
EVERYTHING = interp.Capture(attention="all", heads="all", tokens="all", branches=("cond", "uncond"), dtype="float32")
NOTHING = interp.Capture(attention=None, image=False)
CASES = {
    "sd1": {"size": (16, 32)},
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


def offloaded(way, folder):
    """A FLUX whose transformer's weights come for its calls, and a list that a call fills: how many bytes are there."""
    pipe, there = pipelines.flux(), []
    cpu, model = torch.device("cpu"), pipe.transformer
    size = lambda tensors: sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())  # noqa: E731
    if way == "modules":
        cpu_offload(model, execution_device=cpu)
        for module in [m for m in model.modules() if hasattr(m, "_old_forward")]:

            def run(*args, own=module._old_forward, **kwargs):
                there.append(size(p for p in model.parameters() if p.device != torch.device("meta")))
                return own(*args, **kwargs)

            module._old_forward = run
        return pipe, there
    model.enable_group_offload(cpu, cpu, way, num_blocks_per_group=2, offload_to_disk_path=str(folder))
    groups = {id(g): g for m in model.modules() for h in getattr(m, "_diffusers_hook", HookRegistry(m)).hooks.values()
              if (g := getattr(h, "group", None)) is not None}  # fmt: skip
    here = set()
    for group in groups.values():

        def come(group=group, own=group.onload_):
            here.update(group.tensor_to_key)
            there.append(size(here))
            own()

        def go(group=group, own=group.offload_):
            here.difference_update(group.tensor_to_key)
            own()

        group.onload_, group.offload_ = come, go
    return pipe, there


FEW = {"steps": 2, "height": 32, "width": 48, "options": SHORT, "capture": NOTHING}


@cache
def at_once():
    return interp.plan(tiny("flux"), "a cat", **FEW).memory


@pytest.mark.parametrize("way", ["modules", "leaf_level", "block_level"])
def test_weights_that_come_for_a_call(way, tmp_path):
    """Of offloaded weights those count that are there at once, as accelerate and diffusers bring them in a real call."""
    pipe, there = offloaded(way, tmp_path)
    whole = weights(tiny("flux")) - sum(p.nbytes for p in tiny("flux").transformer.parameters())
    plan = interp.plan(pipe, "a cat", **FEW)
    assert not there and plan.memory < at_once()
    interp.trace(pipe, "a cat", progress=False, **FEW)
    assert weights(pipe) == pytest.approx(whole, rel=0.01)
    assert weights(pipe, [pipe.transformer]) - weights(pipe) == max(there)
