"""E13: EOS of another prompt through keys alone, values alone, or both."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from interp.probes.style import BLACK, BLUE, ORANGE
from interp.reproduction import drawing
from interp.reproduction.exchange import ALIGN, SCORES, SWAP, swap
from interp.reproduction.experiment import NAMES, Experiment, Runs, judges, pair_units
from interp.reproduction.measures import Answer, Check, Estimate, Figure, Table, curve, estimate
from interp.reproduction.runs import Conditions
from interp.reproduction.settings import Settings
from interp.stores import Run

SIDES = {"k": "EOS of B in keys", "v": "EOS of B in values", "kv": SWAP}


def _needs(settings: Settings) -> dict[str, Conditions]:
    every = {name: [swap(side)] for side, name in SIDES.items()}
    return {"exchange": every, "attention": every}


def _answer(runs: Runs, settings: Settings) -> Answer:
    run = runs["exchange"]
    sides = {"key": SIDES["k"], "value": SIDES["v"], "both": SIDES["kv"]}
    ds = run.probe("key_value_substitution", resamples=1, **sides)
    units = pair_units(run, ds)
    of = partial(estimate, units=units, resamples=settings.resamples)
    short = {SIDES["k"]: "K-Sub", SIDES["v"]: "V-Sub", SIDES["kv"]: "KV-Sub"}
    rows, panels, checks = [], [], []
    gaps = {}
    for metric in judges(run):
        found: dict[str, list[Estimate]] = {"prompt": [], "target": []}
        for condition in short:
            scores = ds["score"].sel(condition=condition)
            for text in found:
                found[text].append(of(scores.sel(metric=f"{metric}:{text}").values))
            gaps[metric, condition] = (
                scores.sel(metric=f"{metric}:target") - scores.sel(metric=f"{metric}:prompt")
            ).values
        rows += [[NAMES[metric], name, a, b] for name, a, b in zip(short.values(), *found.values(), strict=True)]
        series = [("with A", found["prompt"], BLUE), ("with B", found["target"], ORANGE)]
        panels.append((NAMES[metric], "alignment", series))
    for metric in judges(run):
        gap = of(gaps[metric, SIDES["v"]] - gaps[metric, SIDES["k"]])
        checks.append(Check(
            f"(B − A) of V-Sub minus (B − A) of K-Sub, {NAMES[metric]}", gap, ">", 0.0, decides=metric == judges(run)[0]
        ))  # fmt: skip
    near = ds["image_distance_to_both"]
    closer = of((near.sel(condition=SIDES["k"]) - near.sel(condition=SIDES["v"])).values)
    checks.append(Check("L1 to KV-Sub: that of K-Sub minus that of V-Sub", closer, ">", 0.0))
    figures = [Figure(drawing.bars(panels, list(short.values()), "keys or values"), drawing.NOTE)]
    kl = runs["attention"].probe("key_value_substitution", resamples=1, **sides)
    figures.append(_divergence(runs["attention"], kl, checks, settings))
    table = Table(["metric", "substituted", "source A", "target B"], rows, "The paper's Table 4.")
    return Answer(
        checks, [table], figures, {name: ["baseline", *SIDES.values()] for name in ("exchange", "attention")},
        f"{ds.sizes['pair']} pictures of {len(np.unique(units))} pairs for each side; attention of {kl.sizes['pair']}",
        f"V-Sub ahead of K-Sub by {checks[0].number.text()} ({NAMES[judges(run)[0]]})",
    )  # fmt: skip


def _divergence(run: Run, ds: xr.Dataset, checks: list[Check], settings: Settings) -> Figure:
    units = pair_units(run, ds)
    keys = ds["divergence"].sel(condition=SIDES["k"]).values
    even = ds["divergence_uniform"].values
    there = np.isfinite(keys).any(0) & np.isfinite(even).any(0)
    keys, even = keys[:, there], even[:, there]
    x = (settings.steps - ds["step"].values[there]).tolist()
    pooled = np.stack([np.nanmean(keys, 1), np.nanmean(even, 1)], 1)
    ratio = estimate(pooled, units, resamples=settings.resamples, statistic=lambda m: m[:, 0] / m[:, 1])
    checks.append(
        Check("KL from substituted to original keys, over that to uniform attention, mean of steps", ratio, "<", 0.5)
    )
    made = [
        ("keys of B", x, curve(keys, units, resamples=settings.resamples), BLUE, "-"),
        ("uniform", x, curve(even, units, resamples=settings.resamples), BLACK, "--"),
    ]
    return Figure(
        drawing.lines([("Attention over tokens", drawing.LABEL, "KL (nats)", made)], "KL of attention", log=[True]),
        "KL divergence of cross-attention with substituted keys from the original, and the original's from uniform. "
        + drawing.NOTE,
    )


EXPERIMENTS = [
    Experiment(
        "E13", "Through keys or through values", "Appendix G, Table 4, Figures 15 and 16",
        "EOS of B substituted when values are computed (V-Sub) does most of what the full substitution (KV-Sub) does; in keys "
        "alone (K-Sub) it does little, for attention hardly changes.",
        "E4 with the states of B read by the key projections alone, the value projections alone, or both, in all "
        "cross-attention layers. KL per pixel and head between attention over tokens with substituted and original keys, "
        "averaged over pixels, heads and layers at each step; the yardstick is the KL of original attention from uniform.",
        ("Past the first layer of the first step the queries differ too, as the pictures drift apart; the KL has both effects.",
         "Padding is summed into one column in the captured maps, so the KL is a lower bound.",
         "“Well below” is read as: less than half of the yardstick.", ALIGN, SCORES),
        _needs, _answer,
    ),
]  # fmt: skip
