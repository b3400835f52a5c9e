"""What brings a picture back: clean, corrupted and restored conditions of one run (arXiv:2310.13730)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.base import probe
from interp.probes.bootstrap import mean_interval
from interp.probes.comparing import DISTANCES, compare, resampled
from interp.probes.conditions import check_condition

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.stores import Run


def draw(ds: xr.Dataset) -> Figure:
    """Draw how much of the clean picture each restoration recovers, by measure, with intervals.

    ds: the result of `causal_tracing`.
    """
    from interp.probes.style import PALETTE, legend, new_figure, note, title

    measures = [str(m) for m in ds["measure"].values]
    rows = np.arange(ds.sizes["restored"])[::-1].astype(float)
    figure, (ax,) = new_figure(1, width=7.4, height=1.6 + max(0.5, 0.16 * len(measures)) * len(rows))
    for k, measure in enumerate(measures):
        mean, interval = (ds[n].sel(measure=measure).values for n in ("recovered", "recovered_interval"))
        bars = np.nan_to_num([mean - interval[:, 0], interval[:, 1] - mean]).clip(0)
        at = rows + 0.12 * ((len(measures) - 1) / 2 - k)
        ax.errorbar(mean, at, xerr=bars, fmt="o", color=PALETTE[k % 7], capsize=2, markersize=4, label=measure)
    for end in (0, 1):
        ax.axvline(end, color="0.5", linestyle=":")
    ax.set_yticks(rows, [str(c) for c in ds["restored"].values])
    low, high = (float(ds["recovered_interval"].sel(bound=b).quantile(q)) for b, q in (("low", 0.0), ("high", 1.0)))
    limits = np.nan_to_num([low - 0.1, high + 0.1], nan=0.5).clip([-2.0, 1.2], [-0.2, 3.0])  # bars may be cut
    ax.set(xlabel="recovered (1): 0 as corrupted, 1 as clean", ylim=(-0.6, len(rows) - 0.4), xlim=limits)
    title(ax, f"Restored in {ds.attrs['corrupted']!r}")
    legend(ax, beside=True)
    note(figure, f"Dots: ratios of means over {ds.attrs['pairs']} pairs. Bars: bootstrap 95 % intervals over prompts.")
    return figure


@probe("causal_tracing", needs={"samples": ["condition"]}, plot=draw)
def causal_tracing(
    run: Run,
    *,
    clean: str = "baseline",
    corrupted: str = "corrupted",
    conditions: Sequence[str] | str | None = None,
    metrics: Sequence[str] | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Share of what a corruption destroyed that comes back when one activation is restored (1: 0 nothing, 1 all).

    Trace these conditions, all with the same prompts and seeds: a clean one; a corrupted one, e.g. the subject's tokens
    replaced by noise, `[interp.ReplaceTokens(words=("{subject}",), value="random")]`; and for each place in question
    the same corruption followed by putting the clean run's activation back there, e.g. `interp.Patch(clean_run, site)`
    with the clean run traced before.

    Parameters: `clean` and `corrupted` name those conditions; `conditions` None (all others) or the restored ones;
    `metrics` None (all of `/scores`) or some; `resamples` and `seed` belong to the bootstrap over prompts.
    Only pairs that every condition has count in `recovered`.

    Returns a Dataset over `restored` (a condition), `measure` (the metrics, and `image_distance`, `latent_distance` to
    the clean picture as far as the run holds them) and `pair` (a prompt and seed): `effect` (restored, measure, pair),
    the indirect effect: the restored picture's value minus the corrupted one's, of distances with the sign reversed,
    so that more is better; `total_effect` (measure, pair), the same for the clean picture; `recovered` (restored,
    measure), the mean effect divided by the mean total effect, with its 95 % interval in `recovered_interval` (restored,
    measure, bound). Where the corruption changed nothing on the mean, `recovered` has no meaning. `changes` (restored)
    says what each condition did.

    Raises InterpError for conditions and metrics that are not there. Source: Basu et al., arXiv:2310.13730
    (causal mediation, with CLIPScore as measure); Meng et al., arXiv:2202.05262.

    >>> from interp.probes.testing import changed_run
    >>> noise = {"name": "replace_tokens", "words": ["circle"], "value": "random"}
    >>> put = {"name": "patch", "site": "text_encoder.layers.0"}
    >>> ds = causal_tracing(changed_run({"corrupted": [noise], "layer 0": [noise, put]}, samples=3))
    >>> ds["recovered"].dims, ds["restored"].values.tolist()
    (('restored', 'measure'), ['layer 0'])
    """
    for name in (clean, corrupted):
        check_condition(run, name)
    chosen = [conditions] if isinstance(conditions, str) else conditions
    restored = [c for c in (run.conditions if chosen is None else chosen) if c not in (clean, corrupted)]
    ds = compare(
        run, clean, [corrupted, *restored], metrics=metrics, resamples=0, seed=seed, asker="causal_tracing"
    )  # fmt: skip
    values, measures = _good(ds)  # (condition, pair, measure), more is better
    total = values[0] - values[1]
    effect = values[2:] - values[1]
    both = np.concatenate([total[None], effect])  # ratios of means, with one and the same draw of pairs above and below
    both[:, ~np.isfinite(both).all(0)] = np.nan
    ratio, interval = mean_interval(
        np.moveaxis(both, 1, 0),
        resampled(ds["prompt_id"].values),
        resamples=resamples,
        seed=seed,
        statistic=lambda means: means / means[:, :1],
    )
    variables: dict[str, Any] = {
        "effect": (("restored", "measure", "pair"), np.swapaxes(effect, 1, 2), _attrs("the measure's own", "effect")),
        "total_effect": (("measure", "pair"), total.T, _attrs("the measure's own", "effect of the clean picture")),
        "recovered": (("restored", "measure"), ratio[1:], _attrs("1", "mean effect / mean total effect")),
        "recovered_interval": (("restored", "measure", "bound"), interval[1:], _attrs("1", "95 % interval")),
    }
    coords = {
        "restored": restored,
        "measure": measures,
        "bound": ["low", "high"],
        "changes": ("restored", ds["changes"].values[2:]),
        **{c: ("pair", ds[c].values) for c in ("prompt", "prompt_id", "seed")},
    }
    return xr.Dataset(variables, coords, {"clean": clean, "corrupted": corrupted, "pairs": ds.attrs["pairs"]})


def _good(ds: xr.Dataset) -> tuple[np.ndarray, list[str]]:
    """Every measure of a comparison, signed so that more is better: (condition, pair, measure), and their names."""
    parts, names = [], []
    for name in DISTANCES:
        if name in ds:
            parts.append(-ds[name].values[..., None])
            names.append(name)
    if "score" in ds:
        parts.append(ds["score"].values)
        names += [str(m) for m in ds["metric"].values]
    return np.concatenate(parts, axis=-1), names


def _attrs(units: str, text: str) -> dict[str, str]:
    return {"units": units, "long_name": text}
