"""check_probe passes for every built-in probe, and each of its checks fails for a probe made to fail it."""

import itertools
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from interp.probes import probe
from interp.probes.ablation import token_ablation
from interp.probes.attribution import attention_mass, token_attribution
from interp.probes.causal import causal_tracing
from interp.probes.convergence import attention_convergence
from interp.probes.entropy import attention_entropy
from interp.probes.eos import eos_replacement
from interp.probes.film import x0_film
from interp.probes.frequency import frequency_energy
from interp.probes.guidance import guidance_norm
from interp.probes.heads import head_relevance
from interp.probes.lens import diffusion_lens
from interp.probes.substitution import key_value_substitution
from interp.probes.sweeping import sweep
from interp.probes.testing import changed_run, check_probe, film_run, swap_run
from interp.probes.windows import acceleration, text_window
from interp.stores import InterpError, synthetic_run

CASES = [
    (frequency_energy, synthetic_run),
    (token_attribution, synthetic_run),
    (attention_mass, synthetic_run),
    (attention_entropy, synthetic_run),
    (attention_convergence, synthetic_run),
    (guidance_norm, synthetic_run),
]
EARLY = {f"early{n}": [{"name": "remove_text", "stop": n, "unit": "step"}] for n in (2, 4)}
LATE = {f"late{n}": [{"name": "remove_text", "start": 6 - n, "unit": "step"}] for n in (1, 3)}
LOST = {r: [{"name": "replace_tokens", "roles": [r], "value": "zero"}] for r in ("word", "eos")}
SIDES = {side: [{"name": "replace_eos", "side": side}] for side in ("k", "v", "kv")}
LAYERS = {f"layer {k}": [{"name": "encoder_layer", "layer": k}] for k in (2, 0)}
NOISE = {"name": "replace_tokens", "words": ["circle"], "value": "random"}
GRID = {"corrupted": [NOISE]} | {f"site={s} | start={t}": [NOISE] for s in ("a.b:out", "a.c:out") for t in (0, 0.5)}
RESTORED = {"corrupted": [NOISE], "first": [NOISE, {"name": "patch", "site": "text_encoder.layers.0"}]}
CASES += [(head_relevance, synthetic_run), (eos_replacement, swap_run), (x0_film, film_run)]
CASES += [
    (each, partial(changed_run, conditions))
    for each, conditions in (
        (text_window, EARLY),
        (acceleration, LATE),
        (token_ablation, LOST),
        (key_value_substitution, SIDES),
        (diffusion_lens, LAYERS),
        (causal_tracing, RESTORED),
        (sweep, GRID),
    )
]
MADE = cache(synthetic_run)  # a probe that changed it would fail the check that it left it as it was
CHECKS = {
    f"{p.name}-{c}": c for p, make in CASES for c in check_probe(p, MADE if make is synthetic_run else make)
}  # each with the runs of its probe
CALLS = itertools.count()


@pytest.mark.parametrize("check", CHECKS)
def test_built_in_probes(check):
    CHECKS[check]()


def test_every_declared_probe_is_checked_and_on_the_page(built_in_probes):
    page = (Path(__file__).parents[2] / "docs" / "probes.md").read_text(encoding="utf-8")
    assert {which.name for which, _ in CASES} == set(built_in_probes)
    assert not [name for name in built_in_probes if f"| `{name}` |" not in page]


def test_parameters_are_passed_on():
    for check in check_probe(frequency_energy, MADE, data="predicted", mask="disc"):
        if check.name != "without noise_pred":
            check()


def latents(run):
    return run.latents.mean(["channel", "y", "x"]).assign_attrs(units="latent units")


NEEDS = {"trajectory": ["latents"]}


@probe("good", needs=NEEDS)
def good(run, *, times: float = 1.0):
    """Mean of the latents, `times` a number (latent units)."""
    return latents(run) * times


@probe("undocumented", needs=NEEDS)
def undocumented(run, *, times: float = 1.0):
    return latents(run) * times


@probe("unexplained", needs=NEEDS)
def unexplained(run, *, factor: float = 1.0):
    """Mean of the latents (latent units)."""
    return latents(run) * factor


@probe("unitless", needs=NEEDS)
def unitless(run):
    """Mean of the latents (latent units)."""
    return run.latents.mean(["channel", "y", "x"]).drop_attrs()


@probe("unlabelled", needs=NEEDS)
def unlabelled(run):
    """Mean of the latents (latent units)."""
    return latents(run).drop_vars("step")


@probe("single")
def single(run):
    """Mean of the latents (latent units)."""
    assert len(run) == 1
    return latents(run)


@probe("lonely", needs=NEEDS)
def lonely(run):
    """Spread of the latents over the samples (latent units)."""
    return run.latents.std("sample", ddof=1).mean(["channel", "y", "x"]).assign_attrs(units="latent units")


def attention_of(run, **chosen):
    return run.attention().sel(**chosen).mean("token").assign_attrs(units="1").astype("f4")


@probe("of_the_mean", needs={"attention": True})
def of_the_mean(run):
    """Attention (1)."""
    return attention_of(run, head="mean")


@probe("of_a_head", needs={"attention": True})
def of_a_head(run):
    """Attention (1)."""
    return attention_of(run, head="0")


@probe("with_text", needs={"attention": True})
def with_text(run):
    """Attention (1)."""
    return attention_of(run, branch="cond")


@probe("without_text", needs={"attention": True})
def without_text(run):
    """Attention (1)."""
    return attention_of(run, branch="uncond")


@probe("of_one_branch", needs={"attention": True})
def of_one_branch(run):
    """Attention (1)."""
    return run.attention().squeeze("branch").mean("token").assign_attrs(units="1").astype("f4")


def needy(part):
    """A probe that reads a part of the run, by its path, without saying so."""
    path = {"latents": "trajectory/latents", "noise_pred": "trajectory/noise_pred", "attention": "attention/8x8/probs"}
    path |= {"images": "images/image", "text": "text/text_encoder/embeddings", "scores": "scores/score"}

    def read(run):
        """Mean of a part (1)."""
        return run.tree[path[part]].mean(run.tree[path[part]].dims[2:]).assign_attrs(units="1")

    return probe(f"needs {part}")(read)


@probe("mumbling")
def mumbling(run):
    """Mean of the latents (latent units)."""
    try:
        return latents(run)
    except InterpError:
        raise InterpError("no latents") from None


@probe("hiding")
def hiding(run):
    """Mean of the latents (latent units)."""
    if "latents" not in run.tree["trajectory"].dataset:
        return xr.DataArray(np.nan, attrs={"units": "latent units"})
    return latents(run)


@probe("changing")
def changing(run):
    """Mean of the latents (latent units)."""
    mean = latents(run)
    return mean + next(CALLS)


@probe("vandal", needs=NEEDS)
def vandal(run):
    """Mean of the latents (latent units)."""
    run.tree["trajectory"]["latents"].values[0, 0] += 1
    return latents(run)


@probe("loose", needs=NEEDS)
def loose(run):
    """First value (latent units)."""
    data = run.latents.data
    value = 1.0 if isinstance(data, np.ndarray) else 2.0
    return xr.DataArray(value, attrs={"units": "1"})


@probe("empty", needs=NEEDS)
def empty(run):
    """Nothing (1)."""
    return latents(run) * np.nan


@probe("halting", needs={"trajectory": ["noise_pred"]})
def halting(run):
    """Mean of the noise (1)."""
    mean = run.noise_pred.mean(["channel", "y", "x"]).assign_attrs(units="1")
    if np.isnan(mean).any():
        raise FloatingPointError("NaN")
    return mean


@probe("badly_drawn", needs=NEEDS, plot=lambda ds: "picture")
def badly_drawn(run):
    """Mean of the latents (latent units)."""
    return latents(run)


@probe("greedy", needs=NEEDS)
def greedy(run):
    """Mean of the latents (latent units)."""
    return latents(run).copy(data=run.latents.values.mean((2, 3, 4)))


def failures(which, names=None):
    failed = set()
    for check in check_probe(which, synthetic_run if which is vandal else MADE):
        if names is None or check.name in names:
            try:
                check()
            except Exception:
                failed.add(check.name)
    return failed


@probe("inner", needs=NEEDS)
def _hidden(run):
    """Mean of the latents (latent units)."""
    return latents(run)


lost, _hidden = _hidden, None  # what unpickling looks for is not there

BROKEN = [
    (undocumented, "documented parameters"),
    (unexplained, "documented parameters"),
    (lonely, "one sample"),
    (empty, "one sample"),
    (single, "several samples"),
    (of_a_head, "heads averaged"),
    (of_the_mean, "heads apart"),
    (of_one_branch, "both branches"),
    (halting, "branch evaluated half of the time"),
    (without_text, "branch cond alone"),
    (with_text, "branch uncond alone"),
    *((needy(part), f"without {part}") for part in ("latents", "noise_pred", "attention", "images", "text", "scores")),
    (mumbling, "without latents"),
    (hiding, "without latents"),
    (unitless, "labels and units"),
    (unlabelled, "labels and units"),
    (changing, "same again"),
    (loose, "dask as eager"),
    (vandal, "run left as it was"),
    (greedy, "bounded memory"),
    (lost, "pickled"),
    (badly_drawn, "plot"),
]


def test_a_good_probe_passes():
    assert failures(good) == set()


@pytest.mark.parametrize(("which", "check"), BROKEN, ids=lambda v: getattr(v, "name", v))
def test_broken_probes_fail(which, check):
    assert failures(which, {check}) == {check}


def test_every_check_is_failed_by_a_broken_probe():
    assert {check for _, check in BROKEN} == {check.name for check in check_probe(badly_drawn)}


def test_a_probe_of_a_function_cannot_be_pickled():
    @probe("inner", needs=NEEDS)
    def inner(run):
        """Mean of the latents (latent units)."""
        return latents(run)

    assert failures(inner) == {"pickled"}


def test_a_declared_need_that_is_none():
    assert failures(probe("x", needs={"images": True})(good.fn)) >= {"pickled"}
    silent = probe("y")(good.fn)
    object.__setattr__(silent, "needs", {"text": ["never_checked"]})
    assert failures(silent)


def test_reading_a_whole_array_is_seen():
    with pytest.raises(AssertionError, match="trajectory/latents was read 8 of 8 samples at a time"):
        next(c for c in check_probe(greedy) if c.name == "bounded memory")()
    assert failures(greedy) == {"bounded memory"}
