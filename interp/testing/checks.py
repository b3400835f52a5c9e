"""The checks that every family passes, whoever wrote it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from interp.capture import Capture
from interp.catalog import dry_run
from interp.errors import InterpError, nearest
from interp.families import Family, find_family, trying
from interp.hooks import DenoiserCall, HookRegistry
from interp.probes.testing import Check
from interp.recording import record
from interp.testing.case import FamilyCase, close, untouched
from interp.testing.probabilities import check_probabilities
from interp.testing.text import check_text, check_text_positions

EVERYTHING = {"attention": "all", "heads": "all", "tokens": "all", "branches": ("cond", "uncond"), "text": True}
BARE = Capture(attention=None, image=False)


def check_family(
    make: Callable[[], Any],
    *,
    guided: Mapping[str, Any] | None = {"guidance_scale": 4.0},
    unguided: Mapping[str, Any] = {"guidance_scale": 1.0},
    options: Mapping[str, Any] | None = None,
    size: tuple[int, int] = (32, 48),
    steps: int = 3,
    schedulers: Mapping[str, Callable[[Any], Any]] | None = None,
    reference: Callable[..., Any] | None = None,
    family: type[Family] | None = None,
    only: Sequence[str] = (),
) -> Iterator[Check]:
    """Yield the checks of a model family, to be called one by one: `pytest.mark.parametrize("check", list(…), ids=str)`.

    Checked: the image is bit-equal to an unwatched one in float32 and bfloat16, with guidance and without; nothing is
    left behind, also after an exception; stored attention equals an independent computation within 1e-5, and its rows
    sum to 1; branches are what their names say, and a dropped one is really not computed; steps and noise levels are
    the scheduler's; latents and maps lie as the picture does, and keys as the tokens do; several images a prompt; a batch
    of two equals two of one.

    Args:
        make: Builds a tiny pipeline with random weights; called twice (float32 and bfloat16).
        guided, unguided: Arguments of the pipeline's call that switch guidance on and off; `guided=None` if the pipeline
            has none.
        options: Further arguments of every call, e.g. `{"max_sequence_length": 32}` to be quick.
        size: (height, width) in pixels, not square.
        steps: Sampling steps of each call.
        schedulers: Name → a function of the pipeline's own scheduler that makes another one to be checked with.
        reference: Instead of `interp.testing.black_box_attention`, for attention modules of another make: the same
            arguments and result.
        family: The family to check, if it is not installed yet.
        only: Names of the checks to yield; default all.

    >>> from interp.testing import check_family
    >>> [str(check) for check in check_family(lambda: None, guided=None)][:2]
    ['image is bit-equal in float32', 'image is bit-equal in bfloat16']
    """
    case = FamilyCase(make, guided, unguided, options or {}, size, steps)
    modes = [False] if guided is None else [True, False]
    found: dict[str, Callable[[], None]] = {
        "image is bit-equal in float32": partial(_image, case, modes),
        "image is bit-equal in bfloat16": partial(_image, case, modes, torch.bfloat16),
        "nothing is left after an exception": partial(_exception, case),
        "probabilities": partial(check_probabilities, case, reference),
        "branches": partial(_branches, case, modes),
        "text": partial(check_text, case),
        "dropped branches": partial(_dropped, case),
        "steps": partial(_steps, case, None),
        "layout": partial(_layout, case),
        "text positions": partial(check_text_positions, case),
        "images per prompt": partial(_images_per_prompt, case),
        "batch of two": partial(_batch, case),
    }
    for name, scheduler in (schedulers or {}).items():
        found[f"steps with {name}"] = partial(_steps, case, scheduler)
    unknown = [name for name in only if name not in found]
    if unknown:
        raise InterpError(f"check_family(only=…) has no check {unknown[0]!r}{nearest(unknown[0], found)}")
    for name, body in found.items():
        if not only or name in only:
            yield Check(name, partial(_within, family, body))


def _within(family: type[Family] | None, body: Callable[[], None]) -> None:
    with trying(*([family] if family else [])):
        body()


def _image(case: FamilyCase, modes: list[bool], dtype: torch.dtype | None = None) -> None:
    """A recorded call gives the very bits of an unwatched one, and what is recorded last is that picture."""
    pipe = case.pipe if dtype is None else case.make().to(dtype)
    for guided in modes:
        plain = case.call(pipe, guided=guided)
        again = case.call(pipe, guided=guided)
        assert torch.equal(plain, again), "two unwatched calls differ: is a model in training mode? call .eval()"
        with untouched(pipe), record(pipe, capture=Capture(**EVERYTHING, dtype="float32")) as recording:
            got = case.call(pipe, guided=guided)
        assert torch.equal(got, plain), "the recorded image differs from an unwatched one"
        assert torch.equal(_returned(find_family(pipe), recording.run, got), got), (
            "the last latents are not the image's"
        )
        _filled(case, recording.run, guided and case.guided is not None)


def _returned(family: Family, run: Any, like: torch.Tensor) -> torch.Tensor:
    """What the pipeline would return for the last latents that were recorded."""
    return family.returned_latents(torch.from_numpy(run.final_latents.values).to(like.dtype))


def _filled(case: FamilyCase, run: Any, guided: bool) -> None:
    """All that was asked for is there, and what was not evaluated is NaN."""
    kinds = {s.kind for s in case.family.attention_sites()}
    groups = {"attention"} if kinds & {"cross", "joint"} else set()
    groups |= {"self_attention"} if kinds & {"self", "joint"} else set()
    groups |= {"text_attention"} if "joint" in kinds else set()
    assert groups <= set(run.tree.children), f"of {sorted(groups)} only {sorted(run.tree.children)} were recorded"
    for group in groups:
        for name, node in run.tree[group].children.items():
            probs = node["probs"].sel(branch="cond")
            used = probs if group == "self_attention" else probs.where(node["token_role"] != "", 0)
            assert np.isfinite(used.values).all(), f"{group}/{name} has gaps"
            missing = np.isnan(node["probs"].sel(branch="uncond").values).all()
            assert missing != guided, f"{group}/{name}: the branch without text is {'missing' if missing else 'there'}"


class _Stop(Exception):  # noqa: N818
    pass


def _exception(case: FamilyCase) -> None:
    """Whatever fails inside, the pipeline is as it was, and works as before."""
    before = case.call()

    def burst(*_: Any) -> None:
        raise _Stop

    sites = case.family.attention_sites()
    for where in ("on_call", "on_step", "on_prediction", "read"):
        with untouched(case.pipe):
            try:
                with record(case.pipe, capture=Capture(**EVERYTHING)), HookRegistry(case.pipe) as hooks:
                    if where == "read":
                        hooks.read(f"{sites[-1].name}:probs" if sites else "*:out", burst)
                    else:
                        getattr(hooks, where)(burst)
                    case.call()
            except _Stop:
                continue
        raise AssertionError(f"{where}: the function was never called")
    assert torch.equal(case.call(), before)


def _branches(case: FamilyCase, modes: list[bool]) -> None:
    """What is combined of the two branches is what `scheduler.step` receives: the roles are not exchanged."""
    family = case.family
    for guided in modes:
        with case.spied() as seen, record(case.pipe, capture=BARE) as recording:
            case.call(guided=guided)
        run, arguments = recording.run, case.arguments(guided)
        assert len(run.latents.step) <= len(seen)
        noise = {str(b): torch.from_numpy(run.noise_pred.sel(branch=b).values) for b in run.noise_pred.branch.values}
        first = _first_evaluations(case, seen, run)
        for step, one in enumerate(first):
            got = family.unpack(one.model_output, arguments).float()
            cond, uncond = noise["cond"][:, step], noise["uncond"][:, step]
            if guided:
                want = family.combine(uncond, cond, family.applied_guidance(arguments), arguments)
                assert (cond - uncond).abs().max() > 100 * case.tolerance * cond.abs().max(), "the branches are alike"
            else:
                want = cond
                assert torch.isnan(uncond).all(), "there is no branch without text, but one was recorded"
            close(got, want, case.tolerance, f"step {step}: the branches do not combine to what the scheduler gets")
        expected = len(seen)
        assert (run.nfe.sel(branch="cond").values == expected).all()
        assert (run.nfe.sel(branch="uncond").values == (expected if guided else 0)).all()


def _first_evaluations(case: FamilyCase, seen: Sequence[Any], run: Any) -> list[Any]:
    """Second-order schedulers evaluate twice a step: of each step the first one is kept."""
    order = getattr(case.pipe.scheduler, "order", 1)
    return list(seen)[::order][: run.latents.sizes["step"]]


def _dropped(case: FamilyCase) -> None:
    """A dropped branch is not computed, and the scheduler receives the kept prediction exactly."""
    if case.guided is None:
        return
    family, pipe = case.family, case.pipe
    for kept in ("cond", "uncond"):
        rows: list[int] = []
        outputs: list[torch.Tensor] = []

        def drop(call: DenoiserCall, kept: str = kept) -> None:
            if call.step >= 1:
                call.keep = (kept,)

        def count(_: Any, args: tuple, kwargs: dict, rows: list[int] = rows) -> None:
            rows.append(family.rows(args, kwargs))

        handle = family.denoiser.register_forward_pre_hook(count, with_kwargs=True)
        try:
            with untouched(pipe), case.spied() as seen, HookRegistry(pipe) as hooks:
                hooks.on_call(drop)
                hooks.on_prediction(
                    lambda p, kept=kept, outputs=outputs: (
                        outputs.append(p.outputs[kept].clone())  # type: ignore[misc]
                        if p.call.step >= 1
                        else None
                    )
                )
                case.call()
        finally:
            handle.remove()
        evaluations = len(seen)
        free = len(outputs)
        assert sum(rows) == 2 * len(case.prompts) * (evaluations - free) + len(case.prompts) * free, rows
        for one, output in zip(seen[-free:], outputs, strict=True):
            got = family.unpack(one.model_output, case.arguments())
            assert torch.equal(got, output), f"with {kept} alone the scheduler does not get its prediction exactly"


def _steps(case: FamilyCase, scheduler: Callable[[Any], Any] | None) -> None:
    """Latents, timesteps and noise levels of each step are the scheduler's own."""
    family, own = case.family, case.pipe.scheduler
    with case.scheduled(own if scheduler is None else scheduler(own)):
        with case.spied() as seen, record(case.pipe, capture=BARE) as recording:
            final = case.call()
        run, arguments = recording.run, case.arguments()
        first = _first_evaluations(case, seen, run)
        assert run.latents.sizes["step"] == len(first)
        want = torch.stack([family.unpack(s.sample, arguments) for s in first], 1).float()
        assert np.array_equal(run.latents.values, want.numpy()), "the latents are not those entering each step"
        assert torch.equal(_returned(family, run, final), final)
        times = run.trajectory
        assert np.allclose(times.timestep.values, [s.timestep for s in first], rtol=1e-5)
        data, noise = times.data_scale.values**2, times.noise_scale.values**2
        assert np.allclose(times.alpha_bar.values, data / (data + noise), rtol=1e-4), (
            "the noise levels contradict themselves"
        )
        met = []
        with HookRegistry(case.pipe) as hooks:
            hooks.on_call(lambda call: met.append((call.step, call.evaluation, call.timestep)))
            case.call()
    steps = [(step, round(time, 2)) for step, evaluation, time in dict.fromkeys(met) if evaluation == 0]
    assert steps == [(i, round(float(t), 2)) for i, t in enumerate(times.timestep.values)], steps


def _layout(case: FamilyCase) -> None:
    """Rows and columns of a map are those of the latents: what changes above is seen above, what changes left, left."""
    family, pipe = case.family, case.pipe
    sites = family.attention_sites()
    if not sites:
        return
    arguments = case.arguments()
    shape = family.latent_shape(arguments)
    packed = torch.randn(2, *shape)
    assert torch.equal(family.unpack(family.pack(packed), arguments), packed), "unpack is not the inverse of pack"
    base, fresh = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(9))
    seen: list[torch.Tensor] = []

    def queries(kernel: Any, call: DenoiserCall) -> None:
        if call.step == 0 and "cond" in call.branches and kernel.query is not None:
            rows = slice(call.branches.index("cond") * call.samples, None)
            span = hooks.spans(kernel, call).image_queries
            seen.append(kernel.query[rows][: call.samples, :, span].detach().clone())

    first = next(s for s in sites if s.kind in ("joint", "self", "cross"))
    for changed in (None, "top", "left"):
        latents = base.clone()
        if changed == "top":
            latents[:, :, : shape[1] // 2] = fresh[:, :, : shape[1] // 2]
        elif changed == "left":
            latents[..., : shape[2] // 2] = fresh[..., : shape[2] // 2]
        with HookRegistry(pipe) as hooks:
            hooks.on_attention(first, queries)
            case.call(
                latents=family.given_latents(latents), num_inference_steps=2
            )  # some pipelines treat one step differently
    height, width = dry_run(family, arguments)[1][first.name]
    plain, *others = seen
    for name, other in zip(("top", "left"), others, strict=True):
        change = (other - plain).float().norm(dim=-1).mean((0, 1)).reshape(height, width)
        near, far = (
            (change[: height // 2], change[height // 2 :])
            if name == "top"
            else (change[:, : width // 2], change[:, width // 2 :])
        )
        assert near.mean() > 1.5 * far.mean(), f"{first.name}: a change of the {name} half is not seen there"


def _images_per_prompt(case: FamilyCase) -> None:
    """Two images of each prompt are four samples, in the pipeline's order, each with its own prompt's tokens.

    Some pipelines of diffusers mix up the prompts' masks then: what is recorded is what they did, and what they do with
    four prompts is no reference for it.
    """
    repeated: dict[str, Any] = {"prompt": [p for p in case.prompts for _ in range(2)], **case.negatives(4)}
    plain = case.call(num_images_per_prompt=2)
    mixed_up = float((plain - case.call(**repeated)).abs().max()) > 0.01
    capture = Capture(attention="cross", heads="mean", dtype="float32", image=False)
    kinds = {s.kind for s in case.family.attention_sites()}
    with record(case.pipe, capture=capture if kinds & {"cross", "joint"} else BARE) as recording:
        got = case.call(num_images_per_prompt=2)
    assert torch.equal(got, plain)
    run = recording.run
    assert list(run.samples["prompt"]) == [p for p in case.prompts for _ in range(2)]
    if mixed_up:
        return
    with record(case.pipe, capture=capture if kinds & {"cross", "joint"} else BARE) as again:
        case.call(**repeated)
    _same(run, again.run, case.tolerance)


def _batch(case: FamilyCase) -> None:
    """Two prompts in one batch give what each gives alone, up to rounding."""
    kinds = {s.kind for s in case.family.attention_sites()}
    capture = Capture(heads="mean", dtype="float32", image=False) if kinds & {"cross", "joint"} else BARE
    with record(case.pipe, capture=capture) as both:
        case.call()
    with record(case.pipe, capture=capture) as alone:
        for i, prompt in enumerate(case.prompts):
            case.call(
                prompt=[prompt], generator=[torch.Generator().manual_seed(i)],
                **case.negatives(1),
            )  # fmt: skip
    _same(both.run, alone.run, case.tolerance)


def _same(one: Any, other: Any, tolerance: float) -> None:
    for name in ("latents", "noise_pred", "final_latents"):
        a, b = (torch.from_numpy(getattr(run, name).values) for run in (one, other))
        close(a.nan_to_num(), b.nan_to_num(), tolerance, f"{name} differ")
    for grid in one.grids:
        a, b = (torch.from_numpy(run.attention(grid).values) for run in (one, other))
        assert torch.equal(a.isnan(), b.isnan()), f"attention {grid}: other tokens"
        close(a.nan_to_num(), b.nan_to_num(), 10 * tolerance, f"attention {grid} differs")
        assert (one.tokens(grid)["token_text"].values == other.tokens(grid)["token_text"].values).all()
