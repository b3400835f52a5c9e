"""Recording changes nothing: pictures, several of them, and what is left behind."""

from copy import deepcopy
from typing import Any

import numpy as np
import torch

from interp.families import Family, find_family
from interp.hooks import HookRegistry
from interp.recording import record
from interp.stores import Run
from interp.testing.case import FamilyCase, alike
from interp.testing.leftovers import untouched


def check_picture(case: FamilyCase) -> None:
    """A recorded call gives the very bits of an unwatched one, and what is recorded last is that picture."""
    again = case.call(guided=case.modes[0])
    assert torch.equal(case.plain(case.modes[0]), again), (
        "two unwatched calls differ: is a model in training mode? call .eval()"
    )
    for guided in case.modes:
        plain = case.plain(guided)
        with untouched(case.pipe):
            got = case.recorded(guided)
        _same_picture(case.family, got.latents, plain, got.run)
        filled(case, got.run, guided)


def check_half_precision(case: FamilyCase) -> None:
    """The same in bfloat16."""
    parts = {name: getattr(case.pipe, name) for name in case.pipe.components}
    half = {n: deepcopy(m).to(torch.bfloat16) for n, m in parts.items() if isinstance(m, torch.nn.Module)}
    try:
        for name, module in half.items():
            setattr(case.pipe, name, module)
        for guided in case.modes:
            plain = case.call(guided=guided, num_inference_steps=2)
            with untouched(case.pipe), record(case.pipe, capture=case.everything) as recording:
                got = case.call(guided=guided, num_inference_steps=2)
            _same_picture(find_family(case.pipe), got, plain, recording.run)
            filled(case, recording.run, guided)
    finally:
        for name in half:
            setattr(case.pipe, name, parts[name])


def _same_picture(family: Family, got: torch.Tensor, plain: torch.Tensor, run: Run) -> None:
    assert torch.equal(got, plain), "the recorded image differs from an unwatched one"
    assert torch.equal(returned(family, run, got), got), "the last latents are not the image's"


def returned(family: Family, run: Run, like: torch.Tensor) -> torch.Tensor:
    """What the pipeline would return for the last latents that were recorded."""
    return family.returned_latents(torch.from_numpy(run.final_latents.values).to(like.dtype))


def filled(case: FamilyCase, run: Run, guided: bool) -> None:
    """All that was asked for is there, and what was not evaluated is NaN."""
    kinds = {s.kind for s in case.family.attention_sites()}
    groups = {"attention"} if kinds & {"cross", "joint"} else set()
    groups |= {"self_attention"} if kinds & {"self", "joint"} else set()
    groups |= {"text_attention"} if "joint" in kinds else set()
    groups |= {"within_text_attention"} if kinds & {"joint", "text"} else set()
    assert groups <= set(run.tree.children), f"of {sorted(groups)} only {sorted(run.tree.children)} were recorded"
    for group in groups:
        for name, node in run.tree[group].children.items():
            probs = node.to_dataset()["probs"]
            used = probs if group == "self_attention" else probs.where(node["token_role"] != "", 0)
            if group == "within_text_attention":
                used = used.where(node["token_role"].rename(token="query_token") != "", 0)
            assert np.isfinite(used.sel(branch="cond").values).all(), f"{group}/{name} has gaps"
            missing = np.isnan(probs.sel(branch="uncond").values).all()
            assert missing != guided, f"{group}/{name}: the branch without text is {'missing' if missing else 'there'}"


class _Stop(Exception):  # noqa: N818
    pass


def check_exceptions(case: FamilyCase) -> None:
    """Whatever fails inside, the pipeline is as it was, and works as before."""
    before = case.plain()

    def burst(*_: Any) -> None:
        raise _Stop

    sites = case.family.attention_sites()
    for where in ("on_call", "on_step", "on_prediction", "read"):
        with untouched(case.pipe):
            try:
                with record(case.pipe, capture=case.everything), HookRegistry(case.pipe) as hooks:
                    if where == "read":
                        hooks.read(f"{sites[-1].name}:probs" if sites else "*:out", burst)
                    else:
                        getattr(hooks, where)(burst)
                    case.call()
            except _Stop:
                continue
        raise AssertionError(f"{where}: the function was never called")
    assert torch.equal(case.call(), before)


def check_images_per_prompt(case: FamilyCase) -> None:
    """Two images of each prompt are four samples, in the pipeline's order, each with its own prompt's tokens.

    Some pipelines of diffusers mix up the prompts' masks then: what is recorded is what they did, and what they do with
    four prompts is no reference for it.
    """
    if not case.takes("num_images_per_prompt"):
        return
    two: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 2}
    capture = case.everything.changed(heads="mean", text=False)
    plain = case.call(**two)
    with record(case.pipe, capture=capture) as recording:
        got = case.call(**two)
    assert torch.equal(got, plain)
    assert list(recording.run.samples["prompt"]) == [p for p in case.prompts for _ in range(2)]
    with record(case.pipe, capture=capture) as again:
        repeated = case.call(**{**case.samples(0, 0, 1, 1), "num_inference_steps": 2})
    if float((plain - repeated).abs().max()) <= 0.01:
        alike(recording.run, again.run, case.tolerance)


def check_batch(case: FamilyCase) -> None:
    """Two prompts in one batch give what each gives alone, up to rounding.

    Compared are all latents, predictions and attention of both prompts, in float32 as computed and as stored: the largest
    difference within an array is at most 1e-5 of the array's largest value.
    """
    capture = case.everything.changed(text=False)
    with record(case.pipe, capture=capture) as both:
        case.call(num_inference_steps=2)
    with record(case.pipe, capture=capture) as alone:
        for i in (0, 1):
            one = {"generator": [torch.Generator().manual_seed(i)], "num_inference_steps": 2}
            case.call(**{**case.samples(i), **one})
    alike(both.run, alone.run, case.tolerance)
