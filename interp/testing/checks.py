"""The checks that every family passes, whoever wrote it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from interp.clock import is_flow
from interp.errors import InterpError, nearest
from interp.families import Family, trying
from interp.probes.testing import Check
from interp.testing.case import FamilyCase
from interp.testing.costs import check_costs
from interp.testing.pictures import (
    check_batch,
    check_exceptions,
    check_half_precision,
    check_images_per_prompt,
    check_picture,
)
from interp.testing.places import check_layout, check_sites
from interp.testing.probabilities import check_probabilities
from interp.testing.sampling import check_branches, check_dropped, check_scheduler, check_steps
from interp.testing.text import check_text, check_text_positions
from interp.testing.ways import WAYS

DIFFUSION = {
    "steps with DDIM": DDIMScheduler,
    "steps with Euler": EulerDiscreteScheduler,
    "steps with DPM-Solver++ 2M": DPMSolverMultistepScheduler,
    "steps with Heun": HeunDiscreteScheduler,
}
FLOW = {
    "steps with flow-match Euler": partial(FlowMatchEulerDiscreteScheduler, shift=3.0),
    "steps with flow-match Heun": partial(FlowMatchHeunDiscreteScheduler, shift=3.0),
    "steps with flow DPM-Solver++ 2M": partial(
        DPMSolverMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}
SCHEDULERS = (*DIFFUSION, *FLOW)


@dataclass(frozen=True)
class FamilyCheck(Check):
    """A check, and what it is made on."""

    case: FamilyCase


def check_family(
    make: Callable[[], Any],
    *,
    guided: Mapping[str, Any] | None = {"guidance_scale": 4.0},
    unguided: Mapping[str, Any] = {"guidance_scale": 1.0},
    options: Mapping[str, Any] | None = None,
    for_each: Mapping[str, Sequence[Any]] | None = None,
    size: tuple[int, int] = (32, 48),
    steps: int = 3,
    reference: Callable[..., Any] | None = None,
    family: type[Family] | None = None,
    only: Sequence[str] = (),
) -> Iterator[FamilyCheck]:
    """Yield the checks of a model family, to be called one by one: `pytest.mark.parametrize("check", list(…), ids=str)`.

    Checked: the image is bit-equal to an unwatched one in float32 and bfloat16, with guidance and without; nothing is
    left behind, also after an exception; every attention kernel belongs to a site; stored attention equals an independent
    computation within 1e-5, and its rows sum to 1; branches are what their names say, and a dropped one is really not
    computed; steps and noise levels are the scheduler's, with its own and with each of diffusers' main schedulers; latents
    and maps lie as the picture does, and keys as the tokens do; a plan's bytes are within 5 % of a run's, its memory within
    20 %; several images a prompt; a batch of two equals two of one, within 1e-5 of the largest value; and so it is where
    the model runs in other ways (`interp.testing.ways.WAYS`: attention slicing, explicit processors, fused projections,
    offload, other backends, compiled, caches, a LoRA). A check of a scheduler or of a way returns its outcome: "the same
    numbers", "refused: …" in one sentence, or "not offered: …" where diffusers itself fails.

    Args:
        make: Builds a tiny pipeline with random weights; called once.
        guided, unguided: Arguments of the pipeline's call that switch guidance on and off; `guided=None` if the pipeline
            has none.
        options: Further arguments of every call, e.g. `{"max_sequence_length": 32}` to be quick.
        for_each: Arguments of which each of the two prompts has one, e.g. `{"image": [first, second]}`.
        size: (height, width) in pixels, not square.
        steps: Sampling steps of each call.
        reference: Instead of `interp.testing.black_box_attention`, for attention modules of another make: the same
            arguments and result.
        family: The family to check, if it is not installed yet.
        only: Names of the checks to yield; default all.

    >>> from interp.testing import check_family
    >>> [str(check) for check in check_family(lambda: None, guided=None)][:2]
    ['image is bit-equal in float32', 'image is bit-equal in bfloat16']
    """
    case = FamilyCase(make, guided, unguided, options or {}, for_each or {}, size, steps)
    found: dict[str, Callable[[FamilyCase], str | None]] = {
        "image is bit-equal in float32": check_picture,
        "image is bit-equal in bfloat16": check_half_precision,
        "nothing is left after an exception": check_exceptions,
        "every kernel has a site": check_sites,
        "probabilities": partial(check_probabilities, reference=reference),
        "branches": check_branches,
        "text": check_text,
        "dropped branches": check_dropped,
        "steps": check_steps,
        **{name: partial(check_scheduler, make=_scheduler(name)) for name in SCHEDULERS},
        "layout": check_layout,
        "text positions": check_text_positions,
        "costs": check_costs,
        "images per prompt": check_images_per_prompt,
        "batch of two": check_batch,
        **WAYS,
    }
    unknown = [name for name in only if name not in found]
    if unknown:
        raise InterpError(f"check_family(only=…) has no check {unknown[0]!r}{nearest(unknown[0], found)}")
    for name, body in found.items():
        if not only or name in only:
            yield FamilyCheck(name, partial(_within, family, partial(body, case)), case)


def _within(family: type[Family] | None, body: Callable[[], str | None]) -> str | None:
    with trying(*([family] if family else [])):
        return body()


def _scheduler(name: str) -> Callable[[Any], Any]:
    """A function of the pipeline's own scheduler that makes this one; it gives None for a model of the other kind."""

    def make(own: Any) -> Any:
        if is_flow(own) != (name in FLOW):
            return None
        return FLOW[name]() if name in FLOW else DIFFUSION[name].from_config(own.config)

    return make
